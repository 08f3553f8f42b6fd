"""The sampler by itself: settings, filters, noise, given codes, and what it asks of a predictor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.errors import UserError
from tokenflow.generation.codes import CodeTable
from tokenflow.generation.sampler import (
    KnownTokens,
    SamplingSettings,
    choose,
    gumbel_noise,
    likely_codes,
    noise_keys,
    sample_scales,
    seeds_for,
)


class Scripted:
    """A predictor that notes what it is asked and answers with fixed random logits of each position."""

    def __init__(self, table: CodeTable, rows: int):
        self.table, self.rows, self.asked = table, rows, []

    def step(self, position, features, keep):
        self.asked.append((position, None if features is None else features.clone(), keep))
        side = self.table.scales[position]
        generator = torch.Generator().manual_seed(position)
        return torch.randn(self.rows, side * side, len(self.table.codes), generator=generator)


def table_of(scales=(1, 2, 4), size=16, dim=3) -> CodeTable:
    table = CodeTable(size, dim, scales)
    table.set_codes(torch.randn(size, dim, generator=torch.Generator().manual_seed(9)))
    return table


def sampled(table, rows=2, known=None, seeds=(0, 1), **options):
    sampling = SamplingSettings(**options)
    predictor = Scripted(table, rows * (1 + sampling.guided))
    *_, codes = sample_scales(predictor, table, sampling, list(seeds), known)
    return codes, predictor


# ------------------------------------------------------------------------------------------------ passes
def test_order_of_passes_and_their_features():
    table = table_of()
    codes, predictor = sampled(table, guidance_scale=0.0)
    assert [(position, keep) for position, _, keep in predictor.asked] == [
        (0, True),
        *((1, keep) for keep in (True, False, False)),
        *((2, keep) for keep in (True, False, False)),
    ]
    assert predictor.asked[0][1] is None
    plain = table.all_inputs(codes)
    torch.testing.assert_close(predictor.asked[1][1], plain[:, :4])
    torch.testing.assert_close(predictor.asked[4][1], plain[:, 4:])
    # A refinement sees the scale's own codes of the pass before, added to the plain features.
    first = choose(table_logits(table, 1, 2), 1200, 0.8, 1.0, noise_keys([0, 1], 3, 21)[:, 0, 1:5])
    torch.testing.assert_close(predictor.asked[2][1], plain[:, :4] + table.codes[first])


def table_logits(table, position, rows):
    return Scripted(table, rows).step(position, None, True)


def test_guidance_rises_over_the_scales_and_both_halves_see_the_same_codes():
    settings_ = SamplingSettings(guidance_scale=6.0)
    assert [settings_.guidance_at(k, 4) for k in range(4)] == [0.0, 2.0, 4.0, 6.0]
    assert settings_.guidance_at(0, 1) == 6.0  # of a single scale, the last is the first
    table = table_of()
    _, predictor = sampled(table, guidance_scale=6.0)
    features = predictor.asked[1][1]
    assert torch.equal(features[:2], features[2:])


def test_one_pass_and_one_scale():
    codes, predictor = sampled(table_of((4,)), guidance_scale=2.0)
    assert codes.shape == (2, 16)
    assert len(predictor.asked) == 1
    _, predictor = sampled(table_of(), top_k=5, top_p=0.5)
    assert len(predictor.asked) == 3


def test_codes_stream_out_after_each_scale():
    table = table_of()
    steps = list(sample_scales(Scripted(table, 1), table, SamplingSettings(0.0), [3]))
    assert [tuple(step.shape) for step in steps] == [(1, 1), (1, 5), (1, 21)]
    assert torch.equal(steps[2][:, :5], steps[1])


# ------------------------------------------------------------------------------------------------ filters
@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    st.integers(0, 14),
    st.floats(0, 1),
)
def test_filters_against_their_definition(values, top_k, top_p):
    logits = torch.tensor(values, dtype=torch.float32)
    found, codes = likely_codes(logits, top_k, top_p)
    kept = {int(code) for code, value in zip(codes, found, strict=True) if value > -torch.inf}
    threshold = sorted(values, reverse=True)[min(top_k or len(values), len(values)) - 1]
    by_k = {i for i, value in enumerate(values) if value >= threshold}
    assert kept <= by_k
    assert values.index(max(values)) in kept or max(values) in [values[i] for i in kept]
    if top_p in (0.0, 1.0):
        assert kept == by_k
    if kept < by_k:
        total = sum(torch.tensor(values, dtype=torch.float64)[sorted(by_k)].exp())
        held = sum(torch.tensor(values, dtype=torch.float64)[sorted(kept)].exp())
        assert held / total >= top_p - 1e-9


def test_many_ties_at_the_cut_all_stay():
    values, codes = likely_codes(torch.zeros(2, 100), top_k=3)
    assert (values == 0).all()
    assert sorted(codes[0].tolist()) == list(range(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": (1, 2)}, "top_k has 2 entries and top_p 3"),
        ({"top_k": ()}, "top_k must be integers from 0, one a pass"),
        ({"top_k": (-1, 1, 1)}, "top_k must be integers from 0"),
        ({"top_k": (1.5, 1, 1)}, "top_k must be integers from 0"),
        ({"top_p": (1.2, 0, 0)}, "top_p must be numbers from 0 to 1"),
        ({"top_p": "0.8"}, "top_p must be numbers from 0 to 1"),
        ({"guidance_scale": -1}, "guidance_scale must be a number of at least 0, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"temperature": float("inf")}, "temperature must be"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        SamplingSettings(**options)


# -------------------------------------------------------------------------------------------------- noise
def test_noise_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, 4)
    keys = noise_keys([0], 1, 40_000)[0, 0]
    for temperature in (1.0, 0.5):
        chosen = choose(logits, 0, 0.0, temperature, keys)
        share = torch.bincount(chosen, minlength=4) / 40_000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), atol=0.01, rtol=0)
    assert gumbel_noise(keys, torch.tensor(3)).mean().item() == pytest.approx(0.5772, abs=0.02)
    assert gumbel_noise(keys, torch.tensor(3)).var().item() == pytest.approx(1.645, abs=0.05)


def test_noise_of_different_codes_and_positions_is_independent():
    keys = noise_keys([5], 1, 2000)[0, 0]
    noise = gumbel_noise(keys[:, None], torch.arange(20))
    correlation = torch.corrcoef(noise.T) - torch.eye(20)
    assert correlation.abs().max() < 0.1
    assert torch.corrcoef(noise[:20]).sub(torch.eye(20)).abs().max() < 0.9


def test_keys_depend_on_the_seed_alone():
    keys = noise_keys([7, 8], 3, 21)
    assert torch.equal(noise_keys([8], 3, 21)[0], keys[1])
    assert torch.equal(noise_keys([8], 1, 21)[0, 0], keys[1, 0])  # more passes change none
    assert not torch.equal(keys[0], keys[1])


def test_a_code_just_outside_the_cut_changes_nothing():
    """The reason for noise by code: with an inverse CDF all codes behind it would shift."""
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    keys = noise_keys([0], 1, 500)[0, 0]
    wide, narrow = choose(logits, 41, 0.0, 1.0, keys), choose(logits, 40, 0.0, 1.0, keys)
    last = logits.topk(41).indices[:, -1]
    assert torch.equal(wide[wide != last], narrow[wide != last])
    assert (wide != narrow).float().mean() < 0.05


def test_greedy():
    logits = torch.randn(3, 5, 9)
    keys = noise_keys([0], 1, 5)[:, 0]
    assert torch.equal(choose(logits, 0, 0.0, 0.0, keys), logits.argmax(-1))
    assert torch.equal(choose(logits, 1, 0.0, 1.0, keys), logits.argmax(-1))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", None])
def test_seeds_that_are_none(seed):
    with pytest.raises(UserError, match=r"a seed must be an integer from 0 to 2\*\*64 - 1"):
        noise_keys([seed], 1, 4)


def test_seeds_for():
    assert seeds_for(3, 2) == [3, 3]
    assert seeds_for([3, 4], 2) == [3, 4]
    assert seeds_for(np.int64(3), 2) == [3, 3]
    assert torch.equal(noise_keys([np.int64(3)], 1, 4), noise_keys([3], 1, 4))
    state = torch.get_rng_state()
    assert seeds_for(None, 4) != seeds_for(None, 4)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="one for each of the 3 images; got 2"):
        seeds_for([1, 2], 3)


# ------------------------------------------------------------------------------------------- given codes
def test_given_codes_stay_and_the_rest_is_drawn():
    table = table_of()
    codes = torch.arange(42).view(2, 21) % 16
    mask = torch.zeros(2, 21, dtype=torch.bool)
    mask[:, ::2] = True
    result, _ = sampled(table, known=KnownTokens(codes, mask))
    assert torch.equal(result[mask], codes[mask])
    assert not torch.equal(result, codes)


def test_a_scale_that_is_given_is_run_once():
    table = table_of()
    codes = torch.arange(10).view(2, 5)
    result, predictor = sampled(table, known=KnownTokens(codes))
    assert torch.equal(result[:, :5], codes)
    assert [position for position, _, _ in predictor.asked] == [0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("codes", "mask", "message"),
    [
        (torch.zeros(2, 6).long(), None, r"known codes must be \[2, L\], L the end of a scale \(1, 5, 21\)"),
        (torch.zeros(3, 5).long(), None, r"known codes must be \[2, L\]"),
        (torch.zeros(2, 5), None, "must be integers, got torch.float32"),
        (torch.full((2, 5), 16), None, "run from 16 to 16; this codebook has 0 to 15"),
        (torch.zeros(2, 5).long(), torch.ones(2, 4).bool(), r"mask of known codes must be \[2, 5\] bool"),
        (torch.zeros(2, 5).long(), torch.ones(2, 5), r"got \[2, 5\] torch.float32"),
    ],
)
def test_given_codes_that_do_not_fit(codes, mask, message):
    with pytest.raises(UserError, match=message):
        KnownTokens(codes, mask).check(2, table_of())
