"""Muon: orthogonal steps for matrices and filters, AdamW for the rest, in one optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenflow.training.muon import MuonAdamW, muon_groups, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (40, 16)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_scale(shape):
    torch.manual_seed(0)
    matrix = 1e-3 * torch.randn(shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3
    cosine = (found * (u @ vh)).sum() / (found.norm() * (u @ vh).norm())
    assert cosine > 0.97


def test_matrices_of_one_shape_are_orthogonalized_as_each_alone():
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 40) * torch.tensor([1.0, 1e-3, 30.0])[:, None, None]
    alone = torch.stack([orthogonalize(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), alone, rtol=0, atol=2e-2)  # bfloat16 inside


def test_linear_layers_agree_with_torchs_muon():
    torch.manual_seed(0)
    ours = nn.Linear(24, 12, bias=False)
    theirs = nn.Linear(24, 12, bias=False)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.01, "weight_decay": 0.1}
    mine = MuonAdamW([{"params": ours.parameters(), "muon": True, **options}])
    reference = torch.optim.Muon(theirs.parameters(), adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(5):
        x = torch.randn(32, 24)
        for layer, optimizer in ((ours, mine), (theirs, reference)):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=2e-3)  # bfloat16 inside


def small_network():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 4, 3),
            "conv": nn.Conv2d(4, 4, 3),
            "norm": nn.GroupNorm(1, 4),
            "table": nn.Embedding(5, 4),
            "head": nn.Linear(4, 2),
        }
    )


def test_groups_hold_every_parameter_once():
    network = small_network()
    muon, matrices, vectors = muon_groups(network, 2e-3, 1e-3, 0.1, adamw=("conv_in",))
    names = {id(p): name for name, p in network.named_parameters()}
    assert [names[id(p)] for p in muon["params"]] == ["conv.weight", "head.weight"]
    assert [names[id(p)] for p in matrices["params"]] == ["conv_in.weight", "table.weight"]
    assert {names[id(p)] for p in vectors["params"]} == set(names.values()) - {
        "conv.weight",
        "head.weight",
        "conv_in.weight",
        "table.weight",
    }
    assert (muon["peak_lr"], matrices["peak_lr"], vectors["weight_decay"]) == (2e-3, 1e-3, 0.0)


def test_state_resumes_exactly_and_adamw_groups_are_adamw():
    def run(network, optimizer, steps, start=0):
        for i in range(start, start + steps):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i))
            y = network["norm"](network["conv"](network["conv_in"](x))).mean((2, 3))
            network["head"](y + network["table"](torch.tensor([i % 5]))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def build():
        network = small_network()
        return network, MuonAdamW(muon_groups(network, 2e-3, 1e-3, adamw=("conv_in",)), betas=(0.9, 0.95))

    whole, optimizer = build()
    run(whole, optimizer, 6)
    first, optimizer = build()
    run(first, optimizer, 3)
    second, fresh = build()
    second.load_state_dict(first.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    run(second, fresh, 3, start=3)
    for name, p in whole.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
    alone = nn.Linear(3, 2)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(alone.state_dict())
    a = MuonAdamW([{"params": alone.parameters(), "muon": False}], lr=0.1)
    b = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for layer, optimizer in ((alone, a), (twin, b)):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(alone.weight, twin.weight)
