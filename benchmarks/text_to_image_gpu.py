"""A language model of Llama 2's 7B shape on a GPU: seconds a picture, from the prompt to its pixels.

Random weights in bfloat16, the 256-pixel tokenizer, 25 passes (one at the first scale, three at each of the
eight others), guidance 7.5, so that a pass computes two rows a picture. The paper needs 2.7 s a picture on an
A100. The floor is the time it takes to read the weights once a pass, at the rate at which the device copies
its own memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.measure import Row
from tokenflow import (
    TextToImagePipeline,
    TokenFlowConfig,
    TokenFlowForTextToImage,
    TokenFlowModel,
    TokenFlowTextToImageConfig,
)
from tokenflow.generation import graphs
from tokenflow.generation.prompt import marker_ids
from tokenflow.training.text_tokenizer import train_text_tokenizer

PAPER_SECONDS = 2.7  # a picture, 7B on an A100
WANTED_SECONDS = 0.5  # ours, at batch 1
GIGABYTES = 40  # of GPU memory, at least
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA_7B |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32001}
PROMPTS = ("a photo of a corgi on a beach", "a red bus", "an oil painting of a harbour at dawn", "two owls")


def build(
    sizes: dict[str, int], preset: TokenFlowConfig, device: str, dtype: torch.dtype
) -> TextToImagePipeline:
    """A pipeline of random weights, made on the device itself."""
    text_tokenizer = train_text_tokenizer(PROMPTS, 512)
    opening, closing = marker_ids(text_tokenizer)
    config = TokenFlowTextToImageConfig(
        text_config=LlamaConfig(**sizes),
        codebook_size=preset.codebook_size,
        scales=preset.scales,
        flow_dims=[flow.dim for flow in preset.flow_specs],
        image_open_ids=opening,
        image_close_ids=closing,
        pad_token_id=text_tokenizer.pad_token_id,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        tokenizer = TokenFlowModel(preset)
        with _default_dtype(dtype):
            model = TokenFlowForTextToImage(config)
    model.set_codebooks(tokenizer)
    return TextToImagePipeline(model, text_tokenizer, tokenizer.to(dtype))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def draw(pipe: TextToImagePipeline, pictures: int, **settings: Any) -> Any:
    """`pictures` at once, from prompts in turn."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(pictures)]
    return pipe(prompts, seed=list(range(pictures)), output_type="pt", batch_size=pictures, **settings)


def seconds(pipe: TextToImagePipeline, pictures: int, repeats: int) -> float:
    """Median seconds a picture; pixels end on the CPU, so nothing is left in flight."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        draw(pipe, pictures)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / pictures


def weight_bytes(model: TokenFlowForTextToImage) -> int:
    """What one pass must read: layers, norms and the codes' rows of the head, not the embedding tables."""
    head = model.lm_head.weight[model.config.text_vocab_size :]
    read = [*model.model.layers.parameters(), *model.model.visual_projector.parameters(), head]
    return sum(weight.numel() * weight.element_size() for weight in read)


def copy_rate(device: str, size: int = 2**31) -> float:
    """Bytes a second that the device reads and writes when it copies `size` bytes within its own memory."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size / min(times[1:])


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def compare(pipe: TextToImagePipeline, pictures: int, repeats: int) -> tuple[dict[str, float], str]:
    """Seconds a picture of plain and captured passes, and how far their codes agree."""
    graphed: dict[str, Callable[[], None]] = {"plain": lambda: _captured(pipe, False)}
    if pipe.device.type == "cuda":
        graphed["captured"] = lambda: _captured(pipe, True)
    found: dict[str, float] = {}
    codes: dict[str, Tensor] = {}
    for name, prepare in graphed.items():
        prepare()
        codes[name] = draw(pipe, pictures).codes  # the first time, it captures
        found[name] = seconds(pipe, pictures, repeats)
    _captured(pipe, False)
    # The captured passes pad prompts to the whole text block; with the same padding codes must be equal.
    pipe.model.graphed = {}
    capture, graphs.capture = graphs.capture, lambda run, pool: run
    try:
        padded = draw(pipe, pictures).codes
    finally:
        graphs.capture, pipe.model.graphed = capture, None
    shares = {name: (ours == padded).double().mean().item() for name, ours in codes.items()}
    return found, ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def _captured(pipe: TextToImagePipeline, wanted: bool) -> None:
    pipe.model.graphed = None
    if wanted:
        pipe.model.capture_passes()


def rows_for(pipe: TextToImagePipeline, batches: tuple[int, ...], repeats: int) -> list[Row]:
    """A row a batch size: ours against the paper's seconds, with the share of the bandwidth limit."""
    device = str(pipe.device)
    size, rate = weight_bytes(pipe.model), copy_rate(device, 2**31 if device != "cpu" else 2**24)
    scales = len(pipe.model.config.scales)
    passes = 1 + 3 * (scales - 1)
    floor = passes * size / rate
    rows = []
    for pictures in batches:
        found, equal = compare(pipe, pictures, repeats)
        best = min(found, key=found.__getitem__)
        start = time.perf_counter()
        pipe.decode(
            torch.zeros(pictures, pipe.model.config.num_image_tokens, dtype=torch.int64, device=device), "pt"
        )
        decoding = (time.perf_counter() - start) / pictures
        note = f"{passes} passes over {size / 1e9:.1f} GB at {rate / 1e12:.2f} TB/s: {floor:.3f} s a batch, "
        note += f"{floor / (found[best] * pictures):.0%} of that limit reached; guidance makes "
        note += f"{2 * pictures} rows of {pictures}; decoding {decoding:.3f} s a picture; codes equal to "
        note += f"those of padded plain passes: {equal}"
        times = {best: found[best], **found, "paper, A100": PAPER_SECONDS}
        aim = PAPER_SECONDS / WANTED_SECONDS if pictures == 1 else None
        name = f"7B text to image, seconds a picture, batch {pictures}"
        rows.append(Row(name, times, PAPER_SECONDS / found[best], aim, note))
    return rows


def run(repeats: int) -> list[Row]:
    """None, with a line that says why, where there is no GPU that holds the model."""
    if not torch.cuda.is_available():
        print("text-to-image-7b: skipped, there is no CUDA device", file=sys.stderr)
        return []
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < GIGABYTES * 1e9:
        print(
            f"text-to-image-7b: skipped, it needs {GIGABYTES} GB of GPU memory, here are {memory / 1e9:.0f}",
            file=sys.stderr,
        )
        return []
    preset = TokenFlowConfig.from_preset("tokenflow-b-256-enhanced")
    return rows_for(build(LLAMA_7B, preset, "cuda", torch.bfloat16), (1, 8), repeats)
