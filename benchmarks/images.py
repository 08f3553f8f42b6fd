"""Encode and decode of 256 px images by preset B against the eager baseline, on the same (random) weights."""

from __future__ import annotations

import copy

import torch

from benchmarks import eager_baseline
from benchmarks.measure import Row, best_seconds
from tokenflow import TokenFlowConfig, TokenFlowModel


def build(preset: str) -> TokenFlowModel:
    torch.manual_seed(0)
    return TokenFlowModel(TokenFlowConfig.from_preset(preset)).eval()


def picture(size: int) -> torch.Tensor:
    """A smooth colour pattern with some noise, `[1, 3, size, size]` in [-1, 1]."""
    x = torch.linspace(0, 12, size)
    waves = torch.stack([torch.sin(k * x[:, None]) * torch.cos(x[None] + k) for k in (1, 2, 3)])
    return (0.8 * waves + 0.1 * torch.randn(3, size, size)).clamp(-1, 1)[None]


@torch.inference_mode()
def run(repeats: int) -> list[Row]:
    model, pixels = build("tokenflow-b-256"), picture(256)
    first, quantized = encode_row("encode B 256 px", model, pixels, repeats)
    return [
        first,
        decode_row("decode B 256 px", model, quantized, repeats, aim=4),
        decode_row("decode B enhanced 256 px", build("tokenflow-b-256-enhanced"), quantized, repeats, aim=4),
    ]


def encode_row(
    name: str, model: TokenFlowModel, pixels: torch.Tensor, repeats: int
) -> tuple[Row, torch.Tensor]:
    indices, quantized = eager_baseline.encode(model, pixels)
    equal = int((model.encode(pixels).indices == indices).sum())
    times = best_seconds(
        repeats, ours=lambda: model.encode(pixels), eager=lambda: eager_baseline.encode(model, pixels)
    )
    note = f"fp32, {equal} of {indices.numel()} indices equal"
    return Row(name, times, times["eager"] / times["ours"], 1.5, note), quantized


def decode_row(name: str, model: TokenFlowModel, quantized: torch.Tensor, repeats: int, aim: float) -> Row:
    half = copy.deepcopy(model).to(torch.bfloat16)  # encoders and codes stay in fp32
    image = eager_baseline.decode(model, quantized)[0]
    shift = (half.decode(quantized).pixel_values - image).abs().mean() / image.abs().mean()
    times = best_seconds(
        repeats,
        ours=lambda: half.decode(quantized),
        ours_fp32=lambda: model.decode(quantized),
        eager=lambda: eager_baseline.decode(model, quantized),
    )
    return Row(
        name, times, times["eager"] / times["ours"], aim, f"bf16, mean change of the image {shift:.2%}"
    )
