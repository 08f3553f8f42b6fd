"""Exact nearest-code search: for each query the index of the code with the largest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenflow.errors import UserError

Backend = Literal["auto", "dense", "blocked"]
DENSE_LIMIT = 2**27  # N x K entries the oracle may build (1 GiB in fp64)
QUERY_BLOCK = 512
CODE_BLOCK = 4096


@dataclass(frozen=True)
class PreparedCodes:
    """What a search reuses between calls with the same codes: see `prepare_codes`."""

    codes: Tensor  # [K, D] fp32
    bias: Tensor | None  # [K] fp32


def prepare_codes(codes: Tensor, bias: Tensor | None = None) -> PreparedCodes:
    """Prepare `codes` [K, D] and the optional `bias` [K] for many `nearest_code` calls."""
    return PreparedCodes(codes.detach().float().contiguous(), None if bias is None else bias.detach().float())


@torch.no_grad()
def nearest_code(
    queries: Tensor, codes: Tensor | PreparedCodes, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """For each query the index of the code with the largest `queries . codes + bias`, as int64 [N]."""
    prepared = codes if isinstance(codes, PreparedCodes) else prepare_codes(codes, bias)
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.detach().float()
        if backend == "dense":
            return _dense(queries, prepared)
        return _blocked(queries, prepared)


def exact_scores(queries: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """fp64 scores of paired rows: products of fp32 values are exact in fp64, summed by halving (fixed order)."""
    terms = queries.double() * codes.double()
    while (width := terms.shape[-1]) > 1:
        half = (width + 1) // 2
        folded = terms[..., :half].clone()
        folded[..., : width - half] += terms[..., half:]
        terms = folded
    scores = terms.sum(-1)
    return scores if bias is None else scores + bias.double()


def _dense(queries: Tensor, prepared: PreparedCodes) -> Tensor:
    if len(queries) * len(prepared.codes) * queries.shape[1] > DENSE_LIMIT:
        raise UserError(
            f"the dense search is a test oracle: {len(queries)} queries x {len(prepared.codes)} codes is too large; "
            'use backend="auto"'
        )
    return exact_scores(queries[:, None], prepared.codes, prepared.bias).max(1).indices


def _blocked(queries: Tensor, prepared: PreparedCodes) -> Tensor:
    out = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), QUERY_BLOCK):
        q = queries[start : start + QUERY_BLOCK]
        best = q.new_full((len(q),), -torch.inf, dtype=torch.float64)
        index = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        for low in range(0, len(prepared.codes), CODE_BLOCK):
            c = prepared.codes[low : low + CODE_BLOCK].double()
            scores = q.double() @ c.T
            if prepared.bias is not None:
                scores += prepared.bias[low : low + CODE_BLOCK]
            value, where = scores.max(1)
            better = value > best
            best = torch.where(better, value, best)
            index = torch.where(better, where + low, index)
        out[start : start + QUERY_BLOCK] = index
    return out
