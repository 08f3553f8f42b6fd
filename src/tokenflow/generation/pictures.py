"""What all pipelines share, whatever they draw from: codes to pictures, pictures to known codes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import PushToHubMixin

from tokenflow.bundled import resolve
from tokenflow.errors import UserError
from tokenflow.generation.class_conditional import TokenFlowClassToImageConfig
from tokenflow.generation.configuration import TokenFlowTextToImageConfig
from tokenflow.generation.editing import keep_outside, keep_scales
from tokenflow.generation.limits import check_count
from tokenflow.generation.sampler import KnownTokens, seeds_for
from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
from tokenflow.tokenizer.modeling import TokenFlowModel

OutputType = Literal["pil", "pt", "np", "codes"]
OUTPUT_TYPES = ("pil", "pt", "np", "codes")
IMAGE_TOKENIZER = "tokenizer"  # its subfolder
SAME_CODES = 2e-3  # what half precision may move a code vector by
DECODED_AT_A_TIME = 8
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")  # as PyTorch's devices say it
# For those who took one kind of model for the other.
DRAWS_FROM = {
    TokenFlowTextToImageConfig.model_type: "prompts; use TextToImagePipeline, or `generate PROMPT`",
    TokenFlowClassToImageConfig.model_type: "class labels; use ClassToImagePipeline, or `generate --labels`",
}


@dataclass
class ImagePipelineOutput:
    """Attributes:
    images: as `output_type` says; prompt by prompt (label by label), with all pictures of each.
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
    pipeline: PicturePipeline

    def pictures(self) -> list[Image.Image]:
        return self.pipeline.decode(self.codes)


class PicturePipeline(PushToHubMixin):
    """A model that predicts codes, and the image tokenizer whose codes they are.

    A folder holds the model, its subfolder `tokenizer/` the image tokenizer, unless the model's config names
    that (as bundled models do: the package holds each tokenizer once).

    Raises:
        UserError: the model was made for another image tokenizer.
    """

    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, model: Any, tokenizer: TokenFlowModel):
        self.model, self.tokenizer = model.eval(), tokenizer.eval()
        self.image_processor = TokenFlowImageProcessor(size=tokenizer.config.image_size)
        ours, theirs = model.code_table.codes, tokenizer.quantizer.quantizer.codes()
        same = model.code_table.scales == list(tokenizer.config.scales) and ours.shape == theirs.shape
        if not same or (ours - theirs.to(ours.device)).abs().max() > SAME_CODES:
            raise UserError("the model was trained on the codes of another image tokenizer")

    # loading, saving, moving
    @classmethod
    def _load(cls, name_or_path: str | os.PathLike[str], dtype: torch.dtype, kwargs: dict[str, Any]) -> Any:
        """The folder or hub name, the model and the image tokenizer.

        Raises:
            UserError: a folder that lacks one of them, or a model of another kind.
        """
        name = resolve(name_or_path)
        kind = model_kind(name, **kwargs)
        ours = cls.model_class.config_class.model_type  # type: ignore[union-attr]  # both have one
        if kind != ours and kind in DRAWS_FROM:
            raise UserError(f"{name} draws from {DRAWS_FROM[kind]}")
        named = None
        if os.path.isdir(name) and not (Path(name) / IMAGE_TOKENIZER / "config.json").is_file():
            named = PreTrainedConfig.get_config_dict(name)[0].get("image_tokenizer")
            if named is None:
                raise UserError(
                    f"{name} has no image tokenizer in {IMAGE_TOKENIZER}/; give a {cls.__name__}'s folder"
                )
        if kind != ours:
            raise UserError(f"{name} is no model that draws: its config says model_type {kind!r}")
        model = cls.model_class.from_pretrained(name, dtype=dtype, **kwargs)
        if named is None:
            at = {"subfolder": IMAGE_TOKENIZER, **kwargs}
            return name, model, TokenFlowModel.from_pretrained(name, dtype=dtype, **at)
        return name, model, TokenFlowModel.from_pretrained(named, dtype=dtype)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write what `from_pretrained` reads; `kwargs` go to the models (`max_shard_size`, ...)."""
        inner = Path(save_directory) / IMAGE_TOKENIZER
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(inner, **kwargs)
        self.image_processor.save_pretrained(inner)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast both models, as `torch.nn.Module.to` does."""
        self.model.to(*args, **kwargs)
        self.tokenizer.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    # drawing
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
        """What to keep of a picture, for `pipe(..., known=pipe.keep(...))`.

        Args:
            image: the picture.
            repaint: in-painting and out-painting: a picture or array `[H, W]` of the same size; white (True,
                above half of 1, or of 255 where integers exceed 1) is painted anew, black stays.
            scales: a variation: how many of the first scales stay.

        Raises:
            UserError: no picture; not exactly one of `repaint` and `scales`; a mask of another size; see
                `editing`.
        """
        if not isinstance(image, Image.Image):
            raise UserError(f"image must be a PIL image (Image.open reads files), got {image!r:.80}")
        if (repaint is None) == (scales is None):
            raise UserError("give repaint (a mask) or scales (how many to keep), one of them")
        scales = plain(scales)
        if scales is not None and not _is_integer(scales):
            raise UserError(f"scales must be an integer, got {scales!r:.80}")
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


