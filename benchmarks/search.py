"""Nearest-code search against two distance matrices, an argmin and a one-hot product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, best_seconds, extra_mebibytes
from tokenflow.tokenizer.nearest import nearest_code, prepare_codes

SEMANTIC, PIXEL = 32, 8
QUERIES = 6536  # 8 images of 817 tokens


def vectors(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries `[n, 40]` and codes `[k, 40]` with unit semantic and pixel parts."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        parts = (torch.randn(rows, d, generator=generator) for d in (SEMANTIC, PIXEL))
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)

    return unit(n), unit(k)


def naive_search(queries: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook form: `[N, K]` distances of each flow, argmin of their sum, a one-hot product."""
    sides = (SEMANTIC, PIXEL)
    semantic, pixel = (
        z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T
        for z, e in zip(queries.split(sides, 1), codes.split(sides, 1), strict=True)
    )
    distance = semantic + pixel
    index = distance.argmin(1)
    one_hot = torch.zeros_like(distance).scatter_(1, index[:, None], 1)
    return index, one_hot @ codes


def our_search(queries: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    index = nearest_code(queries, prepare_codes(codes))
    return index, F.embedding(index, codes)


def bare_product(queries: Tensor, codes: Tensor) -> None:
    """All scores in fp32, in blocks that stay in the caches, and nothing done with them."""
    out = torch.empty(4096, 256)
    for block in queries.split(256):
        for rows in codes.split(4096):
            torch.mm(rows, block.T, out=out[: len(rows), : len(block)])


def memory_task(search: Callable, n: int, k: int) -> Callable[[], object]:
    torch.set_num_threads(2)
    queries, codes = vectors(n, k)
    search(*vectors(64, 512))  # what a first call loads stays out of the figure
    return lambda: search(queries, codes)


def run(repeats: int) -> list[Row]:
    rows = []

    def sides(queries: Tensor, codes: Tensor) -> dict[str, float]:
        return best_seconds(
            repeats,
            ours=lambda: our_search(queries, codes),
            product=lambda: bare_product(queries, codes),
            naive=lambda: naive_search(queries, codes),
        )

    # At K = 131,072 the naive form takes 19 GiB for all queries: compare both at a quarter of them.
    for k, n in ((32768, QUERIES), (131072, QUERIES // 4)):
        queries, codes = vectors(n, k)
        naive_index = naive_search(queries, codes)[0]
        equal = (our_search(queries, codes)[0] == naive_index).double().mean().item()
        times = sides(queries, codes)
        size = f"N={n:,} K={k:,}"
        rows.append(
            Row(f"search time, {size}", times, times["naive"] / times["ours"], 30, f"{equal:.4%} equal")
        )
        share, note = times["product"] / times["ours"], "above 1: faster than the fp32 product alone"
        rows.append(Row(f"search against the bare product, {size}", times, share, 1 / 1.5, note))
        ours, naive = (extra_mebibytes(memory_task, side, n, k) for side in (our_search, naive_search))
        rows.append(
            Row(f"search memory, {size}", {}, naive / ours, 50, f"{ours:,.0f} against {naive:,.0f} MiB")
        )
    return rows
