"""The sheet of sample reconstructions that a training run writes now and then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenflow.data.loader import ImageLoader
from tokenflow.data.sources import Source
from tokenflow.files import atomic_write

COLUMNS = 8


def sample_pictures(sources: Sequence[Source], image_size: int) -> Tensor:
    """The same few centre crops every time, uint8 `[8, 3, H, W]`."""
    return next(ImageLoader(sources, image_size, COLUMNS, augment=False, num_workers=0))["pixel_values"]


def to_uint8(pixel_values: Tensor) -> Tensor:
    """Pixels in about [-1, 1] to uint8 as the image processor does it: 127.5 x + 128, truncated."""
    return (pixel_values.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu()


def mean_psnr(images: Tensor, others: Tensor) -> float:
    """Mean over images of the PSNR in dB between two uint8 batches `[N, 3, H, W]`."""
    error = (images.double() - others.double()).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return float((10 * torch.log10(255**2 / error)).mean())


def picture_grid(rows: Sequence[Tensor]) -> np.ndarray:
    """Rows of uint8 pictures `[N, 3, H, W]` as one picture `[rows * H, N * W, 3]`."""
    return np.concatenate([np.concatenate(list(row.permute(0, 2, 3, 1).numpy()), axis=1) for row in rows])


def write_picture(picture: np.ndarray, path: Path) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary)
