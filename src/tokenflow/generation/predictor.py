"""How the language model takes part in sampling: with a key-value cache, and, as the oracle, without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.generation.masks import block_numbers, dense_mask

if TYPE_CHECKING:
    from tokenflow.generation.modeling import TokenFlowForTextToImage


class ScaleCache:
    """Keys and values of all layers in buffers of fixed size.

    Unlike transformers' caches it can run a pass that sees what was kept before its scale and leaves no
    trace: a refinement. `at` says where the coming pass begins and whether it is kept.
    """

    def __init__(self, layers: int, length: int):
        self.length = length
        self.buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.start, self.keep = 0, True

    def at(self, start: int, keep: bool) -> ScaleCache:
        self.start, self.keep = start, keep
        return self

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the new positions `[R, heads, n, d]` see: those before them and their own."""
        buffers = self.buffers[layer]
        if buffers is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            buffers = self.buffers[layer] = (k.new_empty(shape), v.new_empty(shape))
        end = self.start + k.shape[2]
        if self.keep:
            for buffer, new in zip(buffers, (k, v), strict=True):
                buffer[:, :, self.start : end] = new
            return buffers[0][:, :, :end], buffers[1][:, :, :end]
        keys, values = (
            torch.cat([buffer[:, :, : self.start], new], dim=2)
            for buffer, new in zip(buffers, (k, v), strict=True)
        )
        return keys, values

    def before(self, start: int) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values up to `start`; none at the first pass."""
        return [(pair[0][:, :, :start], pair[1][:, :, :start]) for pair in self.buffers if pair is not None]


class PassCache:
    """What one compiled pass reads and leaves: views of a `ScaleCache`, and the new keys and values."""

    def __init__(self, past: list[tuple[Tensor, Tensor]]):
        self.past = past
        self.new: list[tuple[Tensor, Tensor]] = []

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.new.append((k, v))
        if not self.past:
            return k, v
        before = self.past[layer]
        return torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)


def one_pass(
    model: TokenFlowForTextToImage,
    x: Tensor,
    first: int,
    mask: Tensor,
    past: list[tuple[Tensor, Tensor]],
    n: int,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """What `model.compile_passes` compiles: no tensor that it is given changes, as CUDA graphs want.

    Returns:
        logits of the last `n` positions; the new keys and values of each layer.
    """
    cache = PassCache(past)
    hidden = model.model(x, first, mask, cache)
    return model.visual_logits(hidden[:, -n:]), cache.new


class CachedPredictor:
    """Each pass computes only its own scale's positions. Shapes depend on the scale alone.

    Args:
        model: the language model.
        input_ids: `[R, P]` prefixes without columns of padding, see `modeling.cut_padding`.
        real: `[R, P]` bool, False at padding.
        plain: whether nothing is padding, so that no mask is needed; None looks.
    """

    def __init__(
        self, model: TokenFlowForTextToImage, input_ids: Tensor, real: Tensor, plain: bool | None = None
    ):
        self.model, self.input_ids, self.real = model, input_ids, real
        total = input_ids.shape[1] - 1 + model.config.num_image_tokens
        self.cache = ScaleCache(len(model.model.layers), total)
        # Without padding nothing is hidden from a later scale, and attention without a mask is faster.
        if plain is None:
            plain = model.compiled_pass is None and bool(real.all())
        self.visible = None if plain else F.pad(real, (0, total - real.shape[1]), value=True)
        self.positions = 0

    def step(self, position: int, features: Tensor | None, keep: bool) -> Tensor:
        decoder, prefix = self.model.model, self.input_ids.shape[1]
        mask: Tensor | None
        if features is None:
            x, start = decoder.embed_prefix(self.input_ids), 0
            blocks = block_numbers(self.model.segments(prefix, 1), x.device)
            mask = dense_mask(blocks, F.pad(self.real, (0, x.shape[1] - prefix), value=True))
        else:
            x = decoder.embed_scales(features, position)
            start = prefix - 1 + decoder.offsets[position]
            mask = None if self.visible is None else self.visible[:, None, None, : start + x.shape[1]]
        self.positions += x.shape[1]
        first, n = self.model.image_start - prefix + start, decoder.scales[position] ** 2
        if self.model.compiled_pass is None:
            hidden = decoder(x, first, mask, self.cache.at(start, keep))
            return self.model.visual_logits(hidden[:, -n:])
        torch.compiler.cudagraph_mark_step_begin()  # what the pass before returned has been used
        logits, new = self.model.compiled_pass(self.model, x, first, mask, self.cache.before(start), n)
        if keep:
            self.cache.at(start, keep)
            for layer, pair in enumerate(new):
                self.cache.update(pair[0], pair[1], layer)
        return logits


class UncachedPredictor:
    """Each pass computes everything again from the prefix on; slow, simple, and what the cache must equal."""

    def __init__(self, model: TokenFlowForTextToImage, input_ids: Tensor, real: Tensor):
        self.model, self.input_ids, self.real = model, input_ids, real
        self.kept: list[Tensor] = []
        self.positions = 0

    def step(self, position: int, features: Tensor | None, keep: bool) -> Tensor:
        decoder, prefix = self.model.model, self.input_ids.shape[1]
        x = decoder.embed_prefix(self.input_ids)
        if features is not None:
            shown = [*self.kept[: position - 1], features]
            x = torch.cat([x, decoder.embed_scales(torch.cat(shown, dim=1), first=1)], dim=1)
            if keep:
                self.kept.append(features)
        blocks = block_numbers(self.model.segments(prefix, position + 1), x.device)
        mask = dense_mask(blocks, F.pad(self.real, (0, x.shape[1] - prefix), value=True))
        self.positions += x.shape[1]
        hidden = decoder(x, self.model.image_start - prefix, mask)
        return self.model.visual_logits(hidden[:, -(decoder.scales[position] ** 2) :])
