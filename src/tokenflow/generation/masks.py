"""Attention masks from segments: causal over text and scales, full inside a scale, padding excluded.

A sequence is described by one number a position, its *block*: a text token is a block of its own, the tokens
of one scale share one. A position sees every block up to its own. So texts and images may follow each other
in any order; nothing here knows how long a prompt is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class Segment(NamedTuple):
    """`length` positions: `"text"` (each sees those before it) or `"scale"` (all see each other)."""

    length: int
    kind: Literal["text", "scale"]


def block_numbers(segments: Sequence[Segment], device: torch.device | str | None = None) -> Tensor:
    """The block of each position, `[L]` int64, rising. Not to be changed: the same tensor is given again."""
    return _block_numbers(tuple(segments), torch.device(device or "cpu"))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # whoever asks first: training may want it, too
def _block_numbers(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    steps = []
    for length, kind in segments:
        step = torch.ones(length, dtype=torch.int64)
        if kind == "scale":
            step[1:] = 0
        steps.append(step)
    return torch.cat(steps).cumsum(0).to(device)


def dense_mask(blocks: Tensor, real: Tensor) -> Tensor:
    """Who may see whom.

    Args:
        blocks: `[L]`, see `block_numbers`.
        real: `[B, L]` bool, False at padding.

    Returns:
        `[B, 1, L, L]` bool, rows are queries. Padding sees itself, so that no row is empty (its softmax would
        be undefined); nobody else sees padding.
    """
    allowed = (blocks[:, None] >= blocks) & real[:, None, :]
    allowed |= torch.eye(len(blocks), dtype=torch.bool, device=blocks.device)
    return allowed[:, None]


def flex_mask(blocks: Tensor, real: Tensor) -> BlockMask:
    """The same as `dense_mask` for FlexAttention, which skips what is hidden instead of computing it."""

    def allowed(b, h, q, k):
        return ((blocks[q] >= blocks[k]) & real[b, k]) | (q == k)

    rows, length = real.shape
    return create_block_mask(allowed, rows, None, length, length, device=str(blocks.device))
