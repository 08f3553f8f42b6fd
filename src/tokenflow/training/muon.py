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


def orthogonalize(matrices: Tensor, rounds: int = 5) -> Tensor:
    """About U V^T of the singular value decompositions U S V^T of `[..., m, n]`, computed in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide if x.shape[-2] <= x.shape[-1] else wide.mT).to(matrices.dtype)


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
                self._muon_step([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _muon_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if not (state := self.state[parameter]):
                state["step"] = torch.zeros(())  # AdamW looks for it when it loads a state
                state["momentum"] = torch.zeros_like(gradient)
            state["step"] += 1
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)

        alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
            # A matrix that FSDP2 sharded is gathered: each process orthogonalises it, and keeps its part.
            update = whole(gradient.lerp(momentum, self.momentum)).flatten(1)
            alike.setdefault(update.shape, []).append((parameter, update))
        moved: list[Tensor] = []
        steps: list[Tensor] = []
        for shape, pairs in alike.items():
            scale = 0.2 * math.sqrt(max(shape)) * group["lr"]
            updates = [update for _, update in pairs]
            # One by one, small products would leave a GPU idle; on a CPU they are the faster ones.
            on_cpu = updates[0].device.type == "cpu"
            directions = map(orthogonalize, updates) if on_cpu else orthogonalize(torch.stack(updates))
            for (parameter, _), direction in zip(pairs, directions, strict=True):
                moved.append(parameter)
                steps.append(sharded_like(direction.view(parameter.shape), parameter) * scale)
        torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(moved, steps)


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
