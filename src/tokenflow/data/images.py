"""Reading one image safely: whatever comes in, either an 8-bit RGB picture comes out or a one-line error."""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from tokenflow.errors import UserError
from tokenflow.files import atomic_write

# Below the size at which Pillow starts to warn; 80 million RGB pixels are 240 MB.
MAX_PIXELS = 80_000_000

# A closed list: other plugins of Pillow start programs (EPS) or take almost any bytes for an image (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")

_EXIF_ORIENTATION = 274
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """An image that cannot be used: missing, not an image, broken, or too large. The message is one line."""


def read_image(
    source: str | os.PathLike[str] | bytes | BinaryIO | Image.Image,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is composited on white, 16-bit grey is scaled (not clipped),
    and CMYK, palette, grey and 1-bit become RGB. Of an animation the first frame is read.

    Args:
        source: a path, encoded bytes, an open binary file, or a PIL image (which is left untouched).
        name: what to call it in errors; the path, or "image", by default.
        max_pixels: width x height above which an image is refused, before anything is decoded.

    Raises ImageError, one line that names the image, if it is missing, unreadable, truncated or too large.
    """
    name = name or _name_of(source)
    try:
        if isinstance(source, Image.Image):
            _check_size(source, max_pixels)
            return _upright_rgb(source)
        with _open(source) as image:
            _check_size(image, max_pixels)
            return _upright_rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's readers raise nearly anything on damaged files (struct.error, SyntaxError, EOFError ...).
        raise ImageError(f"cannot read image {name}: {_reason(source, error)}") from error


def save_image(image: Image.Image, path: str | os.PathLike[str], **options: Any) -> None:
    """Write a PIL image; the format follows the suffix (`options` go to Pillow). Never leaves half a file.

    Raises UserError for an unknown suffix, a full disk or a place that cannot be written to.
    """
    Image.init()
    suffix = Path(path).suffix.lower()
    if suffix not in Image.EXTENSION or Image.EXTENSION[suffix] not in Image.SAVE:
        raise UserError(
            f"cannot write {os.fspath(path)}: no image format has the suffix {suffix!r}; try .png"
        )
    with atomic_write(path) as temporary:
        image.save(temporary, **options)


def _name_of(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    filename = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(filename) if filename else "image"


def _open(source: str | os.PathLike[str] | bytes | BinaryIO) -> Image.Image:
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    return Image.open(source, formats=_known_formats())


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)  # older Pillows have no AVIF


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels are more than the allowed {max_pixels:,}; make it smaller"
        )
    if width * height == 0:
        raise ImageError(f"it has no pixels ({width} x {height})")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    rgb = _to_rgb(image)
    turn = _UPRIGHT.get(_orientation(image))
    return rgb.transpose(turn) if turn is not None else rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing against the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):
        return _from_16_bit_grey(image)
    if image.mode == "F":
        raise ImageError("its pixels are floats of unknown range; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey converts in two steps only
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16, I;16B, and I as PPM gives it): Pillow's own conversion would clip at 255."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ImageError("its grey values do not fit in 16 bits; save it with 8 or 16 bits per channel")
    scaled = ((grey * 255 + 32767) // 65535).astype(np.uint8)
    if "transparency" in image.info:
        scaled[grey == image.info["transparency"]] = 255
    return Image.fromarray(scaled).convert("RGB")


def _reason(source: object, error: Exception) -> str:
    match error:
        case ImageError():
            return str(error)
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "it is a folder, not an image"
        case PermissionError():
            return "permission denied"
        case Image.UnidentifiedImageError():
            if isinstance(source, bytes) and not source:
                return "it is empty"
            return "it is not an image of a known kind (JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, ...)"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"it has far too many pixels ({str(error).splitlines()[0]})"
    words = " ".join(str(error).split())
    return f"the file is damaged ({words or type(error).__name__})"
