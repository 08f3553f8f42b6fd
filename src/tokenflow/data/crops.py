"""Square crops for training and evaluation, as the released code and ADM cut them.

Large images are first halved with a box filter while the short side is at least twice the target, then
resized bicubically, then cut.
"""

from __future__ import annotations

import math
import random

from PIL import Image

from tokenflow.data.images import MAX_PIXELS, ImageError


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` square after resizing the short side to `size` (small images are enlarged).

    Raises ImageError for an image so elongated that its resized form would not fit in memory.
    """
    image = _resize_short_side(image, size)
    return _cut(image, size, top=(image.height - size) // 2, left=(image.width - size) // 2)


def random_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A random `size` x `size` square that shows 80 to 100 % of the short side (ADM; Dhariwal, Nichol 2021).

    Three draws from `rng`, in this order: the short side after resizing, `size` to `ceil(size / 0.8)`
    inclusive; the top; the left. Same errors as `center_crop`.
    """
    image = _resize_short_side(image, rng.randrange(size, math.ceil(size / 0.8) + 1))
    top = rng.randrange(image.height - size + 1)
    left = rng.randrange(image.width - size + 1)
    return _cut(image, size, top, left)


def random_flip(image: Image.Image, rng: random.Random) -> Image.Image:
    """Mirror left and right with probability one half (one draw from `rng`)."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    longest = max(image.size) * short_side // min(image.size)
    if longest * short_side > MAX_PIXELS:
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels is too elongated to crop squares of "
            f"{short_side} pixels from it"
        )
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def _cut(image: Image.Image, size: int, top: int, left: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))
