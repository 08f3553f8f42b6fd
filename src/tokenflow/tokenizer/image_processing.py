"""Pictures to model input and back, on transformers' PIL backend (no torchvision)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

from tokenflow.errors import UserError

RESIZE_MODES = ("crop", "pad", "squash")
LONGEST_SQUARE = (
    8192  # a 1 x 50,000 strip padded to a square would take gigabytes: reduce such pictures first
)
LONGEST_STRIP = (
    16  # times the short side; enlarging the short side of a longer strip would take gigabytes too
)


class TokenFlowImageProcessorKwargs(ImagesKwargs, total=False):
    """What a call takes beside the usual: `resize_mode`, see [`TokenFlowImageProcessor`]."""

    resize_mode: str


class TokenFlowImageProcessor(PilBackend):
    r"""Prepares pictures for a [`TokenFlowModel`] and turns its pixels back into pictures.

    `processor(images, return_tensors="pt").pixel_values` is `[B, 3, size, size]` float32 in [-1, 1]:
    `(x / 255 - 0.5) / 0.5` of the resized 8-bit picture.

    Args:
        size (`int` or `dict`): side of the square input in pixels, the model's `config.image_size`.
        resize_mode (`str`): how a picture becomes square. `"crop"` (the default, for training and
            reconstruction): halve with a box filter while the short side is at least twice `size`, bicubic
            to `size`, centre crop. `"pad"` (LLaVA fine-tuning and inference): centre on a square of mean
            colour, then bicubic. `"squash"` (LLaVA's first stage): bicubic without regard to the aspect.

    Raises:
        UserError: an unknown `resize_mode` or a size that is not square.
    """

    valid_kwargs = TokenFlowImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    size = SizeDict(height=256, width=256)
    resize_mode = "crop"
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _side(self.size, self.resize_mode)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[override]
        """As in transformers; names of bundled models come first."""
        from tokenflow.bundled import resolve

        return super().from_pretrained(resolve(pretrained_model_name_or_path), **kwargs)

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """RGB, with transparent parts on white."""
        if isinstance(image, Image.Image) and image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return super().convert_to_rgb(image, input_data_format)

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        resize_mode: str,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        processed = []
        for image in images:
            if do_resize:
                side = _side(size, resize_mode)
                fill = tuple(int(255 * mean) for mean in image_mean)
                picture = to_pil_image(image, input_data_format=ChannelDimension.FIRST)
                squared = _square(picture, side, resize_mode, resample or self.resample, fill)
                image = np.moveaxis(np.asarray(squared), -1, 0)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)

    def postprocess(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """Pictures from the model's pixels.

        Args:
            pixel_values: `[B, 3, H, W]` or `[3, H, W]`, any float dtype; values outside [-1, 1] are clamped.

        Returns:
            B RGB pictures of W x H pixels: `127.5 x + 128`, truncated, as the released code does.

        Raises:
            UserError: pixels of another shape.
        """
        if pixel_values.ndim == 3:
            pixel_values = pixel_values[None]
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise UserError(f"pixel_values must be [B, 3, H, W], got {list(pixel_values.shape)}")
        scaled = (127.5 * pixel_values.detach().float() + 128).clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(array) for array in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def _side(size: SizeDict, resize_mode: str) -> int:
    if resize_mode not in RESIZE_MODES:
        raise UserError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, got {resize_mode!r}")
    if not size.height or size.height != size.width:
        raise UserError(f"size must be one number or an equal height and width, got {dict(size)}")
    return size.height


def _square(picture: Image.Image, side: int, mode: str, resample: int, fill: tuple[int, ...]) -> Image.Image:
    filter_ = Image.Resampling(resample)
    if mode == "squash":
        return picture.resize((side, side), filter_)
    if mode == "pad":
        if max(picture.size) > LONGEST_SQUARE:
            picture = picture.reduce(-(-max(picture.size) // LONGEST_SQUARE))
        long = max(picture.size)
        square = Image.new("RGB", (long, long), fill)
        square.paste(picture, ((long - picture.width) // 2, (long - picture.height) // 2))
        return square.resize((side, side), filter_)
    # "crop", as in guided diffusion: the box halvings keep bicubic from aliasing and cost little.
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    if max(picture.size) > LONGEST_STRIP * min(picture.size):
        picture = _middle(picture, *(min(edge, LONGEST_STRIP * min(picture.size)) for edge in picture.size))
    scale = side / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), filter_)
    return _middle(picture, side, side)


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
