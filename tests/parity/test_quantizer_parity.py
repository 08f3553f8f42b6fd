"""The quantizer against `quantizer/*.npz` (README sections 4.2 to 4.4, tolerances in section 5)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from seeded_weights import seeded_tensor

from tokenflow.tokenizer.multiscale import MultiScaleQuantizer
from tokenflow.tokenizer.nearest import nearest_code
from tokenflow.tokenizer.quantizer import SharedMappingQuantizer, entropy_sums, kmeans

GOLDEN = Path(__file__).parent / "tokenizer" / "quantizer"
ATOL = 1e-6  # losses, outputs (README section 5)
FLOWS = [("semantic", 32, 1.0), ("pixel", 8, 1.0)]


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}


def quantizer(golden: dict[str, torch.Tensor], entropy_weight: float = 0.0) -> SharedMappingQuantizer:
    model = SharedMappingQuantizer(FLOWS, 512, entropy_weight=entropy_weight).train()
    with torch.no_grad():
        model.codebooks["semantic"].copy_(golden["embedding_vqkd"])
        model.codebooks["pixel"].copy_(golden["embedding_vqgan"])
    return model


def assert_gradient(actual: torch.Tensor | None, golden: torch.Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, golden, atol=1e-4 * golden.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("tag", "entropy_weight"), [("ent0", 0.0), ("ent01", 0.1)])
def test_single_call(tag, entropy_weight):
    golden = load("single_call")
    model = quantizer(golden, entropy_weight)
    z = golden["z"].clone().requires_grad_()
    out = model(z)
    assert torch.equal(out.indices.flatten(), golden["indices"].long())
    torch.testing.assert_close(out.quantized, golden["z_q"], atol=ATOL, rtol=0)
    vq, commitment, entropy = golden[f"{tag}_scalars"][:3].float()
    torch.testing.assert_close(out.losses["vq"], vq, atol=ATOL, rtol=0)
    torch.testing.assert_close(out.losses["commitment"], commitment, atol=ATOL, rtol=0)
    if entropy_weight:
        torch.testing.assert_close(out.losses["entropy"], entropy, atol=ATOL, rtol=0)
    norms = model.distance_norms(model.normalize(z.detach().movedim(1, -1).flatten(0, 2)))
    torch.testing.assert_close(
        torch.stack(list(norms.values())), golden[f"{tag}_scalars"][4:], rtol=1e-5, atol=0
    )

    parameters = [z, model.codebooks["semantic"], model.codebooks["pixel"]]
    gradients = torch.autograd.grad(sum(out.losses.values()), parameters, retain_graph=True)
    for gradient, name in zip(gradients, ("z", "embedding_vqkd", "embedding_vqgan"), strict=True):
        assert_gradient(gradient, golden[f"{tag}_grad_{name}"])
    through = torch.autograd.grad((out.quantized * golden["upstream"]).sum(), parameters, allow_unused=True)
    assert_gradient(through[0], golden[f"{tag}_ste_grad_z"])
    assert through[1] is None
    assert through[2] is None


def test_usage_window():
    golden = load("single_call")
    model = quantizer(golden)
    model(golden["z"])
    model(seeded_tensor("quantizer_case.z_second", (2, 40, 3, 3)))
    recent = model.usage.recent[:116].float()  # first in, first out: the golden's tail in the same order
    assert torch.equal(recent, golden["codebook_used_tail"])
    # The released window starts full of zeros: there code 0 counts as used, and the share is of all K codes.
    distinct = len(set(recent.tolist()) | {0.0})
    assert distinct / 512 == golden["usage_after_second_call"].item()
    assert model.usage.fraction(512) == len(set(recent.tolist())) / 116


def test_entropy_of_given_affinities():
    golden = load("single_call")
    affinity = golden["affinity"] / 0.01
    entropy, mass = entropy_sums(affinity)
    mean = mass / len(affinity)
    value = entropy / len(affinity) + (mean * (mean + 1e-5).log()).sum()
    torch.testing.assert_close(value.double(), golden["affinity_entropy_loss"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("tag", "dropped", "entropy_weight"), [("nodrop", -1, 0.1), ("drop3", 3, 0.1), ("droplast", 7, 0.0)]
)
def test_multiscale(tag, dropped, entropy_weight):
    golden = load("multiscale_train")
    single = quantizer(golden, entropy_weight)
    model = MultiScaleQuantizer(single, golden["scales"].tolist()).train()
    h = golden["h"].clone().requires_grad_()
    out = model(h, dropped=dropped)
    assert torch.equal(out.indices, golden[f"{tag}_indices"].long())
    torch.testing.assert_close(out.quantized, golden[f"{tag}_final"], atol=1e-5, rtol=0)
    for loss, name in zip(golden[f"{tag}_losses"][:3].float(), ("vq", "commitment", "entropy"), strict=True):
        if name in out.losses:
            torch.testing.assert_close(out.losses[name], loss, atol=ATOL, rtol=0)
    norms = [
        list(single.distance_norms(single.normalize(z.detach().movedim(1, -1).flatten(0, 2))).values())
        for z in out.scale_inputs
    ]
    torch.testing.assert_close(
        torch.tensor(norms), golden[f"{tag}_per_scale"][:, 4:], rtol=1e-5, atol=0, check_dtype=False
    )
    parameters = [h, single.codebooks["semantic"], single.codebooks["pixel"]]
    gradients = torch.autograd.grad(sum(out.losses.values()), parameters, retain_graph=True)
    for gradient, name in zip(gradients, ("h", "embedding_vqkd", "embedding_vqgan"), strict=True):
        assert_gradient(gradient, golden[f"{tag}_grad_{name}"])
    through = torch.autograd.grad((out.quantized * golden["upstream"]).sum(), h)[0]
    assert_gradient(through, golden[f"{tag}_ste_grad_h"])


@pytest.mark.parametrize("kind", ["cos", "l2"])
def test_kmeans(kind):
    golden = load("kmeans_ema")
    normalize = partial(F.normalize, dim=-1) if kind == "cos" else torch.nn.Identity()
    samples = golden["samples"]
    bias = None if kind == "cos" else -0.5

    def assign(x, means):
        return nearest_code(x, means, None if bias is None else bias * means.square().sum(-1))

    means, bins = kmeans(samples, golden["initial_means"], 10, assign, normalize)
    torch.testing.assert_close(means, golden[f"kmeans_{kind}_means"], atol=1e-5, rtol=0)
    assert torch.equal(bins.long(), golden[f"kmeans_{kind}_bins"])


def test_norm_ema():
    golden = load("kmeans_ema")
    model = SharedMappingQuantizer([("semantic", 32, 1.0)], 32, update="ema").train()
    with torch.no_grad():
        model.codebooks["semantic"].copy_(golden["norm_ema_weight"])
    for step in ("norm_ema_step1", "norm_ema_step2"):
        z = golden["norm_ema_z"].clone().requires_grad_()
        out = model(z)
        assert set(out.losses) == {"commitment"}
        assert torch.equal(out.indices.flatten(), golden[f"{step}_indices"].long())
        torch.testing.assert_close(
            out.losses["commitment"].double(), golden[f"{step}_loss"], atol=ATOL, rtol=0
        )
        assert_gradient(torch.autograd.grad(out.losses["commitment"], z)[0], golden[f"{step}_grad_z"])
        torch.testing.assert_close(
            model.codebooks["semantic"].detach(), golden[f"{step}_weight_after"], atol=ATOL, rtol=0
        )
        torch.testing.assert_close(
            model.cluster_size, golden[f"{step}_cluster_size_after"], atol=ATOL, rtol=0
        )


def test_kmeans_then_ema():
    """The released k-means mode leaves its pixel codes at zero (README quirk 17), so only its semantic half
    is a reference: the same codes, cluster sizes and choices as a quantizer with that one flow."""
    golden = load("kmeans_ema")
    model = SharedMappingQuantizer([("semantic", 32, 1.0)], 32, init="kmeans", update="ema").train()
    z = golden["z"][:, :32]
    vectors = model.normalize(z.movedim(1, -1).flatten(0, 2))

    def assign(x, means):
        return nearest_code(x, means)

    means, bins = kmeans(vectors, golden["initial_codes"], 10, assign, model.normalize)
    with torch.no_grad():
        model.codebooks["semantic"].copy_(means)
        model.cluster_size.copy_(bins)
        model.initialized.fill_(True)
    for step in ("step1", "step2"):
        out = model(z)
        assert torch.equal(out.indices.flatten(), golden[f"{step}_indices"].long())
        torch.testing.assert_close(out.quantized.detach(), golden[f"{step}_z_q"][:, :32], atol=ATOL, rtol=0)
        torch.testing.assert_close(
            model.codebooks["semantic"].detach(), golden[f"{step}_weight_after"], atol=ATOL, rtol=0
        )
        torch.testing.assert_close(
            model.cluster_size, golden[f"{step}_cluster_size_after"], atol=1e-4, rtol=0
        )
