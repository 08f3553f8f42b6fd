"""The decoder of the text-to-image model: Llama's layers with moved norms, and what enters them.

Made of transformers' Llama parts; the two differences are named where they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from tokenflow.generation.configuration import TokenFlowTextToImageConfig

QK_NORM_EPS = 1e-6  # fixed in the released code, whatever rms_norm_eps is


class RMSNorm(nn.RMSNorm):
    """Llama's norm as one kernel: computed in float32, returned in the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(LlamaAttention):
    """Llama's attention with query and key norms; the mask alone says who sees whom."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_norm = RMSNorm(self.head_dim, eps=QK_NORM_EPS)
        self.k_norm = RMSNorm(self.head_dim, eps=QK_NORM_EPS)
        self.is_causal = False

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None):  # type: ignore[override]
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        q, k = (x.to(v.dtype) for x in apply_rotary_pos_emb(q, k, *position_embeddings))  # autocast: float32
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # Masks are boolean, so there is no eager attention here.
        attend = ALL_ATTENTION_FUNCTIONS[
            "flex_attention" if isinstance(attention_mask, BlockMask) else "sdpa"
        ]
        dropout = self.attention_dropout if self.training else 0.0
        out, _ = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1))


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, position_embeddings, attention_mask=None, past_key_values=None) -> Tensor:
        attended = self.self_attn(x, position_embeddings, attention_mask, past_key_values)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(x))


class VisualProjector(nn.Module):
    """Code vectors to hidden states; LLaVA's projector, also in its key names."""

    def __init__(self, dim: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Decoder(nn.Module):
    """Embeddings of text and scales, the layers, the last norm."""

    def __init__(self, config: TokenFlowTextToImageConfig):
        super().__init__()
        text, self.scales = config.text_config, config.scales
        self.embed_tokens = nn.Embedding(config.text_vocab_size, text.hidden_size)
        self.visual_projector = VisualProjector(config.code_dim, text.hidden_size)
        # Row 0 is for text, row k + 1 for scale k. Row 1 is used only where the first scale has more than one
        # token: the released schedules begin with 1 x 1, whose only position is the last one of the text.
        self.scale_embedding = nn.Embedding(len(config.scales) + 1, text.hidden_size)
        self.image_position_embedding = nn.Embedding(config.num_image_tokens, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text, i) for i in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=text)
        self.offsets = [sum(s * s for s in self.scales[:k]) for k in range(len(self.scales) + 1)]

    def embed_text(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids) + self.scale_embedding.weight[0]

    def embed_prefix(self, ids: Tensor) -> Tensor:
        """Prefix `[B, P]` to `[B, P - 1 + s_0^2, H]`: the last positions predict the first scale."""
        x = self.embed_text(ids)
        positions = self.image_position_embedding.weight[: self.offsets[1]]
        x = torch.cat([x[:, :-1], x[:, -1:] + positions[0]], dim=1)
        if len(positions) == 1:
            return x
        rest = positions[1:] + self.scale_embedding.weight[1]
        return torch.cat([x, rest.expand(len(x), -1, -1)], dim=1)

    def embed_scales(self, features: Tensor, first: int) -> Tensor:
        """Features `[B, n, D]` of scale `first` and those after it to `[B, n, H]`."""
        start, n = self.offsets[first], features.shape[1]
        # No index tensor: to make one would wait for the device, and could not be captured in a CUDA graph.
        rows = self.scale_embedding.weight[first + 1 : self.offsets.index(start + n) + 1]
        sides = self.scales[first : first + len(rows)]
        scales = [row.expand(side**2, -1) for row, side in zip(rows, sides, strict=True)]
        x = self.visual_projector(features.to(self.visual_projector.linear_1.weight.dtype))
        return x + torch.cat([rows[:0], *scales]) + self.image_position_embedding.weight[start : start + n]

    def embed_after(self, ids: Tensor) -> Tensor:
        """What follows the image: the zero vector left over by the shift, then text `[B, n]`."""
        zero = self.scale_embedding.weight[0].expand(len(ids), 1, -1)
        return torch.cat([zero, self.embed_text(ids)], dim=1)

    def forward(self, x: Tensor, first_position: int, attention_mask=None, past_key_values=None) -> Tensor:
        """Hidden states `[B, n, H]` of embeddings at positions `first_position`, ... of the one axis."""
        positions = torch.arange(first_position, first_position + x.shape[1], device=x.device)[None]
        rotary = self.rotary_emb(x, positions)
        for layer in self.layers:
            x = layer(x, rotary, attention_mask, past_key_values)
        return self.norm(x)
