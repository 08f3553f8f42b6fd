"""Compiled sampling: the same codes, and nothing is compiled again for another prompt."""

from __future__ import annotations

import pytest
import torch

from tokenflow import TextToImagePipeline


@pytest.fixture
def pipe(small_pipeline_folder) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(small_pipeline_folder)


def check_compiled(pipe: TextToImagePipeline, **options) -> None:
    def codes(prompts: list[str], **settings) -> torch.Tensor:
        return pipe(prompts, seed=3, output_type="codes", batch_size=2, **settings).codes

    likeliest = {"top_k": (1, 1), "top_p": (0.0, 0.0)}
    requests = [
        (["a hat", "a long boat on a lake"], {"temperature": 0.0}),
        (["x", ""], likeliest),
        (["a hat", "two"], {"negative_prompt": "grey", "guidance_scale": 3.0}),
    ]
    expected = [codes(prompts, **settings) for prompts, settings in requests]
    pipe.model.compile_passes(**options)
    torch._dynamo.utils.counters.clear()
    first = codes(requests[0][0], **requests[0][1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(pipe.model.config.scales)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [codes(prompts, **settings) for prompts, settings in requests]
    assert torch.equal(first, expected[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_traced_passes_draw_the_same_whatever_the_prompt(pipe):
    check_compiled(pipe, backend="aot_eager")


@pytest.mark.slow
def test_compiled_passes_draw_the_same_whatever_the_prompt(pipe):
    check_compiled(pipe)
