"""The shared-mapping quantizer: choice of codes, gradients, learning without gradients, usage."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.tokenizer.quantizer import CodeUsage, SharedMappingQuantizer, draw_means, kmeans

TWO = [("semantic", 6, 1.0), ("pixel", 3, 1.0)]


def quantizer(flows=TWO, codebook_size=16, seed=0, **settings):
    torch.manual_seed(seed)
    return SharedMappingQuantizer(flows, codebook_size, usage_window=64, **settings)


def weighted_distances(q, z):
    """Eq. 1 to 3 as printed, in fp64: sum over flows of weight * |z_f - e_f|^2; z [N, D] normalised here."""
    total = torch.zeros(len(z), q.codebook_size, dtype=torch.float64)
    for part, name, weight in zip(z.double().split(q.dims, -1), q.names, q.weights, strict=True):
        codes = q.codebooks[name].detach().double()
        if q.l2_norm:
            part, codes = F.normalize(part, dim=-1), F.normalize(codes, dim=-1)
        total += weight * torch.cdist(part, codes).square()
    return total


FLOWS = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=3)


@given(flows=FLOWS, l2_norm=st.booleans(), codebook_size=st.integers(1, 40), seed=st.integers(0, 9999))
@settings(max_examples=25, deadline=None)
def test_the_chosen_code_has_the_least_weighted_distance(flows, l2_norm, codebook_size, seed):
    named = [(f"flow{i}", dim, weight) for i, (dim, weight) in enumerate(flows)]
    q = quantizer(named, codebook_size, seed, l2_norm=l2_norm).eval()
    if not l2_norm:
        torch.nn.init.normal_(q.codebooks["flow0"])
    z = torch.randn(2, sum(q.dims), 2, 3)
    out = q(z)
    assert out.indices.shape == (2, 6)
    assert out.indices.dtype == torch.int64
    assert out.quantized.shape == z.shape
    rows = z.movedim(1, -1).flatten(0, 2)
    distance = weighted_distances(q, rows)
    chosen = distance.gather(1, out.indices.flatten()[:, None])[:, 0]
    assert (chosen - distance.min(1).values).abs().max() < 1e-5
    assert torch.equal(out.quantized.movedim(1, -1).flatten(1, 2), q.lookup(out.indices))


def test_weights_decide_between_flows():
    """One flow wants code 0, the other code 1: the heavier one gets its way."""
    for weights, expected in (((1.0, 3.0), 1), ((3.0, 1.0), 0)):
        q = quantizer([("a", 2, weights[0]), ("b", 2, weights[1])], 2).eval()
        with torch.no_grad():
            q.codebooks["a"].copy_(torch.eye(2))
            q.codebooks["b"].copy_(torch.eye(2))
        assert q(torch.tensor([1.0, 0, 0, 1]).view(1, 4, 1, 1)).indices.item() == expected


def test_equal_codes_give_the_lowest_index():
    q = quantizer(codebook_size=8).eval()
    with torch.no_grad():
        for codebook in q.codebooks.values():
            codebook.copy_(codebook[3].clone().expand_as(codebook))
    assert set(q(torch.randn(1, 9, 4, 4)).indices.flatten().tolist()) == {0}


def test_codes_have_unit_length_in_each_flow_only_with_l2_norm():
    q = quantizer()
    for part in q.lookup(torch.arange(16)).split(q.dims, -1):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(16))
    plain = quantizer(l2_norm=False)
    assert torch.equal(plain.lookup(torch.arange(16))[:, :6], plain.codebooks["semantic"])


def test_straight_through_gives_the_input_the_gradient_of_the_output():
    q = quantizer(l2_norm=False)
    z = torch.randn(1, 9, 2, 2, requires_grad=True)
    upstream = torch.randn(1, 9, 2, 2)
    (q(z).quantized * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    assert all(codebook.grad is None for codebook in q.codebooks.values())


def test_with_l2_norm_the_gradient_passes_through_the_normalisation():
    q = quantizer()
    z = torch.randn(1, 9, 2, 2, requires_grad=True)
    upstream = torch.randn(1, 9, 2, 2)
    (q(z).quantized * upstream).sum().backward()
    other = z.detach().clone().requires_grad_()
    normalised = torch.cat([F.normalize(part, dim=1) for part in other.split(q.dims, 1)], 1)
    (normalised * upstream).sum().backward()
    torch.testing.assert_close(z.grad, other.grad)


def test_vq_loss_moves_codes_and_commitment_moves_the_input():
    q = quantizer(l2_norm=False, commitment_weight=0.5)
    z = torch.randn(1, 9, 3, 3, requires_grad=True)
    out = q(z)
    expected = F.mse_loss(z, out.quantized).item()
    assert out.losses["vq"].item() == pytest.approx(expected)
    assert out.losses["commitment"].item() == pytest.approx(0.5 * expected)
    out.losses["vq"].backward(retain_graph=True)
    assert z.grad is None
    used = out.indices.unique()
    grad = q.codebooks["semantic"].grad.abs().sum(1)
    assert (grad[used] > 0).all()
    assert grad.sum() == pytest.approx(grad[used].sum().item())
    q.zero_grad()
    out.losses["commitment"].backward()
    assert z.grad.abs().sum() > 0
    assert q.codebooks["semantic"].grad is None


def test_eval_mode_has_no_losses_and_leaves_no_trace():
    q = quantizer().eval()
    before = {name: value.clone() for name, value in q.state_dict().items()}
    assert q(torch.randn(1, 9, 2, 2)).losses == {}
    assert int(q.usage.seen) == 0
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())


def test_entropy_loss_is_lowest_for_sure_and_varied_assignments():
    q = quantizer(codebook_size=4, entropy_weight=1.0)
    vectors = q.lookup(torch.arange(4)).detach()
    varied = q.entropy_loss(vectors)
    same = q.entropy_loss(vectors[:1].expand(4, -1))
    assert varied < same
    assert q(torch.randn(1, 9, 2, 2)).losses["entropy"].requires_grad


def test_entropy_loss_in_chunks_is_the_whole_with_its_gradients(monkeypatch):
    q = quantizer(entropy_weight=1.0)
    z = q.normalize(torch.randn(11, 9)).requires_grad_()
    results = []
    for chunk in (2**22, 3 * 16):
        monkeypatch.setattr("tokenflow.tokenizer.quantizer.ENTROPY_CHUNK", chunk)
        loss = q.entropy_loss(z)
        results.append((loss, *torch.autograd.grad(loss, [z, q.codebooks["semantic"], q.codebooks["pixel"]])))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_ema_moves_chosen_codes_to_their_vectors_and_leaves_the_others(l2_norm):
    q = quantizer(update="ema", ema_decay=0.5, l2_norm=l2_norm)
    before = q.codes().clone()
    z = torch.randn(4, 9, 2, 2)
    vectors = q.normalize(z.movedim(1, -1).flatten(0, 2))
    out = q(z)
    assert "vq" not in out.losses
    assert not any(codebook.requires_grad for codebook in q.codebooks.values())
    after, used = q.codes(), torch.zeros(16, dtype=torch.bool)
    for index in out.indices.unique().tolist():
        used[index] = True
        mean = q.normalize(vectors[out.indices.flatten() == index].mean(0))
        torch.testing.assert_close(
            after[index], q.normalize((before[index] + mean) / 2), atol=1e-5, rtol=1e-4
        )
    torch.testing.assert_close(after[~used], before[~used])
    torch.testing.assert_close(
        q.cluster_size, 0.5 * torch.bincount(out.indices.flatten(), minlength=16).float()
    )


def test_the_next_search_sees_codes_however_they_were_changed():
    q = quantizer().eval()
    z = torch.randn(1, 9, 4, 4)
    rows = z.movedim(1, -1).flatten(0, 2)

    def flip(codebook):
        return codebook.detach().flip(0) * 0.5 + torch.randn(codebook.shape)

    def by_copy():
        with torch.no_grad():
            q.codebooks["semantic"].copy_(flip(q.codebooks["semantic"]))

    def by_data():
        q.codebooks["semantic"].data.copy_(flip(q.codebooks["semantic"]))

    def by_state_dict():
        q.load_state_dict({name: torch.randn_like(value) for name, value in q.state_dict().items()})

    for change in (lambda: None, by_copy, by_data, by_state_dict):
        change()
        assert torch.equal(q(z).indices.flatten(), weighted_distances(q, rows).argmin(1))


def test_codebooks_of_inference_mode_can_be_searched():
    with torch.inference_mode():
        q = quantizer().eval()
        assert q(torch.randn(1, 9, 2, 2)).indices.shape == (1, 4)


# k-means
def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    centres = 10 * torch.eye(4)
    samples = (centres[:, None] + 0.1 * torch.randn(4, 25, 4)).flatten(0, 1)

    def assign(x, means):
        return torch.cdist(x, means).argmin(1)

    means, bins = kmeans(samples, samples[[0, 30, 60, 90]], 5, assign, lambda x: x)
    torch.testing.assert_close(means, centres, atol=0.1, rtol=0)
    assert bins.tolist() == [25] * 4
    far = torch.full((1, 4), 1e3)
    means, bins = kmeans(samples, torch.cat([samples[[0, 30, 60, 90]], far]), 3, assign, lambda x: x)
    assert bins[4] == 0
    assert torch.equal(means[4:], far)  # an empty cluster keeps its mean


def test_kmeans_initialisation_runs_once_and_lowers_the_error():
    q = quantizer(init="kmeans")
    z = torch.randn(200, 9)
    assert q.wants_initialization
    uniform = weighted_distances(q, z).min(1).values.mean()
    q.initialize(z)
    assert not q.wants_initialization
    assert weighted_distances(q, z).min(1).values.mean() < uniform
    assert not quantizer(init="kmeans").eval().wants_initialization


def test_drawn_means_repeat_only_if_samples_are_few():
    samples = torch.arange(10.0)[:, None]
    assert sorted(draw_means(samples, 10)[:, 0].tolist()) == list(range(10))
    assert draw_means(samples, 25).shape == (25, 1)


# usage
def test_dead_codes_restart_at_vectors_of_the_batch_and_the_others_stay():
    q = quantizer([("a", 3, 1.0), ("b", 2, 1.0)], codebook_size=8).train()
    q.usage.update(torch.tensor([1, 4, 4, 6]))
    before, vectors = q.codes().detach().clone(), torch.randn(50, 5)
    q.restart_dead(vectors)
    after = q.codes().detach()
    alive = torch.tensor([1, 4, 6])
    assert torch.equal(after[alive], before[alive])
    dead = after[torch.tensor([0, 2, 3, 5, 7])]
    distances = (dead[:, None] - q.normalize(vectors)).norm(dim=-1)
    assert (distances.min(1).values < 1e-6).all()
    assert len(dead.unique(dim=0)) == 5
    q.restart_dead(vectors[:2])  # fewer vectors than dead codes
    assert (q.codes() != after).any(1).sum() == 2


@given(batches=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_usage_is_the_share_of_distinct_codes_among_the_last_window(batches):
    usage, history = CodeUsage(8), []
    for batch in batches:
        usage.update(torch.tensor(batch))
        history += batch
        recent = history[-8:]
        assert usage.fraction(10) == pytest.approx(len(set(recent)) / min(10, len(recent)))


def test_training_counts_usage_and_the_file_does_not_hold_it():
    q = quantizer()
    out = q(torch.randn(2, 9, 2, 2))
    assert q.usage.fraction(16) == pytest.approx(len(out.indices.unique()) / 8)
    assert set(q.state_dict()) == {"codebooks.semantic", "codebooks.pixel"}


def test_distance_norms_are_the_sums_that_a_distance_matrix_gives():
    q = quantizer()
    z = q.normalize(torch.randn(7, 9))
    for (name, value), a, e in zip(
        q.distance_norms(z).items(), z.split(q.dims, -1), q.codes().detach().split(q.dims, -1), strict=True
    ):
        expected = torch.cdist(a.double(), e.double()).pow(4).sum(1).mean()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5), name


def test_half_precision_input_is_quantized_in_float32():
    q = quantizer().eval()
    z = torch.randn(1, 9, 3, 3).bfloat16()
    out = q(z)
    assert out.quantized.dtype == torch.float32
    assert torch.equal(out.indices, q(z.float()).indices)
