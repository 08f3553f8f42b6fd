"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(t: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 may have sharded."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def sharded_like(t: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all processes hold whole, if FSDP2 sharded `like`; no traffic."""
    if not isinstance(like, DTensor):
        return t
    return distribute_tensor(t.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class WeightAverage:
    """Moving average of a model's trainable parameters (buffers are not averaged, as in the released code).

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.
    Without a decay the average is the weights themselves.

    Args:
        model: whose parameters count.
        decay: in [0, 1); 0 keeps no averages.
        wrapper: the module around the model that FSDP2 sharded as a whole, if it is not the model itself.
    """

    def __init__(self, model: nn.Module, decay: float, wrapper: nn.Module | None = None):
        self.decay = decay
        self.updates = 0
        self.sharded = [module for module in (wrapper or model).modules() if isinstance(module, FSDPModule)]
        self.parameters = (
            {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        )
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        if not self.averages:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
        for module in self.sharded:
            module.reshard()  # what a forward without backward gathered would stay in use

    def full_state(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's whole state dict `weights` with the averages in place of the trained parameters."""
        averages = {name: whole(t).cpu() for name, t in self.averages.items()}
        return {**weights, **{name: t for name, t in averages.items() if name in weights}}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Undo `full_state`."""
        self.updates = updates
        for name, average in self.averages.items():
            average.copy_(sharded_like(state[name], average))
