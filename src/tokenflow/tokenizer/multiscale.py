"""The multi-scale residual schedule over any quantizer (Sec. 3.2, "MSVQ"): 1 x 1, 2 x 2, ... final grid.

A schedule with one entry is plain single-scale vector quantization: one code path for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.errors import UserError
from tokenflow.tokenizer.quantizer import CodeUsage, SharedMappingQuantizer


@dataclass
class MultiScaleOutput:
    """Attributes:
    quantized: `[B, D, g, g]`, the scales' code maps resized to the final grid and added up.
    indices: `[B, L]` int64, scales in order, row-major; a dropped scale has none.
    losses: the quantizer's losses averaged over the scales that ran.
    scale_inputs: what entered the quantizer at each scale, `[B, D, s, s]` each.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    scale_inputs: list[Tensor] = field(default_factory=list)


def resize_up(x: Tensor, side: int) -> Tensor:
    """Bicubic `[B, D, s, s]` to `[B, D, side, side]`."""
    if x.shape[-1] == side:
        return x
    if x.device.type == "cuda" and x.requires_grad:
        # Bicubic gradients on CUDA took half of a training step, 9 ms a scale; those of a product do not.
        with torch.autocast("cuda", enabled=False):
            return (x.flatten(2) @ _resizing(x.shape[-1], side, x.device, x.dtype)).unflatten(2, (side, side))
    return F.interpolate(x, size=(side, side), mode="bicubic")


