"""ClassToImagePipeline: class labels to pictures, the counterpart of TextToImagePipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import torch

from tokenflow.errors import UserError
from tokenflow.generation.class_conditional import TokenFlowForClassToImage
from tokenflow.generation.pictures import (
    ImagePipelineOutput,
    OutputType,
    PicturePipeline,
    Preview,
    check_output_type,
    known_rows,
    memory_for,
    picture_seeds,
    plain,
)
from tokenflow.generation.sampler import KnownTokens, ScaleStep


class ClassToImagePipeline(PicturePipeline):
    r"""Class labels to pictures: class-conditional model (Fig. 6) and image tokenizer.

    A folder holds the model, its subfolder `tokenizer/` the image tokenizer; `tokenflow train text-to-image
    var-d16` exports such a folder.

    Example:

    ```python
    pipe = ClassToImagePipeline.from_pretrained("runs/var-d16/export")
    pipe([3, 17], num_images_per_label=4, seed=0).images  # 8 pictures
    ```

    Args:
        model: the class-conditional model.
        tokenizer: the image tokenizer whose codes it predicts.

    Raises:
        UserError: the model was made for another image tokenizer.
    """

    model_class = TokenFlowForClassToImage
    model: TokenFlowForClassToImage

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, **kwargs
    ) -> ClassToImagePipeline:
        """Load a bundled name, a folder, or a hub name.

        Args:
            dtype: of the model and decoders; code vectors, encoders and quantizer stay float32.
            kwargs: further arguments of transformers' `from_pretrained`, such as `revision`.
        """
        _, model, tokenizer = cls._load(name_or_path, dtype, kwargs)
        return cls(model, tokenizer)

    def __call__(
        self,
        labels: int | Sequence[int],
        *,
        num_images_per_label: int = 1,
        guidance_scale: float = 1.5,
        top_k: Sequence[int] = (900,),
        top_p: Sequence[float] = (0.96,),
        temperature: float = 1.0,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        known: KnownTokens | None = None,
        output_type: OutputType = "pil",
        callback: Callable[[Preview], None] | None = None,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput:
        """Draw pictures. The defaults are VAR's: one pass a scale.

        Args:
            labels: one or several, from 0 to `model.config.num_classes - 1`.
            num_images_per_label: pictures of each label; picture j of a label has its seed + j.
            seed: an int for every label, or one a label; None draws them. A picture depends on its label,
                seed and settings alone, whatever else is drawn beside it.
            guidance_scale, top_k, top_p, temperature, generator, known, output_type, callback, batch_size: as
                for `TextToImagePipeline`.

        Returns:
            `.images`, `.codes`, `.seeds`.

        Raises:
            UserError: values that make no sense; the message names them; too little memory.
        """
        check_output_type(output_type)
        labels, images = plain(labels), plain(num_images_per_label)
        wanted = list(labels) if isinstance(labels, Iterable) else [labels]
        self.check_labels(wanted)
        seeds = picture_seeds(seed, generator, len(wanted), images, "label")

        def heard(step: ScaleStep) -> None:
            if callback is not None:
                callback(Preview(step.rows, step.position, step.codes, self))

        with memory_for(len(seeds)):
            codes = self.model.generate_indices(
                torch.tensor(wanted).repeat_interleave(images),
                guidance_scale=plain(guidance_scale),
                top_k=plain(top_k),
                top_p=plain(top_p),
                temperature=plain(temperature),
                seed=seeds,
                known=known_rows(known, len(seeds)),
                callback=heard,
                batch_size=batch_size,
            )
            return ImagePipelineOutput(self.decode(codes, output_type), codes, seeds)

    def check_labels(self, labels: Sequence[int]) -> None:
        """Raise UserError for no labels at all, or for one that the model does not know."""
        most = self.model.config.num_classes - 1
        if not labels:
            raise UserError(f"no labels given; this model knows 0 to {most}")
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= most:
                raise UserError(f"label {label}: this model knows 0 to {most}")


__all__ = ["ClassToImagePipeline"]