def model_kind(name: str, **kwargs: Any) -> str | None:
    """The `model_type` that a folder or hub name says it has; None where there is no config.

    Raises:
        UserError: neither a folder nor a hub name that can be reached.
    """
    try:
        return PreTrainedConfig.get_config_dict(name, **kwargs)[0].get("model_type")
    except OSError as error:
        raise UserError(f"cannot load model {name}: {str(error).splitlines()[0]}") from error


def check_output_type(output_type: str) -> None:
    """Raise UserError for an unknown one."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")


def plain(value: Any) -> Any:
    """Numbers and arrays of NumPy and PyTorch, alone or in a list, as Python's own; the rest as it is."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def memory_for(pictures: int) -> Iterator[None]:
    """Raise UserError where memory ends inside the block, which draws that many pictures."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in NO_MEMORY):
            raise
        raise UserError(
            f"not enough memory for {pictures:,} pictures; draw fewer, or lower batch_size (--batch-size)"
        ) from error


def picture_seeds(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    subjects: int,
    images: int,
    what: str,
) -> list[int]:
    """A seed for each of `images` pictures of each subject: picture j has the subject's seed + j.

    Args:
        what: a subject is, for messages: prompt or label.

    Raises:
        UserError: seeds and generators, the wrong number of them, a seed that is no integer, or a number of
            images that makes no sense.
    """
    if not _is_integer(images) or images < 1:
        raise UserError(f"num_images_per_{what} must be an integer of at least 1, got {images!r:.80}")
    check_count(subjects * images)
    if generator is not None:
        if seed is not None:
            raise UserError("give seed or generator, not both")
        generators = [generator] * subjects if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != subjects:
            raise UserError(
                f"give one generator, or one for each of the {subjects} {what}s; got {len(generators)}"
            )
        seed = [int(torch.randint(2**32, (), generator=g, device=g.device)) for g in generators]
    seeds = seeds_for(plain(seed), subjects)
    for each in seeds:
        if not _is_integer(each):
            raise UserError(f"a seed must be an integer from 0 to 2**64 - 1, got {each!r:.80}")
    return [each + j for each in seeds for j in range(images)]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def known_rows(known: KnownTokens | None, total: int) -> KnownTokens | None:
    """One row of known codes serves all pictures."""
    if known is None or len(known.codes) != 1:
        return known
    mask = None if known.mask is None else known.mask.expand(total, -1)
    return KnownTokens(known.codes.expand(total, -1), mask)


def _mask_picture(mask: np.ndarray) -> Image.Image:
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or mask.dtype.kind not in "buif":
        raise UserError(f"the mask must be a picture or an array [H, W], got {list(mask.shape)} {mask.dtype}")
    half = 127 if mask.dtype.kind in "ui" and mask.max() > 1 else 0.5
    return Image.fromarray((mask > half).astype(np.uint8) * 255)
