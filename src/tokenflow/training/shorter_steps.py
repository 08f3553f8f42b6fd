"""What a step of a chat model need not compute: beginnings that conversations share, and patches left out.

What is notable:
- a batch's common beginning, such as a template's system prompt, is a third of a short conversation. It is
  computed once, and what it gives the others is its keys and values, with gradients: the losses are the same;
- patch dropout leaves out some of a picture's features, as FLIP (Li et al. 2023) does of a vision tower's
  patches. Those that stay keep the positions that they have among all of them, and so does the text after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def can_share(config: PreTrainedConfig) -> bool:
    """Whether all layers of a language model keep plain keys and values, which can be handed on."""
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def shared_beginning(ids: Tensor, used: Tensor) -> int:
    """How many positions at the start of ids `[B, T]` are equal in all rows, and `used` `[B, T]` in none."""
    ends = (ids != ids[:1]).any(0) | used.any(0)
    return int(ends.int().argmax()) if len(ids) > 1 and ends.any() else 0


def learned_logits(model: Any, inputs: dict[str, Any], learned: Tensor, shared: int) -> Tensor:
    """Logits `[n, V]` float32 of the n learned positions `[B, T]`, the first `shared` ones computed once."""
    inputs = {"use_cache": False, **inputs}
    if shared:
        ids = inputs["input_ids"]
        first = model(input_ids=ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
        first.batch_repeat_interleave(len(ids))
        inputs |= {"input_ids": ids[:, shared:], "past_key_values": first, "use_cache": True}
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, shared:]
    return model(**inputs, logits_to_keep=learned[:, shared:]).logits.float()


def drop_patches(features: Tensor, count: int, pictured: Tensor) -> dict[str, Tensor]:
    """`count` features of each picture, others for each, at random; and where all positions of a batch lie.

    Args:
        features: `[P, N, D]`, of the batch's pictures in order.
        pictured: `[B, T]`, the places of the features that stay, `count` for each picture.

    Returns:
        `pixel_values` `[P, count, D]`, in their order, and `position_ids` `[B, T]`.
    """
    pictures, whole, _ = features.shape
    chosen = torch.rand(pictures, whole, device=features.device).topk(count).indices.sort().values
    kept = features.gather(1, chosen[:, :, None].expand(-1, -1, features.shape[2]))
    steps = torch.ones_like(pictured, dtype=torch.long)
    steps[:, 0] = 0
    # From each place to the next; what is missing behind a picture's last feature comes before the next.
    rows, columns = pictured.nonzero().view(pictures, count, 2)[:, -1].unbind(1)
    inside = columns + 1 < pictured.shape[1]
    steps[pictured] += chosen.diff(dim=1, prepend=chosen.new_full((pictures, 1), -1)).flatten() - 1
    steps[rows[inside], columns[inside] + 1] += (whole - 1 - chosen[:, -1])[inside]
    return {"pixel_values": kept, "position_ids": steps.cumsum(1)}
