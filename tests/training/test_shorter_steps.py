"""What steps of a chat model leave out, and that it changes nothing but what it should."""

from __future__ import annotations

import torch
from transformers import FalconH1Config, Gemma3TextConfig, Lfm2Config, LlamaConfig, MistralConfig

from tokenflow.training.shorter_steps import can_share, drop_patches, shared_beginning


def test_how_much_of_a_beginning_is_shared():
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 9, 5]])
    unused = torch.zeros_like(ids, dtype=torch.bool)
    assert shared_beginning(ids, unused) == 3
    assert shared_beginning(ids, unused | (ids == 3)) == 2
    assert shared_beginning(ids, unused | (ids == 1)) == 0
    assert shared_beginning(ids[:1], unused[:1] | (ids[:1] == 5)) == 0  # nobody to share it with


def test_only_plain_keys_and_values_are_shared():
    for config in (LlamaConfig(), MistralConfig(sliding_window=8), Gemma3TextConfig()):
        assert can_share(config), config.model_type
    for config in (Lfm2Config(full_attn_idxs=[1, 3]), FalconH1Config()):  # convolutions and states beside
        assert not can_share(config), config.model_type


def test_patches_stay_in_their_order_and_at_their_positions():
    """Two rows of text: one with one picture of 16 features, one with two pictures, side by side."""
    torch.manual_seed(0)
    features = torch.arange(3 * 16 * 1.0).view(3, 16, 1)
    pictured = torch.zeros(2, 14, dtype=torch.bool)
    pictured[0, 3:7] = pictured[1, 2:6] = pictured[1, 6:10] = True
    draws = [drop_patches(features, 4, pictured) for _ in range(200)]
    kept = torch.stack([draw["pixel_values"] for draw in draws])[..., 0]
    assert (kept.diff(dim=-1) > 0).all()
    assert (kept[:, 0] != kept[:, 1] - 16).any()  # not the same of each picture
    assert kept.unique(return_counts=True)[1].min() > 20  # of 50 on average
    for draw in draws[:20]:
        chosen, places = draw["pixel_values"][..., 0].long() % 16, draw["position_ids"]
        assert places[0].tolist() == [0, 1, 2, *(3 + chosen[0]).tolist(), *range(19, 26)]
        first, second = (2 + chosen[1]).tolist(), (18 + chosen[2]).tolist()
        assert places[1].tolist() == [0, 1, *first, *second, *range(34, 38)]


def test_with_every_patch_positions_are_the_usual_ones():
    features, pictured = torch.randn(1, 4, 2), torch.tensor([[False, True, True, True, True, False]])
    whole = drop_patches(features, 4, pictured)
    assert torch.equal(whole["pixel_values"], features)
    assert whole["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
