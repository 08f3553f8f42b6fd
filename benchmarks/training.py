"""Training: extra memory of a quantizer step with 131,072 codes, and images per second of the tiny recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.measure import Row, best_seconds, extra_mebibytes
from tokenflow.recipes.tokenizer import tokenflow_tiny
from tokenflow.tokenizer.modeling import Quantizer
from tokenflow.tokenizer.quantizer import SharedMappingQuantizer
from tokenflow.tokenizer.semantic import SemanticTeacher, VisionTower
from tokenflow.training.tokenizer import GeneratorStep, build_config, build_losses, build_model

SCALES = (1, 2, 4, 6, 8, 10, 12, 14, 16)
MEMORY_LIMIT = 1024  # MiB


def quantizer_step(codebook_size: int, batch: int) -> Callable[[], object]:
    """Forward and backward of the multi-scale quantizer on `[batch, 40, 16, 16]`, no entropy loss."""
    torch.manual_seed(0)
    flows = [("semantic", 32, 1.0), ("pixel", 8, 1.0)]
    quantizer = Quantizer(SharedMappingQuantizer(flows, codebook_size), SCALES).train()
    features = torch.randn(batch, 40, 16, 16, requires_grad=True)

    def step() -> None:
        out = quantizer(features)
        (out.quantized.square().mean() + sum(out.losses.values())).backward()

    return step


def memory_task(codebook_size: int, batch: int) -> Callable[[], object]:
    torch.set_num_threads(2)
    quantizer_step(64, 1)()  # what a first call loads stays out of the figure
    return quantizer_step(codebook_size, batch)


def quantizer_row(repeats: int) -> Row:
    step = quantizer_step(131072, 8)
    times = best_seconds(max(1, repeats // 2), ours=step)
    used = extra_mebibytes(memory_task, 131072, 8)
    note = f"{used:,.0f} of {MEMORY_LIMIT} MiB extra, 8 images, with gradients"
    return Row("quantizer training step, K=131,072", times, MEMORY_LIMIT / used, 1, note)


def tiny_steps(batch: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """An optimizer step of `tokenflow-tiny` with random weights and a random teacher, in bf16 and in fp32."""
    recipe = tokenflow_tiny()
    config = build_config(recipe.model)
    flow = config.flow_specs[0]
    torch.manual_seed(0)
    tower = VisionTower(flow.encoder)
    teacher = SemanticTeacher(tower, torch.nn.Linear(tower.width, flow.target_dim, bias=False))
    model = build_model(replace(recipe.model, semantic_init=False), config, teacher)
    step = GeneratorStep(model, build_losses(recipe, config, teacher), teacher)
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-5, fused=True)
    images = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8)

    def train(mixed: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = step(images, 0)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    yield "bf16", lambda: train(True)
    yield "fp32", lambda: train(False)


def run(repeats: int, batch: int = 32) -> list[Row]:
    times = best_seconds(max(1, repeats // 2), **dict(tiny_steps(batch)))
    note = f"{batch / times['bf16']:.0f} images/s at batch {batch}, without the loader"
    return [
        quantizer_row(repeats),
        Row("training step, tiny recipe, bf16", times, times["fp32"] / times["bf16"], None, note),
    ]
