"""TextToImagePipeline: prompts to pictures, in the style of diffusers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import PushToHubMixin

from tokenflow.errors import UserError
from tokenflow.generation.editing import keep_outside, keep_scales
from tokenflow.generation.modeling import TokenFlowForTextToImage
from tokenflow.generation.prompt import encode_prompts, prompt_lengths
from tokenflow.generation.sampler import KnownTokens, seeds_for
from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
from tokenflow.tokenizer.modeling import TokenFlowModel

OutputType = Literal["pil", "pt", "np", "codes"]
OUTPUT_TYPES = ("pil", "pt", "np", "codes")
IMAGE_TOKENIZER = "tokenizer"  # its subfolder
SAME_CODES = 2e-3  # what half precision may move a code vector by
DECODED_AT_A_TIME = 8


@dataclass
class TextToImagePipelineOutput:
    """Attributes:
    images: as `output_type` says; prompt by prompt, with `num_images_per_prompt` of each.
    codes: `[B, N]` int64, their codes.
    seeds: the B seeds; with the same settings each makes its picture again.
    """

    images: Any
    codes: Tensor
    seeds: list[int]


@dataclass(frozen=True)
class Preview:
    """One scale of some pictures is done. `pictures()` decodes what there is: coarse, but full-size.

    Attributes:
        rows: which pictures of the call.
        position: index of the scale.
        codes: `[len(rows), L_k]` int64, their codes so far.
    """

    rows: range
    position: int
    codes: Tensor
    pipeline: TextToImagePipeline

    def pictures(self) -> list[Image.Image]:
        return self.pipeline.decode(self.codes)


class TextToImagePipeline(PushToHubMixin):
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

    def __init__(self, model: TokenFlowForTextToImage, text_tokenizer: Any, tokenizer: TokenFlowModel):
        self.model, self.text_tokenizer, self.tokenizer = model.eval(), text_tokenizer, tokenizer.eval()
        self.image_processor = TokenFlowImageProcessor(size=tokenizer.config.image_size)
        ours, theirs = model.code_table.codes, tokenizer.quantizer.quantizer.codes()
        same = model.code_table.scales == list(tokenizer.config.scales) and ours.shape == theirs.shape
        if not same or (ours - theirs.to(ours.device)).abs().max() > SAME_CODES:
            raise UserError("the language model was trained on the codes of another image tokenizer")

    # loading, saving, moving
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> TextToImagePipeline:
        """Load a bundled name, a folder, or a hub name.

        Args:
            dtype: of language model and decoders; code vectors, encoders and quantizer stay float32.
            kwargs: further arguments of transformers' `from_pretrained`, such as `revision`.
        """
        from tokenflow.bundled import resolve

        name = resolve(name_or_path)
        if os.path.isdir(name) and not (Path(name) / IMAGE_TOKENIZER / "config.json").is_file():
            raise UserError(
                f"{name} has no image tokenizer in {IMAGE_TOKENIZER}/; give a TextToImagePipeline's folder"
            )
        model = TokenFlowForTextToImage.from_pretrained(name, dtype=dtype, **kwargs)
        tokenizer = TokenFlowModel.from_pretrained(name, dtype=dtype, subfolder=IMAGE_TOKENIZER, **kwargs)
        return cls(model, AutoTokenizer.from_pretrained(name, **kwargs), tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write what `from_pretrained` reads; `kwargs` go to the models (`max_shard_size`, ...)."""
        inner = Path(save_directory) / IMAGE_TOKENIZER
        self.model.save_pretrained(save_directory, **kwargs)
        self.text_tokenizer.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(inner, **kwargs)
        self.image_processor.save_pretrained(inner)

    def to(self, *args: Any, **kwargs: Any) -> TextToImagePipeline:
        """Move or cast both models, as `torch.nn.Module.to` does."""
        self.model.to(*args, **kwargs)
        self.tokenizer.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

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
    ) -> TextToImagePipelineOutput:
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
            UserError: values that make no sense; the message names them.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        # 1. A row and a seed for each picture
        rows = self._rows(prompt, negative_prompt, num_images_per_prompt, seed, generator, known)

        # 2. Codes, scale by scale
        settings = {
            "guidance_scale": guidance_scale,
            "top_k": top_k,
            "top_p": top_p,
            "temperature": temperature,
        }
        done = []
        for step in self.model.stream_indices(**rows, **settings, batch_size=batch_size):
            if callback is not None:
                callback(Preview(step.rows, step.position, step.codes, self))
            if step.position == len(self.model.config.scales) - 1:
                done.append(step.codes)
        codes = torch.cat(done)

        # 3. Pictures
        return TextToImagePipelineOutput(self.decode(codes, output_type), codes, rows["seed"])

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
        for step in self.model.stream_indices(**rows, **settings):
            yield Preview(step.rows, step.position, step.codes, self)

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
        prompts, negatives = _texts("prompt", prompt), _texts("negative_prompt", negative_prompt or "")
        if not isinstance(images, int) or images < 1:
            raise UserError(f"num_images_per_prompt must be an integer of at least 1, got {images!r}")
        if len(negatives) not in (1, len(prompts)):
            raise UserError(f"give 1 or {len(prompts)} negative prompts, got {len(negatives)}")
        if generator is not None:
            if seed is not None:
                raise UserError("give seed or generator, not both")
            seed = _drawn_seeds(generator, len(prompts))
        ids, mask = self.encode(prompts)
        negative_ids, negative_mask = self.encode(negatives)
        each = images if len(negatives) == len(prompts) else 1
        total = images * len(prompts)
        if known is not None and len(known.codes) == 1:
            row_mask = None if known.mask is None else known.mask.expand(total, -1)
            known = KnownTokens(known.codes.expand(total, -1), row_mask)
        return {
            "input_ids": ids.repeat_interleave(images, 0),
            "attention_mask": mask.repeat_interleave(images, 0),
            "negative_input_ids": negative_ids.repeat_interleave(each, 0),
            "negative_attention_mask": negative_mask.repeat_interleave(each, 0),
            "seed": [s + j for s in seeds_for(seed, len(prompts)) for j in range(images)],
            "known": known,
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

    @torch.no_grad()
    def decode(self, codes: Tensor, output_type: OutputType = "pil") -> Any:
        """Codes `[B, L_k]` (all scales or the first few) to pictures as `output_type` says."""
        if output_type == "codes":
            return codes
        # On a CPU one by one, as they are sampled: so a picture's pixels do not depend on its batch either.
        parts = codes.split(1 if self.device.type == "cpu" else DECODED_AT_A_TIME)
        maps = (self.tokenizer.quantized_from_indices(part) for part in parts)
        pixels = torch.cat([self.tokenizer.decode_pixels(x).float() for x in maps])
        if output_type == "pil":
            return self.image_processor.postprocess(pixels)
        unit = (pixels / 2 + 0.5).clamp(0, 1).cpu()
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()

    # editing
    @torch.no_grad()
    def keep(
        self,
        image: Image.Image,
        *,
        repaint: Image.Image | np.ndarray | None = None,
        scales: int | None = None,
    ) -> KnownTokens:
        """What to keep of a picture, for `pipe(prompt, known=pipe.keep(...))`.

        Args:
            image: the picture.
            repaint: in-painting and out-painting: a picture or array `[H, W]` of the same size; white (True,
                above half) is painted anew, black stays.
            scales: a variation: how many of the first scales stay.

        Raises:
            UserError: not exactly one of `repaint` and `scales`; a mask of another size; see `editing`.
        """
        if (repaint is None) == (scales is None):
            raise UserError("give repaint (a mask) or scales (how many to keep), one of them")
        sides = self.model.config.scales
        codes = self.tokenizer.encode(self._pixels(image)).indices
        if repaint is None:
            return keep_scales(codes, sides, cast(int, scales))
        mask = repaint if isinstance(repaint, Image.Image) else _mask_picture(repaint)
        if mask.size != image.size:
            raise UserError(
                f"the mask is {mask.size[0]} x {mask.size[1]}, the image {image.size[0]} x "
                f"{image.size[1]}; make them the same size"
            )
        # Through the same resizing and cropping as the picture.
        return keep_outside(codes, self._pixels(mask.convert("RGB")).mean(dim=1) > 0, sides)

    def _pixels(self, image: Image.Image) -> Tensor:
        return self.image_processor(image, return_tensors="pt").pixel_values.to(self.tokenizer.device)


def _mask_picture(mask: np.ndarray) -> Image.Image:
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "buf":
        raise UserError(f"the mask must be a picture or an array [H, W], got {list(mask.shape)} {mask.dtype}")
    white = mask if mask.dtype == bool else mask > (127 if mask.dtype.kind == "u" else 0.5)
    return Image.fromarray(white.astype(np.uint8) * 255)


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


def _drawn_seeds(generator: torch.Generator | Sequence[torch.Generator], prompts: int) -> list[int]:
    generators = [generator] * prompts if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != prompts:
        raise UserError(
            f"give one generator, or one for each of the {prompts} prompts; got {len(generators)}"
        )
    return [int(torch.randint(2**32, (), generator=g, device=g.device)) for g in generators]


__all__ = ["Preview", "TextToImagePipeline", "TextToImagePipelineOutput"]
