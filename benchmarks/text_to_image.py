"""Text to image with the key-value cache against sampling that computes everything again in each pass.

12 layers of width 768, 9 scales to 16 x 16, 32,768 codes, three passes a scale, on random weights. The plain
side is written as one would from the paper: the whole text block with its padding, no cache, logits of the
full vocabulary at every position. Both sides draw with the same noise, so they give the same codes but for
near ties.
"""

from __future__ import annotations

import statistics
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from benchmarks import measure
from benchmarks.measure import Row
from tokenflow import TokenFlowForTextToImage, TokenFlowTextToImageConfig
from tokenflow.generation.masks import block_numbers, dense_mask
from tokenflow.generation.modeling import join_prefixes
from tokenflow.generation.predictor import CachedPredictor
from tokenflow.generation.sampler import NextScalePredictor, SamplingSettings, sample_scales

SCALES = (1, 2, 4, 6, 8, 10, 12, 14, 16)
WARM_UP = 3  # scales of either side, before its clock starts
PROMPT_TOKENS = 16  # of the 128 of the text block; the others are padding


class PlainPredictor:
    """The same logits with no cache, padding kept, and the full vocabulary computed everywhere."""

    def __init__(self, model: TokenFlowForTextToImage, input_ids: Tensor, real: Tensor):
        self.model, self.input_ids, self.real = model, input_ids, real
        self.kept: list[Tensor] = []
        self.positions = 0

    def step(self, position: int, features: Tensor | None, keep: bool) -> Tensor:
        model, prefix = self.model, self.input_ids.shape[1]
        x = model.model.embed_prefix(self.input_ids)
        if features is not None:
            seen = torch.cat([*self.kept[: position - 1], features], dim=1)
            x = torch.cat([x, model.model.embed_scales(seen, first=1)], dim=1)
            if keep:
                self.kept.append(features)
        blocks = block_numbers(model.segments(prefix, position + 1))
        mask = dense_mask(blocks, F.pad(self.real, (0, x.shape[1] - prefix), value=True))
        self.positions += x.shape[1]
        logits = model.lm_head(model.model(x, model.image_start - prefix, mask)).float()
        return logits[:, -(SCALES[position] ** 2) :, model.config.text_vocab_size :]


def build(
    layers: int = 12, width: int = 768, codebook_size: int = 32768, scales: tuple[int, ...] = SCALES
) -> TokenFlowForTextToImage:
    """A model of random weights whose codes are not all the same."""
    torch.manual_seed(0)
    heads = max(1, width // 64)
    text = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32001}
    config = TokenFlowTextToImageConfig(
        text_config=LlamaConfig(**text),
        codebook_size=codebook_size,
        scales=scales,
        image_open_ids=[5, 6, 7],
        image_close_ids=[8],
    )
    model = TokenFlowForTextToImage(config).eval()
    flows = (torch.randn(codebook_size, dim) for dim in config.flow_dims)
    model.code_table.set_codes(torch.cat([F.normalize(flow, dim=1) for flow in flows], dim=1))
    return model


def prefixes(model: TokenFlowForTextToImage, rows: int, tokens: int = PROMPT_TOKENS) -> tuple[Tensor, Tensor]:
    """`rows` random prompts and as many empty ones, in the full text block: ids and mask."""
    ids = torch.randint(10, 1000, (2 * rows, model.image_start))
    ids[:, -len(model.config.image_open_ids) :] = torch.tensor(model.config.image_open_ids)
    real = torch.zeros_like(ids)
    real[:rows, -tokens - len(model.config.image_open_ids) :] = 1
    real[rows:, -1 - len(model.config.image_open_ids) :] = 1
    return ids, real


def draw(
    model: TokenFlowForTextToImage, predictor: NextScalePredictor, rows: int, scales: int | None = None
) -> Tensor:
    """The codes of all scales, or of the first few."""
    drawn = sample_scales(predictor, model.code_table, SamplingSettings(), list(range(rows)))
    *_, codes = islice(drawn, scales)
    return codes


def compare(
    model: TokenFlowForTextToImage, rows: int, turns: int = 1
) -> tuple[dict[str, float], float, dict[str, int]]:
    """Seconds an image, the share of equal codes, and positions computed a row, of both sides.

    Both are warmed up; ours is the median of `turns`, the plain side takes one.
    """
    ids, real = prefixes(model, rows)
    kinds = {
        "ours": lambda: CachedPredictor(model, *join_prefixes([(ids, real)])),
        "plain": lambda: PlainPredictor(model, ids, real.bool()),
    }
    seconds, codes, positions = {}, {}, {}
    for name, make in kinds.items():
        draw(model, make(), rows, WARM_UP)
        times = []
        for _ in range(turns if name == "ours" else 1):
            predictor = make()
            start = measure.clock()
            codes[name] = draw(model, predictor, rows)
            times.append((measure.clock() - start) / rows)
        seconds[name] = statistics.median(times)
        positions[name] = predictor.positions
    return seconds, (codes["ours"] == codes["plain"]).double().mean().item(), positions


def run(repeats: int) -> list[Row]:
    """Few turns whatever `repeats` says: the plain side takes minutes, and is 25 passes of the same kind."""
    model = build()
    rows = []
    for batch, turns in ((1, 3), (4, 1)):
        seconds, equal, positions = compare(model, batch, turns)
        fewer = positions["plain"] / positions["ours"]
        note = f"{equal:.4%} equal; {positions['ours']:,} positions a row, {fewer:.1f}x fewer "
        note += f"(prompts of {PROMPT_TOKENS} in a block of 128, whose padding only the plain side computes)"
        ratio = seconds["plain"] / seconds["ours"]
        rows.append(Row(f"text to image, seconds an image, batch {batch}", seconds, ratio, 4, note))
    return rows
