"""Keeping a part of a model in float32 whatever the rest is cast to."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module whose floating-point tensors stay float32 through `.to(dtype)`, `.half()` or `.bfloat16()` of
    any parent.

    Half-precision features change most codes, so encoders and quantizers are kept exact. Casting back
    afterwards would not do: the weights would already be rounded.
    """

    def _apply(self, fn, recurse=True):
        def keep_dtype(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return fn(t)
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        # Only real casts are held back; loading half-precision files goes through `from_pretrained`.
        return super()._apply(keep_dtype, recurse)


def no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)
