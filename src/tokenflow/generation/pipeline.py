"""TextToImagePipeline: prompts to pictures, in the style of diffusers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tokenflow.errors import UserError
from tokenflow.generation.modeling import TokenFlowForTextToImage
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
from tokenflow.generation.prompt import encode_prompts, prompt_lengths
from tokenflow.generation.sampler import KnownTokens, ScaleStep
from tokenflow.tokenizer.modeling import TokenFlowModel


class TextToImagePipeline(PicturePipeline):
    r"""Text to pictures: language model, its text tokenizer, and the image tokenizer.

    A folder holds the language model and the text tokenizer, its subfolder `tokenizer/` the image tokenizer.

    Example:

    ```python
    pipe = TextToImagePipeline.from_pretrained("tokenflow-tiny-t2i")
    pipe(["a photo of a daisy", "a dog on a beach"], seed=0).images[0].save("daisy.png")
    ```

    Args:
        model: the language model.
        text_tokenizer: a transformers tokenizer with a padding token.
        tokenizer: the image tokenizer whose codes the model predicts.

    Raises:
        UserError: the model was made for another image tokenizer.
    """

    model_class = TokenFlowForTextToImage

    def __init__(self, model: TokenFlowForTextToImage, text_tokenizer: Any, tokenizer: TokenFlowModel):
        super().__init__(model, tokenizer)
        self.text_tokenizer = text_tokenizer

    # loading, saving
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> TextToImagePipeline:
        """Load a bundled name, a folder, or a hub name.

        Args:
            dtype: of language model and decoders; code vectors, encoders and quantizer stay float32.
            kwargs: further arguments of transformers' `from_pretrained`, such as `revision`.
        """
        name, model, tokenizer = cls._load(name_or_path, dtype, kwargs)
        return cls(model, AutoTokenizer.from_pretrained(name, **kwargs), tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write what `from_pretrained` reads; `kwargs` go to the models (`max_shard_size`, ...)."""
        super().save_pretrained(save_directory, **kwargs)
        self.text_tokenizer.save_pretrained(save_directory)

    # drawing
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 7.5,
        top_k: Sequence[int] = (1200, 100, 1),
        top_p: Sequence[float] = (0.8, 0.8, 0.0),
        temperature: float = 1.0,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        known: KnownTokens | None = None,
        output_type: OutputType = "pil",
        callback: Callable[[Preview], None] | None = None,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput:
        """Draw pictures.

        Args:
            prompt: one or several; only the first `max_text_tokens` tokens are read (a warning says so).
            negative_prompt: what to stay away from, one for all or one a prompt; by default the empty prompt.
            num_images_per_prompt: pictures of each prompt; picture j of a prompt has its seed + j.
            guidance_scale: how closely to follow the prompt, rising from scale to scale up to this; 0 is
                fastest and follows it least.
            top_k, top_p: one entry a pass of each scale, see `SamplingSettings`; a list of one entry draws
                each scale once.
            temperature: 0 takes the likeliest codes.
            seed: an int for every prompt, or one a prompt; None draws them. A picture depends on its prompt,
                seed and settings alone, whatever else is drawn beside it.
            generator: seeds are drawn from it instead; one a prompt if it is a list.
            known: codes that are given, see `keep`; one row serves all pictures.
            output_type: `"pil"`; `"pt"` `[B, 3, H, W]` and `"np"` `[B, H, W, 3]` float32 in [0, 1];
                `"codes"` `[B, N]` int64, nothing is decoded.
            callback: is called with a `Preview` after each scale.
            batch_size: pictures at a time, see `TokenFlowForTextToImage.stream_indices`.

        Returns:
            `.images`, `.codes`, `.seeds`.

        Raises:
            UserError: values that make no sense; the message names them; too little memory.
        """
        check_output_type(output_type)
        # 1. A row and a seed for each picture
        rows = self._rows(prompt, negative_prompt, num_images_per_prompt, seed, generator, known)

        # 2. Codes, scale by scale
        settings = {
            "guidance_scale": guidance_scale,
            "top_k": top_k,
            "top_p": top_p,
            "temperature": temperature,
            "batch_size": batch_size,
        }
        done = []
        with memory_for(len(rows["seed"])):
            for step in self._steps(rows, settings):
                if callback is not None:
                    callback(Preview(step.rows, step.position, step.codes, self))
                if step.position == len(self.model.config.scales) - 1:
                    done.append(step.codes)
            codes = torch.cat(done)

            # 3. Pictures
            return ImagePipelineOutput(self.decode(codes, output_type), codes, rows["seed"])

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        known: KnownTokens | None = None,
        **settings: Any,
    ) -> Iterator[Preview]:
        """The same as an iterator: a `Preview` after each scale. `settings` are those of `stream_indices`."""
        rows = self._rows(prompt, negative_prompt, num_images_per_prompt, seed, generator, known)
        with memory_for(len(rows["seed"])):
            for step in self._steps(rows, settings):
                yield Preview(step.rows, step.position, step.codes, self)

    def _steps(self, rows: dict[str, Any], settings: dict[str, Any]) -> Iterator[ScaleStep]:
        return self.model.stream_indices(**rows, **{name: plain(value) for name, value in settings.items()})

    def _rows(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None,
        images: int,
        seed: int | Sequence[int] | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        known: KnownTokens | None,
    ) -> dict[str, Any]:
        """What each picture is made from, as `stream_indices` takes it."""
        images = plain(images)
        prompts, negatives = _texts("prompt", prompt), _texts("negative_prompt", negative_prompt or "")
        if len(negatives) not in (1, len(prompts)):
            raise UserError(f"give 1 or {len(prompts)} negative prompts, got {len(negatives)}")
        seeds = picture_seeds(seed, generator, len(prompts), images, "prompt")
        ids, mask = self.encode(prompts)
        negative_ids, negative_mask = self.encode(negatives)
        each = images if len(negatives) == len(prompts) else 1
        return {
            "input_ids": ids.repeat_interleave(images, 0),
            "attention_mask": mask.repeat_interleave(images, 0),
            "negative_input_ids": negative_ids.repeat_interleave(each, 0),
            "negative_attention_mask": negative_mask.repeat_interleave(each, 0),
            "seed": seeds,
            "known": known_rows(known, images * len(prompts)),
        }

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts to `input_ids` and `attention_mask` of the language model; warns of those that are cut."""
        limit = self.model.config.max_text_tokens
        # Only a text of more bytes than that can have more tokens: others need no second look.
        long = [text for text in prompts if len(text.encode()) >= limit]
        cut = [length for length in prompt_lengths(self.text_tokenizer, long) if length > limit]
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(prompts)} prompts are cut to {limit} tokens; the longest has {max(cut)}",
                stacklevel=4,  # the caller of the pipeline
            )
        ids, mask = encode_prompts(self.text_tokenizer, prompts, limit, self.model.config.image_open_ids)
        return ids.to(self.device), mask.to(self.device)


def _texts(name: str, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} must be a string or a list of strings, got {given!r:.80}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} is not valid Unicode text: {text!r:.80}") from error
    return list(texts)


__all__ = ["TextToImagePipeline"]
