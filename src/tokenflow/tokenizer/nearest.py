"""Exact nearest-code search: for each query the index of the code with the largest score.

`nearest_code(q, c, b)` is argmax_k q . c_k + b_k with fp32 inputs, and "exact" means: as if every score
were computed in fp64 in one fixed order (products of two fp32 values are exact there), the lowest index
winning ties. Rounded scores alone cannot promise that: equal rows of a codebook get unequal fp32 scores
from a blocked product. So each backend only *screens*: it drops the codes that provably cannot win and
re-scores the rest.

Why dropping is safe. Let s_k be the true score of code k, r_k the rounded one, |r_k - s_k| <= e for all k,
and w the winner. Then r_w >= s_w - e >= s_k - e >= r_k - 2e for every k, hence r_w >= max_k r_k - 2e:
whatever lies more than 2e under the rounded maximum is no candidate. The bounds e, for rows of n entries,
||.|| the 2-norm:

- fp32: e = g_n ||q|| ||c||, g_n = n u / (1 - n u), u = 2^-24, for any order of summation, with or without
  fused multiply-add (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1, and
  Cauchy-Schwarz).
- bf16: q = q' + dq, c = c' + dc with q', c' in bf16, so |q.c - q'.c'| <= ||dq|| ||c|| + ||q'|| ||dc||,
  where the norms of the residuals are computed, not estimated; plus fp32 accumulation, plus one rounding to
  bf16.

Both get a little slack for the rounding of the bounds themselves and for underflow, also if flushed to
zero.

The blocked search keeps, of each block of scores, only the maximum of every 32 consecutive codes, which
vectorises where a maximum with its index does not; the index comes from re-scoring the groups that survive
(one or two a query). Where the processor has bf16 products, they screen several times faster than fp32
ones.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, cast

import torch
from torch import Tensor

from tokenflow.errors import UserError

Backend = Literal["auto", "dense", "blocked", "faiss", "triton"]

GROUP = 32  # codes that share one screened maximum
QUERY_BLOCK = 2048
SCORE_BYTES = {"cpu": 2**23, "cuda": 2**26}  # of scores that exist at a time; a CPU has them in its caches
PAIR_BLOCK = 2048  # (query, group) pairs re-scored at a time
DENSE_LIMIT = 2**24  # scores that the oracle agrees to compute
FAISS_NEIGHBOURS = 8
TINY = 2.0**-126  # smallest normal fp32 value: what one flushed operation can lose
HUGE = 1e37  # above this a product of norms may overflow in fp32, and nothing is screened


@dataclass(frozen=True)
class PreparedCodes:
    """A codebook made ready for many searches by `prepare_codes`. A bias is one more column of the codes."""

    num_codes: int
    codes: Tensor  # [K', D'] fp32 contiguous, K' a multiple of GROUP (the last row repeated: it loses ties)
    has_bias: bool
    norm: Tensor  # [] largest row norm
    bf16_codes: Tensor | None  # [K', D'] where the processor multiplies bf16 faster than fp32
    bf16_error: Tensor | None  # [] largest norm of a row of `codes - bf16_codes`


@torch.no_grad()
def prepare_codes(codes: Tensor, bias: Tensor | None = None) -> PreparedCodes:
    """Does once per codebook what every search with it needs. Call it again when the codes have changed.

    Args:
        codes: `[K, D]`, any floating dtype, cast to fp32.
        bias: `[K]` or None, added to the scores.

    Raises:
        UserError: no codes, a shape that does not fit, or values that are not finite (or above 1e18).
    """
    if codes.ndim != 2 or len(codes) == 0:
        raise UserError(f"codes must be [K, D] with K >= 1, got {list(codes.shape)}")
    if bias is not None and bias.shape != codes.shape[:1]:
        raise UserError(f"bias must be [{len(codes)}] like the codes, got {list(bias.shape)}")
    rows = codes.detach().float()
    if bias is not None:
        rows = torch.cat([rows, bias.detach().to(rows)[:, None]], dim=1)
    if missing := -len(rows) % GROUP:
        rows = torch.cat([rows, rows[-1:].expand(missing, -1)])
    rows = rows.contiguous()
    norm = _norms(rows).amax()
    if not bool(norm < 1e18):
        raise UserError("codes and bias must be finite and below 1e18: look for a step that diverged")
    if not _has_fast_bf16(rows.device):
        return PreparedCodes(len(codes), rows, bias is not None, norm, None, None)
    bf16 = rows.bfloat16()
    lost = [_norms(a - b).amax() for a, b in zip(rows.split(8192), bf16.split(8192), strict=True)]
    return PreparedCodes(len(codes), rows, bias is not None, norm, bf16, torch.stack(lost).amax())


@torch.no_grad()
def nearest_code(
    queries: Tensor, codes: Tensor | PreparedCodes, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """For each query the index of the code with the largest `queries . codes + bias`; all backends agree.

    For the least Euclidean distance give `bias = -0.5 * codes.square().sum(1)`, or none for unit rows.

    Args:
        queries: `[N, D]`, any floating dtype, cast to fp32; autocast does not act here. N may be 0.
        codes: `[K, D]`, or the result of `prepare_codes` where many searches share a codebook.
        bias: `[K]` or None; given to `prepare_codes` instead when that is used.
        backend: "auto" is what the environment variable TOKENFLOW_NEAREST names, or else "triton" on CUDA
            where Triton and a C compiler are installed, "blocked" elsewhere. "faiss" needs the extra of that
            name and a CPU. "dense" is the oracle of the tests: slow, and limited in size.

    Returns:
        `[N]` int64 on the device of the queries, the lowest index among equal scores. A query with a NaN or
        an infinity is treated as zero, so it gets the code with the largest bias, or 0.

    Raises:
        UserError: shapes that do not fit, codes that are not finite, too large a problem for "dense", or a
            backend that does not run on the device of the queries.
    """
    with torch.autocast(queries.device.type, enabled=False):
        if isinstance(codes, Tensor):
            codes = prepare_codes(codes, bias)
        elif bias is not None:
            raise UserError("the codes are prepared: give the bias to prepare_codes, not to nearest_code")
        width = codes.codes.shape[1] - codes.has_bias
        if queries.ndim != 2 or queries.shape[1] != width:
            raise UserError(f"queries must be [N, {width}] like the codes, got {list(queries.shape)}")
        queries = queries.detach().float()
        peak = queries.abs().amax(1) if width else queries.new_zeros(len(queries))
        live = (peak > 0) & (peak < torch.inf)
        if bool(live.all()):
            return _search(queries, codes, backend)
        # All scores of a zero query are equal: no screen can help, and none is needed.
        fallback = codes.codes[: codes.num_codes, -1].argmax() if codes.has_bias else 0
        index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device) + fallback
        index[live] = _search(queries[live], codes, backend)
        return index


def _search(queries: Tensor, codes: PreparedCodes, backend: Backend) -> Tensor:
    if len(queries) == 0:
        return torch.empty(0, dtype=torch.int64, device=queries.device)
    if codes.has_bias:
        queries = torch.nn.functional.pad(queries, (0, 1), value=1.0)
    queries = queries.contiguous()
    if backend == "auto":
        default = "triton" if queries.is_cuda and _has_triton() else "blocked"
        backend = cast(Backend, os.environ.get("TOKENFLOW_NEAREST", default))
    if backend == "blocked":
        return _blocked(queries, codes)
    if backend == "dense":
        return _dense(queries, codes)
    if backend == "faiss":
        return _faiss(queries, codes)
    if backend == "triton":
        return _triton(queries, codes)
    raise UserError(f'unknown backend "{backend}": one of auto, blocked, dense, faiss, triton')


def exact_scores(queries: Tensor, codes: Tensor) -> Tensor:
    """fp64 dot products of paired fp32 rows `[..., D]`, summed by halving: the same bits on every machine."""
    terms = queries.double() * codes.double()
    while (width := terms.shape[-1]) > 1:
        half = (width + 1) // 2
        head, tail = terms[..., :half], terms[..., half:]
        terms = head + torch.nn.functional.pad(tail, (0, half - tail.shape[-1]))
    return terms[..., 0]


# Below, queries are [N, D'] fp32, contiguous, N >= 1, and end in a column of ones where there is a bias.


def _dense(queries: Tensor, codes: PreparedCodes) -> Tensor:
    """The oracle: every score in fp64, no screen."""
    rows = codes.codes[: codes.num_codes]
    if len(queries) * len(rows) > DENSE_LIMIT:
        raise UserError(
            f'backend "dense" is a test oracle for at most {DENSE_LIMIT:,} scores, got '
            f'{len(queries):,} queries x {len(rows):,} codes: use "auto"'
        )
    step = max(1, 2**22 // rows.numel())
    return torch.cat([exact_scores(part[:, None], rows).max(dim=1).indices for part in queries.split(step)])


def _blocked(queries: Tensor, codes: PreparedCodes) -> Tensor:
    found = []
    fast = codes.bf16_codes is not None
    for block in queries.split(QUERY_BLOCK):
        survivors = _bf16_screen(block, codes) if fast else None
        if survivors is None:
            fast = (
                False  # what defeats it in one block (crowded codes, negative maxima) seldom spares the next
            )
            survivors = _fp32_screen(block, codes)
        found.append(_rescore(block, codes, survivors))
    return torch.cat(found)


def _fp32_screen(queries: Tensor, codes: PreparedCodes) -> Tensor:
    """`[P, 2]` int64: the (group, query) pairs that may hold a winner, sorted."""
    best = _group_maxima(codes.codes, queries.T.contiguous())
    floor = best.amax(0) - _fp32_window(queries, codes, _product_rounding(queries.device))
    return (~(best < floor)).nonzero()  # not >=: a floor that is NaN keeps all


def _bf16_screen(queries: Tensor, codes: PreparedCodes) -> Tensor | None:
    """The same, several times faster, or None where bf16 does not separate the codes."""
    assert codes.bf16_codes is not None
    assert codes.bf16_error is not None
    rounded = queries.bfloat16()
    # The bits of positive bf16 values order like integers, and int16 maxima are far faster than bf16 ones.
    # Negative ones order the other way round, which is harmless as long as the floor is positive.
    bits = _group_maxima(codes.bf16_codes, rounded.T.contiguous())
    top = bits.amax(0).view(torch.bfloat16).float()

    width = queries.shape[1]
    norm, kept, lost = _norms(queries), _norms(rounded), _norms(queries - rounded)
    error = lost * codes.norm + kept * (codes.bf16_error + width * 2.0**-22 * (codes.norm + codes.bf16_error))
    error = 1.01 * error + 4 * width * TINY * (1 + norm + codes.norm)
    floor = top * (1 - 2.0**-8) - 2 * error  # the smallest score that rounds to the maximum, less the window
    if not bool(((floor > 0) & (norm * codes.norm < HUGE)).all()):
        return None
    floor_bits = (floor.view(torch.int32) >> 16).short()  # truncated to bf16, so rounded down
    survivors = (bits >= floor_bits).nonzero()
    crowd = len(queries) * max(4, len(codes.codes) // 4096)
    return survivors if len(survivors) <= crowd else None


def _group_maxima(codes: Tensor, queries: Tensor) -> Tensor:
    """Largest score of each group, `[K', D'] x [D', N] -> [K' / GROUP, N]`; bf16 ones as int16 bits."""
    n = queries.shape[1]
    budget = SCORE_BYTES.get(queries.device.type, 2**23) // codes.element_size()
    step = max(GROUP, budget // n // GROUP * GROUP)
    scores = codes.new_empty(min(step, len(codes)), n)
    comparable = scores.view(torch.int16) if scores.dtype == torch.bfloat16 else scores
    best = comparable.new_empty(len(codes) // GROUP, n)
    for low in range(0, len(codes), step):
        size = min(step, len(codes) - low)
        torch.mm(codes[low : low + size], queries, out=scores[:size])
        groups = slice(low // GROUP, (low + size) // GROUP)
        torch.amax(comparable[:size].view(-1, GROUP, n), dim=1, out=best[groups])
    return best


def _rescore(queries: Tensor, codes: PreparedCodes, survivors: Tensor) -> Tensor:
    """The winners `[N]` among the surviving (group, query) pairs `[P, 2]`: fp32, then near ties in fp64."""
    grouped = codes.codes.view(-1, GROUP * queries.shape[1])
    window = _fp32_window(queries, codes)
    top = torch.full_like(window, -torch.inf)
    best = torch.full_like(window, -torch.inf, dtype=torch.float64)
    index = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for pairs in survivors.split(PAIR_BLOCK):
        group, query = pairs.unbind(1)
        near = grouped.index_select(0, group).view(len(group), GROUP, -1)
        scores = near.mul_(queries.index_select(0, query)[:, None]).sum(-1)
        top.scatter_reduce_(0, query, scores.amax(1), "amax")
        pair, slot = (~(scores < (top - window)[query][:, None])).nonzero(as_tuple=True)
        code, query = group[pair] * GROUP + slot, query[pair]
        _keep_best(best, index, query, code, exact_scores(queries[query], codes.codes[code]))
    return index


def _keep_best(best: Tensor, index: Tensor, query: Tensor, code: Tensor, score: Tensor) -> None:
    """Merges candidates (query, code, score), each `[C]`, into `best`, `index` `[N]`; low codes win ties."""
    previous = best.clone()
    best.scatter_reduce_(0, query, score, "amax")
    index.masked_fill_(best > previous, torch.iinfo(torch.int64).max)
    wins = score == best[query]
    index.scatter_reduce_(0, query[wins], code[wins], "amin")


def _faiss(queries: Tensor, codes: PreparedCodes) -> Tensor:
    """Top-k of faiss, re-scored; where even the k-th neighbour is within the window, the blocked search."""
    if queries.device.type != "cpu":
        raise UserError('backend "faiss" runs on the CPU only: use "auto"')
    import faiss

    rows = codes.codes[: codes.num_codes]
    k = min(FAISS_NEIGHBOURS, len(rows))
    values, neighbours = faiss.knn(queries.numpy(), rows.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    scores, candidates = torch.from_numpy(values), torch.from_numpy(neighbours)
    floor = scores[:, 0] - _fp32_window(queries, codes)
    complete = (scores[:, -1] < floor) | torch.full_like(floor, k == len(rows), dtype=torch.bool)
    index = torch.empty(len(queries), dtype=torch.int64)
    if not bool(complete.all()):
        index[~complete] = _blocked(queries[~complete], codes)
    if bool(complete.any()):
        exact = exact_scores(queries[complete][:, None], rows[candidates[complete]])
        winners = exact == exact.amax(1, keepdim=True)
        index[complete] = candidates[complete].masked_fill(~winners, len(rows)).amin(1)
    return index


def _triton(queries: Tensor, codes: PreparedCodes) -> Tensor:
    """Top two of the fused kernel; where the second is within the window, the blocked search."""
    if not queries.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        raise UserError(f'backend "triton" needs a CUDA device, and the queries are on {queries.device.type}')
    from tokenflow.tokenizer.nearest_triton import top_two

    first, index, second = top_two(queries, codes.codes[: codes.num_codes])
    unsure = ~(second < first - _fp32_window(queries, codes))
    if bool(unsure.any()):
        index[unsure] = _blocked(queries[unsure], codes)
    return index


def _norms(rows: Tensor) -> Tensor:
    """Upper bounds of the row norms, `[N, D] -> [N]`; the last term covers squares that underflow."""
    return torch.linalg.vector_norm(rows.float(), dim=1) * (1 + 1e-4) + rows.shape[1] ** 0.5 * 2.0**-63


def _fp32_window(queries: Tensor, codes: PreparedCodes, rounding: float = 0.0) -> Tensor:
    """`[N]`: 2e of the module's docstring for fp32 scores of inputs that were rounded by `rounding`."""
    terms = queries.shape[1] + 4
    gamma = terms * 2.0**-24 / (1 - terms * 2.0**-24) + rounding * (2 + rounding)
    norm = _norms(queries)
    error = gamma * norm * codes.norm + 4 * terms * TINY * (1 + norm + codes.norm)
    return torch.where(norm * codes.norm < HUGE, 2.02 * error, torch.inf)


def _product_rounding(device: torch.device) -> float:
    """How much fp32 products round their inputs: nothing, unless the user allows TF32 or bf16 for speed."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return {"tf32": 2.0**-10, "bf16": 2.0**-8}.get(backend.matmul.fp32_precision, 0.0)


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def _has_triton() -> bool:
    """Whether Triton is here with the C compiler that its launchers are built by on first use."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return find_spec("triton") is not None and compiler is not None
