"""Muon for the matrices inside a network, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix. `torch.optim.Muon`
does so for 2-D parameters only; here a convolution counts as the matrix of its filters, and one optimizer
holds both kinds, so that checkpoints, clipping and schedules see a single one. In this project's small
networks it needed about half as many images as AdamW (docs/training-log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokenflow.training.averaging import sharded_like, whole

# The quintic a x + b x^3 + c x^5 of Jordan et al.: five rounds bring singular values from [0.01, 1] near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of `[m, n]`, computed in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(rounds):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide if x.shape[0] <= x.shape[1] else wide.T).to(matrix.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `"muon": True` take orthogonalised Nesterov steps instead.

    Their steps are scaled by 0.2 sqrt(max(m, n)), the size of a usual AdamW step (Liu et al. 2025), so that
    learning rate and weight decay mean the same in both kinds of group. Muon's parameters have two or more
    dimensions, of which the first counts the rows.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.95, **options: Any):
        super().__init__(groups, **options)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group.get("muon"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._muon_step(parameter, group["lr"], group["weight_decay"])
        return loss

    def _muon_step(self, parameter: nn.Parameter, lr: float | Tensor, weight_decay: float) -> None:
        assert parameter.grad is not None
        gradient, state = parameter.grad, self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it when it loads a state
            state["momentum"] = torch.zeros_like(gradient)
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        # A matrix that FSDP2 sharded is gathered: each process orthogonalises it, and keeps its part.
        update = whole(gradient.lerp(state["momentum"], self.momentum)).flatten(1)
        scale = 0.2 * math.sqrt(max(update.shape))
        direction = sharded_like(orthogonalize(update).view(parameter.shape), parameter)
        parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(direction * (lr * scale))


def muon_groups(
    model: nn.Module, muon_lr: float, lr: float, weight_decay: float = 0.0, adamw: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Groups for `MuonAdamW`: weights of linear layers and convolutions to Muon, all other trained parameters
    to AdamW (vectors without decay).

    Args:
        model: its parameters that require gradients are taken.
        muon_lr, lr: full rates, also kept as `"peak_lr"` of each group, which a schedule multiplies.
        adamw: parts of names whose layers stay with AdamW: those that read pixels, or heads.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    hidden = {id(layer.weight) for name, layer in layers.items() if not any(part in name for part in adamw)}
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in hidden]
    groups = [
        {"params": [p for p in trained if id(p) in hidden], "lr": muon_lr, "muon": True},
        {"params": [p for p in rest if p.ndim > 1], "lr": lr, "muon": False},
        {"params": [p for p in rest if p.ndim <= 1], "lr": lr, "muon": False, "weight_decay": 0.0},
    ]
    return [
        {"weight_decay": weight_decay, **group, "peak_lr": group["lr"]} for group in groups if group["params"]
    ]
