"""Which codes of a picture to keep: next-scale models edit without being trained for it (VAR, Sec. 5.2).

A variation keeps the first scales and draws the rest anew. In-painting and out-painting keep every code whose
patch lies mostly outside the region to be painted, at every scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.errors import UserError
from tokenflow.generation.sampler import KnownTokens


def keep_scales(codes: Tensor, scales: Sequence[int], count: int) -> KnownTokens:
    """Keep the first `count` scales of `codes` `[B, N]`.

    Raises:
        UserError: `count` is not 1 to `len(scales) - 1`.
    """
    if not 1 <= count < len(scales):
        raise UserError(f"a variation keeps 1 to {len(scales) - 1} scales of {len(scales)}, got {count}")
    return KnownTokens(codes[:, : sum(side * side for side in scales[:count])])


def keep_outside(codes: Tensor, repaint: Tensor, scales: Sequence[int]) -> KnownTokens:
    """Keep the codes outside a region.

    Args:
        codes: `[B, N]`.
        repaint: `[H, W]` or `[B, H, W]` bool, True where to paint anew; of any size, for the whole picture.
        scales: grid sides.

    Returns:
        Known is a code whose patch is repainted by less than half.

    Raises:
        UserError: a mask of another shape or type; one that repaints nothing, or leaves nothing to keep.
    """
    if repaint.ndim == 2:
        repaint = repaint[None]
    if repaint.dtype != torch.bool or repaint.ndim != 3 or len(repaint) not in (1, len(codes)):
        raise UserError(
            f"the mask must be [H, W] or [{len(codes)}, H, W] bool (True: repaint), "
            f"got {list(repaint.shape)} {repaint.dtype}"
        )
    share = repaint[:, None].float()
    known = torch.cat([(F.adaptive_avg_pool2d(share, side) < 0.5).flatten(1) for side in scales], dim=1)
    if known.all():
        raise UserError("the mask repaints nothing: no patch lies half inside its white region; enlarge it")
    if not known.any():
        raise UserError("the mask repaints everything; leave some of it black, or draw from the prompt alone")
    return KnownTokens(codes, known.to(codes.device).expand(len(codes), -1))
