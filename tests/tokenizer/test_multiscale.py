"""The residual schedule: prefixes, dropped scales, next-scale inputs, and one scale as plain quantization."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.errors import UserError
from tokenflow.tokenizer.multiscale import MultiScaleQuantizer, _resizing, reduce_area, resize_up
from tokenflow.tokenizer.quantizer import SharedMappingQuantizer

SCALES = st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True).map(sorted)


def schedule(scales=(1, 2, 4), codebook_size=32, seed=0, drop=0.0, **settings):
    torch.manual_seed(seed)
    single = SharedMappingQuantizer(
        [("semantic", 4, 1.0), ("pixel", 2, 1.0)], codebook_size, usage_window=512, **settings
    )
    return MultiScaleQuantizer(single, scales, drop, usage_window=512)


@given(scales=SCALES, batch=st.integers(1, 3), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_indices_give_back_the_quantized_map(scales, batch, seed):
    q = schedule(scales, seed=seed).eval()
    out = q(torch.randn(batch, 6, scales[-1], scales[-1]))
    assert out.indices.shape == (batch, sum(s * s for s in scales))
    torch.testing.assert_close(q.quantized(out.indices), out.quantized, atol=1e-5, rtol=1e-5)
    sums = q.partial_sums(out.indices)
    assert len(sums) == len(scales)
    assert all(x.shape == out.quantized.shape for x in sums)


@given(scales=SCALES, seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_a_prefix_depends_on_its_own_indices_only(scales, seed):
    q = schedule(scales, seed=seed).eval()
    indices = torch.randint(32, (2, sum(s * s for s in scales)))
    sums = q.partial_sums(indices)
    end = 0
    for position, side in enumerate(scales):
        end += side * side
        assert torch.equal(q.quantized(indices[:, :end]), sums[position])
        assert q.prefix_scales(end) == scales[: position + 1]


def test_each_scale_quantizes_what_the_coarser_ones_left():
    q = schedule().eval()
    h = torch.randn(2, 6, 4, 4)
    out = q(h)
    residual, start = h, 0
    for side, seen in zip(q.scales, out.scale_inputs, strict=True):
        torch.testing.assert_close(seen, F.interpolate(residual, size=(side, side), mode="area"))
        alone = q.quantizer(seen)
        assert torch.equal(alone.indices, out.indices[:, start : start + side * side])
        start += side * side
        if side == 4:
            residual = residual - alone.quantized
        else:
            residual = residual - F.interpolate(
                alone.quantized, size=(4, 4), mode="bicubic", align_corners=False
            )
    torch.testing.assert_close(h - out.quantized, residual)


def test_one_scale_is_plain_vector_quantization():
    q = schedule([4])
    h = torch.randn(2, 6, 4, 4, requires_grad=True)
    out, plain = q(h), q.quantizer(h)
    assert torch.equal(out.indices, plain.indices)
    torch.testing.assert_close(out.quantized, plain.quantized)
    assert out.losses.keys() == plain.losses.keys()
    for name, loss in out.losses.items():
        torch.testing.assert_close(loss, plain.losses[name])
    assert all(q._draw_dropped() is None for _ in range(20))


def test_resizing_is_the_identity_at_the_final_grid():
    x = torch.randn(1, 2, 5, 5)
    assert resize_up(x, 5) is x
    assert reduce_area(x, 5) is x
    torch.testing.assert_close(reduce_area(x, 3), F.interpolate(x, size=(3, 3), mode="area"))


@pytest.mark.parametrize("position", [1, 2])
def test_a_dropped_scale_leaves_no_indices_and_no_losses(position):
    q = schedule()
    h = torch.randn(2, 6, 4, 4)
    out = q(h, dropped=position)
    kept = [side for i, side in enumerate(q.scales) if i != position]
    assert out.indices.shape[1] == sum(side * side for side in kept)
    assert [x.shape[-1] for x in out.scale_inputs] == kept
    assert out.quantized.shape == h.shape
    assert int(q.scale_usage[position].seen) == 0
    assert int(q.scale_usage[0].seen) == 2


def test_drops_have_their_probability_and_spare_the_first_scale():
    q = schedule((1, 2, 3, 4), drop=0.3).train()
    counts = Counter(q._draw_dropped() for _ in range(3000))
    assert set(counts) == {None, 1, 2, 3}
    assert counts[None] / 3000 == pytest.approx(0.7, abs=0.04)
    for position in (1, 2, 3):
        assert counts[position] / 3000 == pytest.approx(0.1, abs=0.03)


def test_drops_are_drawn_in_training_only_and_repeat_with_the_seed():
    q = schedule(drop=1.0)
    h = torch.randn(1, 6, 4, 4)
    lengths = []
    for _ in range(2):
        torch.manual_seed(5)
        lengths.append([q(h).indices.shape[1] for _ in range(6)])
    assert lengths[0] == lengths[1]
    assert set(lengths[0]) == {1 + 4, 1 + 16}
    assert q.eval()(h).indices.shape[1] == 21


def test_losses_are_means_over_the_scales_that_ran():
    q = schedule()
    out = q(torch.randn(2, 6, 4, 4), dropped=1)
    each = [q.quantizer(x).losses["vq"] for x in out.scale_inputs]
    torch.testing.assert_close(out.losses["vq"], torch.stack(each).mean())


def test_straight_through_gradients_reach_the_features_from_every_scale():
    for position in (None, 1, 2):
        q = schedule()
        h = torch.randn(1, 6, 4, 4, requires_grad=True)
        q(h, dropped=position).quantized.square().sum().backward()
        assert torch.isfinite(h.grad).all()
        assert h.grad.abs().sum() > 0
        assert all(p.grad is None for p in q.parameters())


def test_usage_is_counted_per_scale():
    q = schedule()
    out = q(torch.randn(3, 6, 4, 4))
    parts = out.indices.split([1, 4, 16], dim=1)
    for usage, part in zip(q.scale_usage, parts, strict=True):
        assert usage.fraction(32) == pytest.approx(len(part.unique()) / min(32, part.numel()))


def test_kmeans_starts_from_the_vectors_of_all_scales_at_the_first_training_step_only():
    q = schedule(init="kmeans")
    h = torch.randn(8, 6, 4, 4)
    before = q.quantizer.codes().detach().clone()
    q(h)
    first = q.quantizer.codes().detach().clone()
    assert not torch.equal(first, before)
    q(torch.randn(8, 6, 4, 4))
    assert torch.equal(q.quantizer.codes(), first)


@given(
    scales=st.lists(st.integers(1, 5), min_size=2, max_size=4, unique=True).map(sorted),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_next_scale_inputs_accumulate_from_scale_to_scale(scales, seed):
    q = schedule(scales, seed=seed).eval()
    indices = torch.randint(32, (2, sum(s * s for s in scales)))
    blocks = q.next_scale_inputs(indices).split([s * s for s in scales[1:]], dim=1)
    assert sum(block.shape[1] for block in blocks) == indices.shape[1] - scales[0] ** 2
    running = torch.zeros(2, 6, scales[0], scales[0])
    for codes, block, side in zip(q.code_maps(indices), blocks, scales[1:], strict=False):
        running = resize_up(running + codes, side)
        torch.testing.assert_close(block, running.flatten(2).transpose(1, 2))
    last = sum(s * s for s in scales[:-1])
    changed = indices.clone()
    changed[:, last:] = (changed[:, last:] + 1) % 32
    assert torch.equal(
        q.next_scale_inputs(changed), q.next_scale_inputs(indices)
    )  # the last scale is never an input


def test_repredicting_a_scale_shows_it_its_own_codes():
    q = schedule().eval()
    indices = torch.randint(32, (1, 21))
    maps = q.code_maps(indices)
    plain, again = q.next_scale_inputs(indices), q.next_scale_inputs(indices, repredict=0)
    own = resize_up(maps[0], 2) + maps[1]
    torch.testing.assert_close(again[:, :4], own.flatten(2).transpose(1, 2))
    assert torch.equal(again[:, 4:], plain[:, 4:])


def test_lengths_that_end_within_a_scale_are_refused():
    q = schedule()
    for length in (0, 2, 20, 22):
        with pytest.raises(UserError, match=rf"{length} indices do not end with a scale; .* \[1, 5, 21\]"):
            q.prefix_scales(length)


def test_dead_codes_restart_once_in_a_window_of_training_only():
    torch.manual_seed(0)
    single = SharedMappingQuantizer([("semantic", 4, 1.0), ("pixel", 2, 1.0)], 32, usage_window=40)
    q = MultiScaleQuantizer(single, (1, 2), usage_window=40, restart_dead_codes=True).train()
    h = torch.randn(1, 6, 2, 2).repeat(4, 1, 1, 1)  # 20 indices a step, at most 5 distinct
    before = single.codes().detach().clone()
    q(h)
    assert torch.equal(single.codes(), before)
    used = q(h).indices.unique()  # 40 indices: the window is full
    moved = ((single.codes() - before).abs() > 1e-5).any(1).nonzero().flatten()
    assert not set(used.tolist()) & set(moved.tolist())
    assert len(moved) == 20  # as many as the step has vectors, of 27 or more dead codes
    after = single.codes().detach().clone()
    q.eval()
    for _ in range(4):
        q(h)
    assert torch.equal(single.codes(), after)


def test_prefix_decoding_gives_some_images_the_sum_of_their_first_scales():
    q = schedule((1, 2, 4)).train()
    h = torch.randn(64, 6, 4, 4)
    torch.manual_seed(1)
    whole = q(h)
    q.prefix_decoding = 0.5
    torch.manual_seed(1)
    some = q(h)
    assert torch.equal(some.indices, whole.indices)
    sums = torch.stack(q.partial_sums(whole.indices))  # [scales, B, D, 4, 4]
    counts = Counter()
    for image, expected in zip(some.quantized, sums.unbind(1), strict=True):
        error = (image - expected).flatten(1).abs().amax(1)
        assert error.min() < 1e-4
        counts[int(error.argmin()) + 1] += 1
    assert counts[3] > 32  # half of them, and a third of the others
    assert counts[1] > 3
    assert counts[2] > 3
    torch.testing.assert_close(q.eval()(h).quantized, sums[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("from_side", "side"), [(1, 8), (3, 8), (6, 8), (5, 7)])
def test_resizing_as_a_matrix_is_bicubic_resizing(from_side, side):
    torch.manual_seed(0)
    x = torch.randn(2, 4, from_side, from_side)
    as_matrix = x.flatten(2) @ _resizing(from_side, side, x.device, x.dtype)
    torch.testing.assert_close(as_matrix.unflatten(2, (side, side)), resize_up(x, side), rtol=1e-5, atol=1e-6)
