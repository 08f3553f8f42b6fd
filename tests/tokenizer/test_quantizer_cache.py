from __future__ import annotations

import torch

from tokenflow.tokenizer.multiscale import MultiScaleQuantizer
from tokenflow.tokenizer.quantizer import SharedMappingQuantizer


def test_codes_that_a_fused_optimizer_moved_are_seen_by_the_next_step_and_by_evaluation() -> None:
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(SharedMappingQuantizer([("a", 4, 1.0)], 16), [1, 2])
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1.0, fused=True)  # raises no version counter
    h = torch.randn(2, 4, 2, 2)
    for _ in range(2):
        out = quantizer(h)
        sum(out.losses.values()).backward()
        optimizer.step()

    def fresh_indices(training: bool) -> torch.Tensor:
        other = MultiScaleQuantizer(SharedMappingQuantizer([("a", 4, 1.0)], 16), [1, 2]).train(training)
        other.load_state_dict(quantizer.state_dict())
        return other(h).indices

    assert torch.equal(quantizer(h).indices, fresh_indices(True))
    assert torch.equal(quantizer.eval()(h).indices, fresh_indices(False))
