"""The passes of cached sampling as CUDA graphs: one call for all that a pass launches.

A pass over a language model is a thousand small kernels beside its large products, and at one picture at a
time the processor cannot launch them as fast as a GPU runs them. A graph holds them all. It wants what the
cache has anyway: shapes that depend on the scale alone, and buffers that stay where they are. So prompts are
padded to the full text block, and each pass (its scale, and whether it is kept) is captured once a number of
rows, which takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenflow.generation.predictor import CachedPredictor

if TYPE_CHECKING:
    from tokenflow.generation.modeling import TokenFlowForTextToImage


def capture(run: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """`run` as a CUDA graph; what it returns is overwritten by the next replay.

    Args:
        run: reads and writes the same tensors at each call, and never waits for the device.
        pool: memory that graphs share which are never replayed at the same time (`graph_pool_handle`).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # libraries set themselves up at their first call, which no graph may hold
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class GraphedPredictor(CachedPredictor):
    """A `CachedPredictor` whose passes are captured, kept from one batch of prompts to the next.

    Args:
        model: the language model, on a CUDA device; its weights must stay where they are.
        rows: R of all batches.
    """

    # Whoever draws first may do so in inference mode; what is kept must serve those who do not.
    @torch.inference_mode(False)
    def __init__(self, model: TokenFlowForTextToImage, rows: int):
        ids = torch.zeros(rows, model.image_start, dtype=torch.int64, device=model.device)
        super().__init__(model, ids, torch.ones_like(ids, dtype=torch.bool), plain=False)
        self.features: dict[int, Tensor] = {}
        self.passes: dict[tuple[int, bool], Callable[[], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def load(self, input_ids: Tensor, real: Tensor) -> GraphedPredictor:
        """Begin with other prefixes, `[R, image_start]` both."""
        assert self.visible is not None
        self.input_ids.copy_(input_ids)
        self.real.copy_(real)
        self.visible[:, : real.shape[1]].copy_(real)
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, position: int, features: Tensor | None, keep: bool) -> Tensor:
        if features is not None:
            # Contiguous, whatever the layout of those given: of that the graph knows nothing.
            features = self.features.setdefault(
                position, torch.empty(features.shape, device=features.device)
            ).copy_(features)
        if (position, keep) not in self.passes:
            self.passes[position, keep] = capture(
                lambda: super(GraphedPredictor, self).step(position, features, keep), self.pool
            )
        return self.passes[position, keep]()
