"""Next-scale sampling: the codes of one scale after another, several passes a scale (Sec. 3.3, Fig. 5).

Shared by the language model and the class-conditional transformer. A model takes part by offering, for one
batch of conditions, an object with a single method (see `NextScalePredictor`):

    step(position, features, keep) -> logits [R, s^2, K]

Everything else is here: the running map of codes, guidance, filters, noise, refinement passes, given tokens.

    predictor = CachedPredictor(model, input_ids, real)   # the conditions are the model's own affair
    for codes in sample_scales(predictor, model.code_table, SamplingSettings(), seeds=[0, 1]):
        ...                                               # [B, L_k]: the codes so far, after each scale

Notable: a prompt's codes depend on its seed alone. A key for each pass and position is drawn from the
prompt's own generator, and the noise of a code is a hash of that key and the code (Gumbel-max in float64). So
a code that just misses the top-k or top-p cut, because logits moved by 1e-6 with the batch, changes nothing
unless it would have been chosen; with an inverse CDF every code behind it would shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tokenflow.errors import UserError
from tokenflow.generation.codes import CodeTable, as_rows


class NextScalePredictor(Protocol):
    """One batch of conditions, between its first and its last scale. It may hold a key-value cache."""

    def step(self, position: int, features: Tensor | None, keep: bool) -> Tensor:
        """Logits of the codes of one scale.

        Args:
            position: index of the scale; 0, 1, 2, ... in order. After its first pass a scale may come again
                (refinement).
            features: `[R, s^2, D]` float32, what the scales before add up to (U_k); in a refinement, with
                this scale's own codes of the pass before (F_k). None for scale 0, which only sees the
                conditions. R is B, or 2 B with guidance: B conditional rows, then B unconditional ones.
            keep: True in the first pass of a scale, which later scales see; no pass sees a refinement.

        Returns:
            `[R, s^2, K]` float32, the K codes only.
        """
        ...


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample. Lists have one entry a pass; the first scale is always sampled in one pass.

    Attributes:
        guidance_scale: w; logits are `(1 + t) * conditional - t * unconditional`, where t rises from 0 at the
            first scale to w at the last. A model of one scale has t = w. 0 runs no unconditional rows.
        top_k: codes to keep; 0 keeps all.
        top_p: probability to keep of those; 0 (and 1) keeps all.
        temperature: divides the guided logits; 0 takes the likeliest code.

    Raises:
        UserError: values out of range, lists of different lengths.
    """

    guidance_scale: float = 7.5
    top_k: Sequence[int] = (1200, 100, 1)
    top_p: Sequence[float] = (0.8, 0.8, 0.0)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in (("top_k", int), ("top_p", (int, float))):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            high = math.inf if name == "top_k" else 1
            if not values or not all(isinstance(x, kind) and 0 <= x <= high for x in values):
                wanted = "integers from 0" if name == "top_k" else "numbers from 0 to 1"
                raise UserError(f"{name} must be {wanted}, one a pass, got {value!r}")
            object.__setattr__(self, name, values)
        if len(self.top_k) != len(self.top_p):
            raise UserError(
                f"top_k has {len(self.top_k)} entries and top_p {len(self.top_p)}; give one of each a pass"
            )
        for name in ("guidance_scale", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise UserError(f"{name} must be a number of at least 0, got {value!r}")

    @property
    def passes(self) -> int:
        return len(self.top_k)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 0

    def guidance_at(self, position: int, num_scales: int) -> float:
        """t of the scale at `position`."""
        return self.guidance_scale * (position / (num_scales - 1) if num_scales > 1 else 1.0)


@dataclass(frozen=True)
class KnownTokens:
    """Codes that are given: for in-painting, out-painting and variations.

    Attributes:
        codes: `[B, L']` integers; whole scales from the first on, not necessarily all.
        mask: `[B, L']` bool, True where the code is given; None: all of them.
    """

    codes: Tensor
    mask: Tensor | None = None

    def check(self, rows: int, table: CodeTable) -> None:
        """Raise UserError unless this fits `rows` prompts and the model's codes and scales."""
        ends = _ends(table.scales)
        if self.codes.ndim != 2 or len(self.codes) != rows or self.codes.shape[1] not in ends:
            raise UserError(
                f"known codes must be [{rows}, L], L the end of a scale ({', '.join(map(str, ends))}), "
                f"got {list(self.codes.shape)}"
            )
        if self.codes.is_floating_point() or self.codes.dtype == torch.bool:
            raise UserError(f"known codes must be integers, got {self.codes.dtype}")
        low, high = (int(x) for x in self.codes.aminmax())
        if low < 0 or high >= len(table.codes):
            raise UserError(
                f"known codes run from {low} to {high}; this codebook has 0 to {len(table.codes) - 1}"
            )
        if self.mask is None:
            return
        if self.mask.dtype != torch.bool or self.mask.shape != self.codes.shape:
            raise UserError(
                f"the mask of known codes must be {list(self.codes.shape)} bool (True: known), "
                f"got {list(self.mask.shape)} {self.mask.dtype}"
            )

    def of(self, rows: slice) -> KnownTokens:
        """The part for some of the prompts."""
        return KnownTokens(self.codes[rows], None if self.mask is None else self.mask[rows])

    def at(self, span: slice, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Codes and mask of some positions, or None where nothing is known."""
        if span.start >= self.codes.shape[1]:
            return None
        codes = self.codes[:, span].to(device, torch.int64)
        mask = (
            torch.ones_like(codes, dtype=torch.bool) if self.mask is None else self.mask[:, span].to(device)
        )
        return (codes, mask) if mask.any() else None


class ScaleStep(NamedTuple):
    """One scale of some prompts is done.

    Attributes:
        rows: which prompts of the batch.
        position: index of the scale.
        codes: `[len(rows), L_k]` int64, all their codes up to and including this scale.
    """

    rows: range
    position: int
    codes: Tensor


@torch.no_grad()
def sample_scales(
    predictor: NextScalePredictor,
    table: CodeTable,
    settings: SamplingSettings,
    seeds: Sequence[int],
    known: KnownTokens | None = None,
) -> Iterator[Tensor]:
    """Sample B images scale by scale.

    Args:
        predictor: of the B conditions; see `NextScalePredictor`.
        table: the code vectors.
        settings: see `SamplingSettings`.
        seeds: B of them.
        known: codes that are given, for these B rows.

    Yields:
        `[B, L_k]` int64, all codes up to and including scale k.
    """
    device = table.codes.device
    ends = _ends(table.scales)
    keys = noise_keys(seeds, settings.passes, ends[-1]).to(device)
    done: list[Tensor] = []
    inputs: Tensor | None = None
    features: Tensor | None
    for position, end in enumerate(ends):
        span = slice(ends[position - 1] if position else 0, end)
        given = None if known is None else known.at(span, device)
        once = position == 0 or (given is not None and bool(given[1].all()))
        t = settings.guidance_at(position, len(ends))
        features = inputs
        for index in range(1 if once else settings.passes):
            rows = None if features is None else as_rows(features)
            if rows is not None and settings.guided:
                rows = torch.cat([rows, rows])
            logits = predictor.step(position, rows, keep=index == 0)
            if settings.guided:
                conditional, unconditional = logits.chunk(2)
                logits = (1 + t) * conditional - t * unconditional
            top_k, top_p = settings.top_k[index], settings.top_p[index]
            codes = choose(logits, top_k, top_p, settings.temperature, keys[:, index, span])
            if given is not None:
                codes = torch.where(given[1], given[0], codes)
            features = table.advance(inputs, codes, position)
        done.append(codes)
        yield torch.cat(done, dim=1)
        if features is not None and position + 1 < len(ends):
            inputs = table.inputs_of(features, position + 1)


def choose(logits: Tensor, top_k: int, top_p: float, temperature: float, keys: Tensor) -> Tensor:
    """One code a position; the likeliest if `top_k` is 1 or `temperature` is 0.

    Args:
        logits: `[..., K]`.
        keys: `[...]` int64, see `noise_keys`.

    Returns:
        `[...]` int64.
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1)
    values, codes = likely_codes(logits / temperature, top_k, top_p)
    chosen = (values.double() + gumbel_noise(keys[..., None], codes)).argmax(dim=-1, keepdim=True)
    return codes.gather(-1, chosen)[..., 0]


def likely_codes(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The codes that pass both filters.

    First top-k: those not below the k-th largest logit, ties included; 0 keeps all. Then top-p of what is
    left: a code goes if it and everything less likely have at most 1 - p of the probability; the likeliest
    stays; 0 keeps all.

    Args:
        logits: `[..., K]`.

    Returns:
        Logits, -inf where a code is out, and codes, both `[..., M]` with falling logits; M suffices for the
        position with most ties.
    """
    size = logits.shape[-1]
    k = min(top_k, size) if top_k else size
    width = min(k + max(1, k // 8), size)  # in bfloat16 a few more than one are tied with the k-th
    values, codes = logits.topk(width)
    while width < size and bool((values[..., -1] == values[..., k - 1]).any()):  # more ties than were taken
        width = min(2 * width, size)
        values, codes = logits.topk(width)
    values = values.masked_fill(values < values[..., k - 1 : k], -torch.inf)
    if 0 < top_p < 1:
        probabilities = values.double().softmax(dim=-1)
        tail = probabilities.flip(-1).cumsum(-1).flip(-1)
        out = tail <= 1 - top_p
        out[..., 0] = False
        values = values.masked_fill(out, -torch.inf)
    return values, codes


# noise
def seeds_for(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """A seed a row: the same for all, each its own, or drawn (None).

    Raises:
        UserError: a list of another length, or neither list nor integer.
    """
    if seed is None:
        return torch.randint(2**32, (rows,), generator=_fresh()).tolist()
    if isinstance(seed, Integral):
        return [int(seed)] * rows
    if not isinstance(seed, Sequence):
        raise UserError(f"a seed must be an integer, or a list of one for each image, got {seed!r}")
    if len(seed) != rows:
        raise UserError(f"give one seed, or one for each of the {rows} images; got {len(seed)}")
    return list(seed)


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()  # not the global one: drawing seeds leaves the user's random state alone
    return generator


def noise_keys(seeds: Sequence[int], passes: int, length: int) -> Tensor:
    """A random number a pass and position, `[B, passes, length]` int64, each row from its own seed only.

    More passes add keys and change none.

    Raises:
        UserError: a seed is no integer that fits in 64 bits.
    """
    rows: list[Tensor] = []
    for seed in seeds:
        if not isinstance(seed, Integral) or not 0 <= seed < 2**64:
            raise UserError(f"a seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
        generator = torch.Generator().manual_seed(int(seed))
        low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
        rows.append(torch.randint(low, high, (passes, length), generator=generator))
    return torch.stack(rows)


def gumbel_noise(keys: Tensor, codes: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, that depends on nothing but key and code (int64, broadcast)."""
    x = keys + codes * -0x61C8864680B583EB  # the finaliser of SplitMix64; products wrap around
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ _shifted(x, 31)
    uniform = (_shifted(x, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _ends(scales: Sequence[int]) -> list[int]:
    return [sum(s * s for s in scales[: i + 1]) for i in range(len(scales))]