@lru_cache(maxsize=64)
def _resizing(from_side: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bicubic resizing as a matrix `[from_side^2, side^2]`: what it makes of each single pixel."""
    with torch.inference_mode(False), torch.no_grad():
        pixels = torch.eye(from_side**2, device=device, dtype=dtype).view(-1, 1, from_side, from_side)
        return F.interpolate(pixels, size=(side, side), mode="bicubic").flatten(1)


def reduce_area(x: Tensor, side: int) -> Tensor:
    return x if x.shape[-1] == side else F.adaptive_avg_pool2d(x, side)


class MultiScaleQuantizer(nn.Module):
    """Residual quantization over `scales`.

    Args:
        quantizer: quantizes a map `[B, D, s, s]`.
        scales: grid sides, rising; the last is the final grid.
        drop: probability that a training step skips one scale, never the first (code: 0.1).
        usage_window: recent indices that each scale's usage figure looks at.
        restart_dead_codes: in training, once in a usage window of the quantizer, move the codes that it did
            not see to random inputs of the current batch.
        prefix_decoding: share of training images whose `quantized` map holds a random prefix of the scales.
    """

    def __init__(
        self,
        quantizer: SharedMappingQuantizer,
        scales: Sequence[int],
        drop: float = 0.0,
        usage_window: int = 131072,
        restart_dead_codes: bool = False,
        prefix_decoding: float = 0.0,
    ):
        super().__init__()
        self.quantizer = quantizer
        self.scales = list(scales)
        self.drop = drop
        self.restart_dead_codes, self.prefix_decoding = restart_dead_codes, prefix_decoding
        self.scale_usage = nn.ModuleList(CodeUsage(usage_window) for _ in scales)

    def forward(self, h: Tensor, dropped: int | None = None) -> MultiScaleOutput:
        """Quantize `[B, D, g, g]`. `dropped` is the position of a scale to skip; in training None draws."""
        if self.training:
            self.quantizer.forget_prepared()
        if self.training and dropped is None:
            dropped = self._draw_dropped()
        if self.quantizer.wants_initialization:
            pooled = [reduce_area(h, s).flatten(2).transpose(1, 2).flatten(0, 1) for s in self.scales]
            self.quantizer.initialize(torch.cat(pooled))
        windows, kept = self.quantizer.usage.windows, self._draw_prefixes(h)
        residual, total = h, torch.zeros_like(h)
        inputs, indices, losses = [], [], []
        for position, side in enumerate(self.scales):
            if position == dropped:
                continue
            inputs.append(reduce_area(residual, side))
            out = self.quantizer(inputs[-1])
            step = resize_up(out.quantized, self.scales[-1])
            total = total + (step if kept is None else step * (kept > position))
            residual = residual - step.detach()
            indices.append(out.indices)
            losses.append(out.losses)
            if self.training:
                cast(CodeUsage, self.scale_usage[position]).update(out.indices)
        if self.training and self.restart_dead_codes and self.quantizer.usage.windows > windows:
            vectors = [x.detach().flatten(2).transpose(1, 2).flatten(0, 1) for x in inputs]
            self.quantizer.restart_dead(torch.cat(vectors))
        mean_losses = {key: torch.stack([step[key] for step in losses]).mean() for key in losses[0]}
        return MultiScaleOutput(total, torch.cat(indices, dim=1), mean_losses, inputs)

    def _draw_dropped(self) -> int | None:
        if self.drop == 0.0 or len(self.scales) == 1:
            return None
        chance, position = torch.rand(()).item(), int(torch.randint(1, len(self.scales), ()))
        choice = torch.tensor(position if chance < self.drop else -1)
        if dist.is_available() and dist.is_initialized():  # all processes skip the same scale
            choice = choice.to(next(self.parameters()).device)
            dist.broadcast(choice, src=0)
        return None if choice < 0 else int(choice)

    def _draw_prefixes(self, h: Tensor) -> Tensor | None:
        """How many scales of each image the decoders get, `[B, 1, 1, 1]`; None: all of all."""
        if not (self.training and self.prefix_decoding):
            return None
        every, shape = len(self.scales), (len(h), 1, 1, 1)
        some = torch.randint(1, every + 1, shape, device=h.device)
        return torch.where(torch.rand(shape, device=h.device) < self.prefix_decoding, some, every)

    # from indices alone
    def prefix_scales(self, num_tokens: int) -> list[int]:
        """The scales that `num_tokens` indices cover.

        Raises:
            UserError: they do not end with a scale.
        """
        covered = 0
        for position, side in enumerate(self.scales):
            covered += side * side
            if covered == num_tokens:
                return self.scales[: position + 1]
        ends = [sum(s * s for s in self.scales[: i + 1]) for i in range(len(self.scales))]
        raise UserError(f"{num_tokens} indices do not end with a scale; whole scales end at {ends}")

    def code_maps(self, indices: Tensor) -> list[Tensor]:
        """Code vectors `[B, D, s, s]` of each scale of `indices` `[B, L']` (all scales or the first few)."""
        scales = self.prefix_scales(indices.shape[1])
        parts = indices.split([s * s for s in scales], dim=1)
        return [
            self.quantizer.lookup(part).transpose(1, 2).unflatten(2, (s, s))
            for part, s in zip(parts, scales, strict=True)
        ]

    def quantized(self, indices: Tensor) -> Tensor:
        """The quantized map `[B, D, g, g]` of `indices`; a prefix gives a coarse but full-size map."""
        return self.partial_sums(indices)[-1]

    def partial_sums(self, indices: Tensor) -> list[Tensor]:
        """The quantized map after each scale, `[B, D, g, g]` each."""
        sums: list[Tensor] = []
        for codes in self.code_maps(indices):
            step = resize_up(codes, self.scales[-1])
            sums.append(sums[-1] + step if sums else step)
        return sums

    def next_scale_inputs(self, indices: Tensor, repredict: int | None = None) -> Tensor:
        """What a next-scale predictor sees before scales 2, 3, ...: `[B, L - 1, D]` from `indices` `[B, L]`.

        The running sum is resized from scale to scale, unlike in `quantized`, which resizes each scale
        straight to the final grid. `repredict=j` replaces block j by the sum that already holds that scale's
        own codes (multi-step sampling).
        """
        maps = self.code_maps(indices)
        running, sums, blocks = torch.zeros_like(maps[0]), [], []
        for codes in maps[:-1]:
            running = running + codes
            sums.append(running)
            running = resize_up(running, self.scales[len(sums)])
            blocks.append(running)
        sums.append(running + maps[-1])
        if repredict is not None:
            blocks[repredict] = sums[repredict + 1]
        return torch.cat([block.flatten(2) for block in blocks], dim=2).transpose(1, 2)
