"""Fused product and running top two on CUDA: one pass over the codes, and no score leaves the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64  # queries of one program
BLOCK_K = 64  # codes of one step
PROGRAMS = 1024  # with few queries the codes are split until about this many programs run


@triton.jit
def _top_two_kernel(
    queries, codes, first, index, second, n, k, per_split,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Program (i, s): top two scores of queries i*N... over codes s*per_split..., the index of the first."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    dims = tl.arange(0, PADDED)
    low = tl.program_id(1) * per_split
    q = tl.load(
        queries + rows[:, None].to(tl.int64) * WIDTH + dims[None, :],
        mask=(rows[:, None] < n) & (dims[None, :] < WIDTH),
        other=0.0,
    )
    top = tl.full([N], float("-inf"), tl.float32)
    runner = tl.full([N], float("-inf"), tl.float32)
    where = tl.zeros([N], tl.int32)
    for start in range(low, tl.minimum(low + per_split, k), K):
        cols = start + tl.arange(0, K)
        c = tl.load(
            codes + cols[None, :].to(tl.int64) * WIDTH + dims[:, None],
            mask=(cols[None, :] < k) & (dims[:, None] < WIDTH),
            other=0.0,
        )
        scores = tl.dot(q, c, input_precision="ieee")
        scores = tl.where(cols[None, :] < k, scores, float("-inf"))
        best = tl.max(scores, axis=1)
        arg = tl.argmax(scores, axis=1)
        rest = tl.max(tl.where(tl.arange(0, K)[None, :] == arg[:, None], float("-inf"), scores), axis=1)
        runner = tl.maximum(tl.maximum(runner, rest), tl.minimum(top, best))
        where = tl.where(best > top, start + arg.to(tl.int32), where)
        top = tl.maximum(top, best)
    out = tl.program_id(1).to(tl.int64) * n + rows
    tl.store(first + out, top, mask=rows < n)
    tl.store(index + out, where, mask=rows < n)
    tl.store(second + out, runner, mask=rows < n)


def top_two(queries: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest and second largest fp32 score of each query, and the index of the largest.

    Args:
        queries, codes: `[N, D]` and `[K, D]`, fp32, contiguous, N and K at least 1, norms far from overflow.

    Returns:
        `(first [N] fp32, index [N] int64, second [N] fp32)`; `second` is -inf for K = 1. The scores carry the
        rounding error of an fp32 product: the caller decides whether `first` is certain.
    """
    n, width = queries.shape
    k = len(codes)
    blocks = triton.cdiv(n, BLOCK_N)
    splits = max(1, min(PROGRAMS // blocks, triton.cdiv(k, 8 * BLOCK_K)))
    per_split = triton.cdiv(triton.cdiv(k, splits), BLOCK_K) * BLOCK_K
    splits = triton.cdiv(k, per_split)
    first = torch.empty(splits, n, device=queries.device)
    second = torch.empty_like(first)
    index = torch.empty(splits, n, dtype=torch.int32, device=queries.device)
    _top_two_kernel[(blocks, splits)](
        queries, codes, first, index, second, n, k, per_split,
        WIDTH=width, PADDED=max(16, triton.next_power_of_2(width)), N=BLOCK_N, K=BLOCK_K,
    )  # fmt: skip
    top, split = first.max(dim=0)
    runner = torch.cat([first.scatter(0, split[None], -torch.inf), second]).amax(0)
    return top, index.gather(0, split[None])[0].long(), runner
