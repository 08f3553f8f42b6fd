"""Yardsticks without a model: what plain shrinking or a picture format keeps of an image at the same
budget."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenflow.errors import UserError


def parse(name: str) -> tuple[str, int]:
    """Method and number of a baseline's name.

    "shrink:N" box-averages to N x N pixels and enlarges bicubically (N * N * 3 bytes); "webp:N" and
    "jpeg:N" are the best picture of at most N bytes in that format over all qualities and halvings of the
    side, header included (JPEG: without its tables, which all pictures could share).

    Raises:
        UserError: another name.
    """
    method, _, number = name.partition(":")
    if method not in ("shrink", "webp", "jpeg") or not number.isdecimal() or int(number) < 1:
        raise UserError(f"unknown baseline {name!r}; write shrink:N, webp:N or jpeg:N, for example webp:250")
    return method, int(number)


def reconstruct(name: str, pictures: Tensor) -> Tensor:
    """Baseline `name` on uint8 pictures [B, 3, H, W] -> uint8, same shape; names as in `parse`.

    Raises:
        UserError: an unknown name; a budget that nothing fits in.
    """
    method, number = parse(name)
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures.cpu()]
    if method == "shrink":
        done = [
            _enlarge(image.resize((number, number), Image.Resampling.BOX), image.size) for image in images
        ]
    else:
        done = [_best_within(image, method, number) for image in images]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in done])


def _enlarge(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _best_within(image: Image.Image, method: str, budget: int) -> Image.Image:
    """The decoded picture with the least squared error among those that fit."""
    target, best, best_error = np.asarray(image, dtype=np.float32), None, float("inf")
    for halvings in range(4):
        small = image.resize([max(side >> halvings, 1) for side in image.size], Image.Resampling.BOX)
        low, high = 0, 100  # the highest quality that fits, by bisection: size grows with quality
        while low < high:
            quality = (low + high) // 2
            data = _encode(small, method, quality)
            if _size(data, method) > budget:
                high = quality
                continue
            low = quality + 1
            decoded = _enlarge(Image.open(io.BytesIO(data)).convert("RGB"), image.size)
            error = float(np.square(np.asarray(decoded, dtype=np.float32) - target).mean())
            if error < best_error:
                best, best_error = decoded, error
    if best is None:
        raise UserError(f"baseline {method}:{budget}: no picture fits in {budget} bytes; allow more")
    return best


def _encode(image: Image.Image, method: str, quality: int) -> bytes:
    file = io.BytesIO()
    options = {"method": 6} if method == "webp" else {"optimize": True}
    image.save(file, method, quality=quality, **options)
    return file.getvalue()


def _size(data: bytes, method: str) -> int:
    """Bytes that belong to this picture alone: all of a WebP file, what follows the start-of-scan marker in
    a JPEG."""
    return len(data) if method == "webp" else len(data) - data.rindex(b"\xff\xda")
