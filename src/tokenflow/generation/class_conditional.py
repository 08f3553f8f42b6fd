"""Class-conditional generation: the VAR transformer (Tian et al. 2024) over TokenFlow tokens (Fig. 6).

One dial, the depth d: width 64 d, d heads; d = 16 has about 310 M parameters. Notable, next to a usual
transformer:
- the class enters twice: its embedding is the input of the first scale, and it gives shift, scale and gate of
  every layer (AdaLN) and of the last norm;
- queries and keys are l2-normalised, with a learned temperature per head;
- the unconditional model is one more class, learned by dropping labels.

The inputs of later scales, the guidance ramp and the sampling are those of the language model
(`generation/codes.py`, `generation/sampler.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from tokenflow.errors import UserError
from tokenflow.generation.codes import CodeTable
from tokenflow.generation.masks import Segment, block_numbers, dense_mask
from tokenflow.generation.predictor import ScaleCache
from tokenflow.generation.sampler import (
    KnownTokens,
    SamplingSettings,
    ScaleStep,
    sample_scales,
    seeds_for,
)
from tokenflow.tokenizer.configuration import check_scales
from tokenflow.tokenizer.modeling import TokenFlowModel

HEAD_DIM = 64
FIRST_TEMPERATURE, MOST_TEMPERATURE = 4.0, 100.0  # factors on the cosines of queries and keys


class TokenFlowClassToImageConfig(PreTrainedConfig):
    r"""Configuration of a [`TokenFlowForClassToImage`].

    Args:
        depth (`int`): d, layers; the width is 64 d.
        num_classes (`int`): labels; one more embedding stands for "no class".
        codebook_size (`int`): K.
        scales (`list[int]`): grid sides of the tokenizer, coarse to fine.
        flow_dims (`list[int]`): channels of the tokenizer's flows; D is their sum.
        class_dropout (`float`): share of the labels that training hides, for classifier-free guidance.
        drop_path (`float` or None): of the last layer, rising linearly from 0; None is 0.1 d / 24, as in VAR.

    Raises:
        UserError: a value that no model can have.
    """

    model_type = "tokenflow_class_to_image"

    depth: int = 16
    num_classes: int = 1000
    codebook_size: int = 32768
    scales: list[int] | tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    flow_dims: list[int] | tuple[int, ...] = (32, 8)
    class_dropout: float = 0.1
    drop_path: float | None = None

    def __post_init__(self, **kwargs):
        self.scales = check_scales(self.scales)
        self.flow_dims = [int(dim) for dim in self.flow_dims]
        if self.drop_path is None:
            self.drop_path = 0.1 * self.depth / 24
        for name in ("depth", "num_classes", "codebook_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("class_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """C, 64 for each layer."""
        return HEAD_DIM * self.depth

    @property
    def num_image_tokens(self) -> int:
        """L, tokens of an image over all scales."""
        return sum(side * side for side in self.scales)


@dataclass
class ClassToImageOutput(ModelOutput):
    """Attributes:
    loss: mean over all codes of all rows, nats.
    nll: `[B, L]` float32, each code's, detached.
    """

    loss: Tensor = None  # type: ignore[assignment]  # a ModelOutput's fields need defaults
    nll: Tensor = None  # type: ignore[assignment]


class BranchOutput(nn.Linear):
    """The last layer of a residual branch; starts smaller the deeper the model is."""


class Adaptation(nn.Linear):
    """The condition `[B, C]` to `parts` vectors `[B, 1, C]`, of which the first `gates` gate a branch."""

    def __init__(self, width: int, parts: int, gates: int = 0):
        super().__init__(width, parts * width)
        self.parts, self.gate_rows = parts, gates * width

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(F.silu(condition))[:, None].chunk(self.parts, dim=2)


class Attention(nn.Module):
    """Cosine attention with a learned temperature per head."""

    def __init__(self, width: int, heads: int, layer: int):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # A bias on the keys would be taken out again by the softmax, were they not normalised.
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.log_temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(FIRST_TEMPERATURE)))
        self.proj = BranchOutput(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        temperature = self.log_temperature.clamp_max(math.log(MOST_TEMPERATURE)).exp()
        q = (F.normalize(q.float(), dim=-1) * temperature).to(v.dtype)
        k = F.normalize(k.float(), dim=-1).to(v.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(GradientCheckpointingLayer):
    """Attention and MLP, each between an adaptive norm and a gate."""

    def __init__(self, width: int, heads: int, layer: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.attention = Attention(width, heads, layer)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), BranchOutput(4 * width, width)
        )
        self.adaptation = Adaptation(width, 6, gates=2)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None, cache=None) -> Tensor:
        gate_a, gate_b, scale_a, scale_b, shift_a, shift_b = self.adaptation(condition)
        x = x + self._drop(gate_a * self.attention(_modulate(x, scale_a, shift_a), mask, cache))
        return x + self._drop(gate_b * self.mlp(_modulate(x, scale_b, shift_b)))

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth: the whole branch of a row is left out, the others make up for it."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class TokenFlowForClassToImage(PreTrainedModel):
    r"""The class-conditional model.

    Example:

    ```python
    config = TokenFlowClassToImageConfig(depth=16, scales=tokenflow.config.scales)
    model = TokenFlowForClassToImage(config)
    model.set_codebooks(tokenflow)
    model(labels, tokenflow.encode(pixel_values).indices).loss.backward()
    ```
    """

    config_class = TokenFlowClassToImageConfig
    base_model_prefix = "model"
    main_input_name = "labels"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own way)
    _keep_in_fp32_modules_strict = ["code_table"]  # noqa: RUF012

    config: TokenFlowClassToImageConfig

    def __init__(self, config: TokenFlowClassToImageConfig):
        super().__init__(config)
        width, first = config.hidden_size, config.scales[0] ** 2
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last row: no class
        self.start_position = nn.Embedding(first, width)
        self.visual_projection = nn.Linear(sum(config.flow_dims), width)
        self.scale_embedding = nn.Embedding(len(config.scales), width)
        self.image_position_embedding = nn.Embedding(config.num_image_tokens, width)
        paths = [(config.drop_path or 0.0) * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(width, config.depth, i, path) for i, path in enumerate(paths))
        self.head_adaptation = Adaptation(width, 2)
        self.head = nn.Linear(width, config.codebook_size)
        self.code_table = CodeTable(config.codebook_size, sum(config.flow_dims), config.scales)
        self.offsets = [sum(s * s for s in config.scales[:k]) for k in range(len(config.scales) + 1)]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = (3 * self.config.hidden_size) ** -0.5
        if isinstance(module, Adaptation):
            fresh = nn.init.trunc_normal_(torch.empty_like(module.weight), std=0.5 * std)
            fresh[: module.gate_rows] *= 2e-5  # gates start almost closed: each layer is nearly the identity
            init.copy_(module.weight, fresh)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            share = 1.0
            if isinstance(module, BranchOutput):
                share = (2 * self.config.depth) ** -0.5
            elif module is self.head:
                share = 0.02
            init.trunc_normal_(module.weight, std=share * std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, CodeTable):
            init.zeros_(module.codes)
        elif isinstance(module, Attention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
            init.constant_(module.log_temperature, math.log(FIRST_TEMPERATURE))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; names of bundled models come first, and weights are loaded as float32 unless
        `dtype` says otherwise."""
        from tokenflow.bundled import resolve

        kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(resolve(pretrained_model_name_or_path), *args, **kwargs)

    def set_codebooks(self, tokenizer: TokenFlowModel) -> None:
        """Copy the code vectors of the image tokenizer; they are frozen and saved with this model."""
        self.code_table.take_from(tokenizer)

    # training
    def forward(self, labels: Tensor, codes: Tensor, input_codes: Tensor | None = None) -> ClassToImageOutput:
        """Cross entropy of all scales at once; in training mode some labels are hidden.

        Args:
            labels: `[B]` int64 in [0, num_classes]; num_classes itself means "no class".
            codes: `[B, L]` integers in [0, K).
            input_codes: `[B, L]`, what the model sees in place of `codes`, which it learns.

        Raises:
            UserError: shapes that do not fit, labels out of range, a model without code vectors.
        """
        if list(codes.shape) != [len(labels), self.config.num_image_tokens]:
            shape = [len(labels), self.config.num_image_tokens]
            raise UserError(f"codes must be {shape} here, got {list(codes.shape)}")
        self.code_table.check_set()
        codes = codes.long()
        if self.training:
            hidden = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
            labels = labels.masked_fill(hidden, self.config.num_classes)
        condition = self.embed_classes(labels)
        features = self.code_table.all_inputs(codes if input_codes is None else input_codes.long())
        x = torch.cat([self.embed_start(condition), self.embed_scales(features, first=1)], dim=1)
        segments = [Segment(side * side, "scale") for side in self.config.scales]
        blocks = block_numbers(segments, x.device)
        mask = dense_mask(blocks, torch.ones(1, len(blocks), dtype=torch.bool, device=x.device))
        nll = F.cross_entropy(self.logits(x, condition, mask).transpose(1, 2), codes, reduction="none")
        return ClassToImageOutput(loss=nll.mean(), nll=nll.detach())

    # parts, also of sampling
    def embed_classes(self, labels: Tensor) -> Tensor:
        """`[B]` labels to the condition `[B, C]`.

        Raises:
            UserError: a label out of range.
        """
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high > self.config.num_classes:
            raise UserError(f"labels run from {low} to {high}; this model has 0 to {self.config.num_classes}")
        return self.class_embedding(labels)

    def embed_start(self, condition: Tensor) -> Tensor:
        """Input of the first scale, `[B, s_0^2, C]`: the class itself."""
        x = condition[:, None] + self.start_position.weight
        return x + self.scale_embedding.weight[0] + self.image_position_embedding.weight[: self.offsets[1]]

    def embed_scales(self, features: Tensor, first: int) -> Tensor:
        """Features `[B, n, D]` of scale `first` and those after it to `[B, n, C]`."""
        start, n = self.offsets[first], features.shape[1]
        sides = [self.config.scales[k] ** 2 for k in range(first, self.offsets.index(start + n))]
        rows = torch.arange(first, first + len(sides), device=features.device)
        rows = rows.repeat_interleave(torch.tensor(sides, device=features.device), output_size=n)
        x = self.visual_projection(features.to(self.visual_projection.weight.dtype))
        return x + self.scale_embedding(rows) + self.image_position_embedding.weight[start : start + n]

    def logits(self, x: Tensor, condition: Tensor, mask: Tensor | None = None, cache=None) -> Tensor:
        """Inputs `[B, n, C]` to logits `[B, n, K]` float32; `mask` None lets all see all, and the cache."""
        for block in self.blocks:
            x = block(x, condition, mask, cache)
        scale, shift = self.head_adaptation(condition)
        return self.head(_modulate(x, scale, shift)).float()

    # sampling
    def generate_indices(
        self,
        labels: Tensor,
        *,
        guidance_scale: float = 1.5,
        top_k: Sequence[int] = (900,),
        top_p: Sequence[float] = (0.96,),
        temperature: float = 1.0,
        seed: int | Sequence[int] | None = None,
        known: KnownTokens | None = None,
        callback: Callable[[ScaleStep], None] | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Sample images: their codes `[B, L]` int64. The defaults are VAR's, one pass a scale.

        Args:
            labels: `[B]` int64.
            guidance_scale, top_k, top_p, temperature: see `SamplingSettings`.
            seed: an int for every image, or B of them; None draws them. An image depends on its seed alone.
            known: codes that are given, see `KnownTokens`.
            callback: called with a `ScaleStep` a scale and batch.
            batch_size: images at a time; by default one on a CPU, where that keeps results bitwise equal
                whatever the batch, and all of them elsewhere.

        Raises:
            UserError: labels, settings, seeds or known codes that do not fit.
        """
        settings = SamplingSettings(guidance_scale, top_k, top_p, temperature)
        self.code_table.check_set()
        if known is not None:
            known.check(len(labels), self.code_table)
        seeds = seeds_for(seed, len(labels))
        size = batch_size or (1 if self.device.type == "cpu" else len(labels))
        done = []
        for first in range(0, len(labels), size):
            part = slice(first, min(first + size, len(labels)))
            rows = labels[part].to(self.device)
            if settings.guided:
                rows = torch.cat([rows, torch.full_like(rows, self.config.num_classes)])
            given = None if known is None else known.of(part)
            steps = sample_scales(ClassPredictor(self, rows), self.code_table, settings, seeds[part], given)
            for position, codes in enumerate(steps):
                if callback is not None:
                    callback(ScaleStep(range(part.start, part.stop), position, codes))
            done.append(codes)
        return torch.cat(done)


class ClassPredictor:
    """How the class-conditional model takes part in sampling, for R labels; see `NextScalePredictor`."""

    def __init__(self, model: TokenFlowForClassToImage, labels: Tensor):
        self.model, self.condition = model, model.embed_classes(labels)
        self.cache = ScaleCache(model.config.depth, model.config.num_image_tokens)

    def step(self, position: int, features: Tensor | None, keep: bool) -> Tensor:
        model, condition = self.model, self.condition
        x = model.embed_start(condition) if features is None else model.embed_scales(features, position)
        return model.logits(x, condition, cache=self.cache.at(model.offsets[position], keep))


__all__ = ["ClassToImageOutput", "TokenFlowClassToImageConfig", "TokenFlowForClassToImage"]
