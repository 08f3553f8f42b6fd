"""Passes captured as CUDA graphs draw what plain ones do."""

from __future__ import annotations

import pytest
import torch

from tokenflow import TextToImagePipeline
from tokenflow.errors import UserError
from tokenflow.generation import graphs

LIKELIEST = {"temperature": 0.0}
REQUESTS = [
    (["a hat", "a long boat on a lake"], LIKELIEST),
    (["x", ""], {"top_k": (5, 1), "top_p": (0.9, 0.0)}),
    (["one alone"], {}),
    (["a hat", "two"], {"negative_prompt": "grey", "guidance_scale": 3.0}),
    (["no guidance", "y"], {"guidance_scale": 0.0}),
]


@pytest.fixture
def pipe(small_pipeline_folder) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(small_pipeline_folder)


def codes(pipe: TextToImagePipeline, prompts: list[str], **settings) -> torch.Tensor:
    return pipe(prompts, seed=3, output_type="codes", batch_size=2, **settings).codes.cpu()


def pretended_capture(run, pool):
    """As a graph does: what is returned lies at one place, and the function sees no tensor but its own."""
    result = run().clone()

    def replay():
        return result.copy_(run())

    return replay


def test_captured_passes_draw_the_same(pipe, monkeypatch):
    expected = [codes(pipe, prompts, **settings) for prompts, settings in REQUESTS]
    monkeypatch.setattr(graphs, "capture", pretended_capture)
    pipe.model.graphed = {}  # as capture_passes on a GPU
    with torch.inference_mode():
        assert torch.equal(codes(pipe, *REQUESTS[0][:1], **REQUESTS[0][1]), expected[0])
    for (prompts, settings), theirs in zip(REQUESTS, expected, strict=True):
        assert torch.equal(codes(pipe, prompts, **settings), theirs)
    scales = len(pipe.model.config.scales)
    assert {rows: len(graphed.passes) for rows, graphed in pipe.model.graphed.items()} == dict.fromkeys(
        (4, 2), 2 * scales - 1
    )


def test_a_cpu_has_no_graphs(pipe):
    with pytest.raises(UserError, match="CUDA graphs need a CUDA device; this model is on 'cpu'"):
        pipe.model.capture_passes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_passes_draw_the_same_on_a_gpu(pipe, dtype, monkeypatch):
    pipe.to("cuda", dtype)
    pipe.model.graphed = {}
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "capture", pretended_capture)
        expected = [codes(pipe, prompts, **settings) for prompts, settings in REQUESTS]
    pipe.model.capture_passes()
    for _ in range(2):  # captured, then replayed
        for (prompts, settings), theirs in zip(REQUESTS, expected, strict=True):
            assert torch.equal(codes(pipe, prompts, **settings), theirs)
