"""SharedMappingQuantizer: several codebooks, one index (Sec. 3.2, Eq. 1 to 3).

Notable: the weighted sum of the flows' distances is one inner product of concatenated vectors, so any
number of flows costs one nearest-code search; codes learn by gradient or by EMA; usage, EMA and k-means see
the batches of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenflow.tokenizer.nearest import PreparedCodes, nearest_code, prepare_codes

ENTROPY_CHUNK = 2**22  # vectors x codes whose probabilities are held at a time


@dataclass
class QuantizerOutput:
    """Attributes:
    quantized: `[B, D, h, w]`, in training with straight-through gradients to the (normalised) input.
    indices: `[B, h * w]` int64, row-major.
    losses: `vq`, `commitment` and, if its weight is not 0, `entropy`; empty in eval mode.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class CodeUsage(nn.Module):
    """The last `window` indices that all processes chose, to tell which share of the codes is alive."""

    def __init__(self, window: int):
        super().__init__()
        self.register_buffer("recent", torch.full((window,), -1, dtype=torch.int32), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    recent: Tensor
    seen: Tensor

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        new = gather_all(indices.flatten()).to(torch.int32)[-len(self.recent) :]
        slots = (self.seen + torch.arange(len(new), device=new.device)) % len(self.recent)
        self.recent[slots] = new
        self.seen += len(new)

    @property
    def windows(self) -> int:
        """How many whole windows have passed."""
        return int(self.seen) // len(self.recent)

    def used(self, codebook_size: int) -> Tensor:
        """Which codes the window holds, `[codebook_size]` bool."""
        held = self.recent[self.recent >= 0].long()
        used = torch.zeros(codebook_size, dtype=torch.bool, device=held.device)
        used[held] = True
        return used

    def fraction(self, codebook_size: int) -> float:
        """Distinct recent codes over min(codebook size, indices in the window)."""
        held = int((self.recent >= 0).sum())
        return self.used(codebook_size).sum().item() / max(1, min(codebook_size, held))


class SharedMappingQuantizer(nn.Module):
    """One index per vector, chosen by `argmin_i sum_f weight_f * |z_f - e_f,i|^2` over the flows f.

    Args:
        flows: `(name, dim, weight)` of each flow; their order is the order of channels.
        codebook_size: K.
        l2_norm: compare and return l2-normalised vectors; their norm is 1 in each flow.
        commitment_weight: beta.
        entropy_weight, entropy_temperature: weight 0 skips the entropy loss.
        init: `"uniform"`, or `"kmeans"` (call `initialize` with the first batch's vectors).
        update: `"gradient"` (the VQ loss) or `"ema"` with `ema_decay`.
        usage_window: how many recent indices `usage` remembers.
    """

    def __init__(
        self,
        flows: Sequence[tuple[str, int, float]],
        codebook_size: int,
        l2_norm: bool = True,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        init: str = "uniform",
        update: str = "gradient",
        ema_decay: float = 0.99,
        usage_window: int = 131072,
    ):
        super().__init__()
        self.names = [name for name, _, _ in flows]
        self.dims = [dim for _, dim, _ in flows]
        self.weights = [weight for _, _, weight in flows]
        self.codebook_size, self.l2_norm = codebook_size, l2_norm
        self.commitment_weight = commitment_weight
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.init, self.update, self.ema_decay = init, update, ema_decay
        self.codebooks = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(codebook_size, dim), update == "gradient")
                for name, dim, _ in flows
            }
        )
        self.usage = CodeUsage(usage_window)
        if update == "ema":
            self.register_buffer("cluster_size", torch.zeros(codebook_size))
        if init == "kmeans":
            self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._prepared: tuple[tuple, PreparedCodes] | None = None
        self.reset_parameters()

    cluster_size: Tensor
    initialized: Tensor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for codebook in self.codebooks.values():
            nn.init.uniform_(codebook, -1 / self.codebook_size, 1 / self.codebook_size)
            if self.l2_norm:
                codebook.copy_(F.normalize(codebook, dim=-1))

    # vectors and codes
    def normalize(self, z: Tensor) -> Tensor:
        """Each flow's part of `[..., D]` to unit length (if `l2_norm`)."""
        if not self.l2_norm:
            return z
        return torch.cat([F.normalize(part, dim=-1) for part in z.split(self.dims, dim=-1)], dim=-1)

    def codes(self) -> Tensor:
        """The codes of all flows, `[K, D]`, normalised if `l2_norm`; differentiable."""
        return self.normalize(torch.cat([self.codebooks[name] for name in self.names], dim=-1))

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors `[..., D]` of `indices` `[...]`."""
        rows = [F.embedding(indices, self.codebooks[name]) for name in self.names]
        return self.normalize(torch.cat(rows, dim=-1))

    def prepare(self) -> PreparedCodes:
        """The codes as the search wants them, made again only after a codebook has changed."""
        codebooks = list(self.codebooks.values())
        # Versions miss writes through `.data`, as EMA helpers do them; inference tensors have none at all.
        sums = torch.stack([p.detach().sum() for p in codebooks]).tolist()
        key = tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version, p.device, total)
            for p, total in zip(codebooks, sums, strict=True)
        )
        if self._prepared is None or self._prepared[0] != key:
            with torch.no_grad():
                codes = self.codes()
                self._prepared = (key, prepare_codes(codes, self._bias(codes)))
        return self._prepared[1]

    def forget_prepared(self) -> None:
        """Make the next search look at the codebooks anew: fused optimizers do not raise their version."""
        self._prepared = None

    def train(self, mode: bool = True) -> SharedMappingQuantizer:
        self.forget_prepared()
        return super().train(mode)

    def _weigh(self, z: Tensor) -> Tensor:
        """Multiply each flow's part of `[..., D]` by the flow's weight."""
        if all(weight == 1.0 for weight in self.weights):
            return z
        return torch.cat(
            [part * w for part, w in zip(z.split(self.dims, dim=-1), self.weights, strict=True)], dim=-1
        )

    def _bias(self, codes: Tensor) -> Tensor | None:
        # argmin w |z - e|^2 = argmax w z.e - w |e|^2 / 2, whose second term unit-length codes share
        return None if self.l2_norm else -0.5 * self._weigh(codes.square()).sum(-1)

    def search(self, z: Tensor) -> Tensor:
        """Indices `[N]` of normalised vectors `[N, D]`; exact in float32, ties to the lowest index."""
        return nearest_code(self._weigh(z), self.prepare())

    # forward
    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize a map `[B, D, h, w]`."""
        b, _, h, w = z.shape
        vectors = self.normalize(z.movedim(1, -1).flatten(0, 2).float())  # [N, D]
        indices = self.search(vectors.detach())
        quantized = self.lookup(indices)
        losses: dict[str, Tensor] = {}
        if self.training:
            losses["commitment"] = self.commitment_weight * F.mse_loss(vectors, quantized.detach())
            if self.update == "gradient":
                losses["vq"] = F.mse_loss(quantized, vectors.detach())
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * self.entropy_loss(vectors)
            self.usage.update(indices)
            if self.update == "ema":
                self._ema_step(vectors.detach(), indices)
            quantized = vectors + (quantized - vectors).detach()  # straight-through
        return QuantizerOutput(quantized.view(b, h, w, -1).movedim(-1, 1), indices.view(b, h * w), losses)

    def entropy_loss(self, vectors: Tensor) -> Tensor:
        """Mean entropy of the soft assignments minus the entropy of their mean; `[N, D]` to a scalar.

        Probabilities are held for a chunk of vectors at a time and computed again in the backward pass.
        """
        codes, n = self.codes(), len(vectors)

        def chunk_sums(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
            distance = sum(
                w * (a.square().sum(-1, keepdim=True) + e.square().sum(-1) - 2 * a @ e.T)
                for a, e, w in zip(
                    z.split(self.dims, -1), codes.split(self.dims, -1), self.weights, strict=True
                )
            )
            return entropy_sums(-distance / self.entropy_temperature)

        entropy, mean_p = vectors.new_zeros(()), vectors.new_zeros(self.codebook_size)
        for z in vectors.split(max(1, ENTROPY_CHUNK // self.codebook_size)):
            h, p = checkpoint(chunk_sums, z, codes, use_reentrant=False)
            entropy, mean_p = entropy + h / n, mean_p + p / n
        return entropy + (mean_p * (mean_p + 1e-5).log()).sum()

    @torch.no_grad()
    def distance_norms(self, vectors: Tensor) -> dict[str, Tensor]:
        """Mean over vectors `[N, D]` of the sum over codes of the squared distance, per flow: how far the
        flows' codes spread, which the released code logs. In closed form, without an N x K matrix; needs
        `l2_norm`."""
        out, k = {}, self.codebook_size
        for name, z, e in zip(
            self.names,
            vectors.double().split(self.dims, -1),
            self.codes().double().split(self.dims, -1),
            strict=True,
        ):
            # d = 2 - 2 z.e, so sum_k d^2 = 4 (K - 2 z.sum(e) + z' (e'e) z)
            out[name] = 4 * (k - 2 * z @ e.sum(0) + ((z @ (e.T @ e)) * z).sum(-1)).mean()
        return out

    # learning without gradients
    @property
    def wants_initialization(self) -> bool:
        return self.training and self.init == "kmeans" and not bool(self.initialized)

    @torch.no_grad()
    def initialize(self, vectors: Tensor, iterations: int = 10) -> None:
        """Set the codes to k-means centres of all processes' vectors `[N, D]` (weighted by flow, jointly)."""
        samples = gather_all(self.normalize(vectors.float()))
        start = draw_means(samples, self.codebook_size)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(start, src=0)

        def assign(x: Tensor, means: Tensor) -> Tensor:
            return nearest_code(self._weigh(x), means, -0.5 * self._weigh(means.square()).sum(-1))

        means, bins = kmeans(samples, start, iterations, assign, self.normalize)
        self._set_codes(means)
        if self.update == "ema":
            self.cluster_size.copy_(bins)
        self.initialized.fill_(True)

    @torch.no_grad()
    def restart_dead(self, vectors: Tensor) -> None:
        """Move the codes that the usage window does not hold to random rows of `[N, D]`; at most N of them.

        All processes move the same codes to the first process's vectors.
        """
        dead = (~self.usage.used(self.codebook_size)).nonzero().squeeze(1)
        rows = torch.randperm(len(vectors), device=vectors.device)[: len(dead)]
        fresh = self.normalize(vectors.float())[rows]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(fresh, src=0)
        codes = self.codes().detach().clone()
        codes[dead[: len(fresh)]] = fresh
        self._set_codes(codes)
        if self.update == "ema":
            self.cluster_size[dead[: len(fresh)]] = 0

    @torch.no_grad()
    def _ema_step(self, vectors: Tensor, indices: Tensor) -> None:
        count = torch.zeros_like(self.cluster_size).index_add_(
            0, indices, torch.ones_like(indices, dtype=torch.float32)
        )
        total = vectors.new_zeros(self.codebook_size, vectors.shape[1]).index_add_(0, indices, vectors)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.cluster_size.lerp_(count, 1 - self.ema_decay)
        codes = self.codes()
        mean = torch.where(count[:, None] > 0, self.normalize(total / count[:, None].clamp(min=1)), codes)
        self._set_codes(self.normalize(codes.lerp(mean, 1 - self.ema_decay)))

    def _set_codes(self, codes: Tensor) -> None:
        for name, part in zip(self.names, codes.split(self.dims, -1), strict=True):
            self.codebooks[name].copy_(part)


def entropy_sums(affinity: Tensor) -> tuple[Tensor, Tensor]:
    """For logits `[N, K]`: the sum of the rows' softmax entropies, and of their probabilities `[K]`."""
    log_p = affinity.log_softmax(-1)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)


def draw_means(samples: Tensor, k: int) -> Tensor:
    """k rows of `[N, D]` at random; with replacement only if there are fewer than k."""
    n = len(samples)
    rows = torch.randperm(n)[:k] if n >= k else torch.randint(n, (k,))
    return samples[rows.to(samples.device)].contiguous()


def kmeans(
    samples: Tensor,
    means: Tensor,
    iterations: int,
    assign: Callable[[Tensor, Tensor], Tensor],
    normalize: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from given means `[K, D]`; an empty cluster keeps its mean.

    Returns:
        the means `[K, D]` and how many of the samples `[N, D]` the last assignment gave to each, `[K]`.
    """
    bins = samples.new_zeros(len(means))
    for _ in range(iterations):
        index = assign(samples, means)
        bins = torch.zeros_like(bins).index_add_(0, index, samples.new_ones(len(samples)))
        total = torch.zeros_like(means).index_add_(0, index, samples)
        new = normalize(total / bins[:, None].clamp(min=1))
        means = torch.where(bins[:, None] > 0, new, means)
    return means, bins


def gather_all(x: Tensor) -> Tensor:
    """Rows of all processes, concatenated; `x` itself in a single one. Every process gives as many."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
