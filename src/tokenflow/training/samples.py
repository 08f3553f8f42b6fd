"""The sheet of sample reconstructions that a training run writes now and then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from tokenflow.data.loader import ImageLoader
from tokenflow.files import atomic_write
from tokenflow.tokenizer.modeling import TokenFlowModel

COLUMNS = 8


class SampleSheet:
    """Reconstructions of the same few pictures, step by step.

    Rows: the originals, the reconstructions, then decodings of about a third and two thirds of the scales.
    """

    def __init__(self, images: Tensor):
        self.images = images  # uint8 [N, 3, H, W]

    @classmethod
    def from_sources(cls, sources: list, image_size: int) -> SampleSheet:
        loader = ImageLoader(sources, image_size, COLUMNS, augment=False, num_workers=0)
        return cls(next(loader)["pixel_values"])

    @torch.no_grad()
    def write(self, model: TokenFlowModel, path: Path, accelerator: Accelerator) -> float:
        """Write the sheet to `path` and to TensorBoard; returns the PSNR of the reconstructions in dB. Leaves the model in
        eval mode."""
        model.eval()
        pixels = self.images.to(model.device).float() / 127.5 - 1
        indices = model.encode(pixels).indices
        scales = len(model.config.scales)
        prefixes = sorted({scales, max(1, scales * 2 // 3), max(1, scales // 3)}, reverse=True)
        rows = [self.images]
        for count in prefixes:
            maps = model.quantized_from_indices(indices, count)
            decoded = model.decode_pixels(maps)
            rows.append((decoded.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu())
        sheet = np.concatenate(
            [np.concatenate(list(row.permute(0, 2, 3, 1).numpy()), axis=1) for row in rows]
        )
        with atomic_write(path) as temporary:
            Image.fromarray(sheet).save(temporary)
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images(
                    {"samples": sheet[None]}, step=int(path.stem.split("-")[-1]), dataformats="NHWC"
                )
        error = (rows[1].double() - self.images.double()).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        return float((10 * torch.log10(255**2 / error)).mean())
