"""ViTamin image tower (Chen et al., "ViTamin: Designing Scalable Vision Models in the Vision-Language Era",
CVPR 2024).

A convolutional stem and two inverted-bottleneck stages shrink the image by 8, one more strided convolution
gives a 16x coarser grid of tokens, and pre-norm transformer blocks with a gated MLP do the rest. Notable:
- no class token and no position embedding: the convolutions carry the position, so any image size works;
- no final norm here: the feature is the output of the last block;
- parameter names are those of timm's `vitamin_*` models, so released weights load by name;
- attention through `scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

VITAMIN_XLARGE_256: dict[str, Any] = {
    "model_type": "tokenflow_vitamin",
    "image_size": 256,
    "conv_widths": [192, 384],
    "conv_depths": [2, 4],
    "hidden_size": 1152,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 2304,
}
"""The sizes of ViTamin-XL-256 (436 M parameters), as `ViTaminConfig(**VITAMIN_XLARGE_256)` takes them."""


@strict
class ViTaminConfig(PreTrainedConfig):
    """Sizes of a ViTamin tower; the defaults are ViTamin-XL-256.

    Args:
        image_size: nominal side of the square input in pixels; any multiple of 16 works.
        num_channels: input channels.
        conv_widths: widths of the two convolutional stages; the stem has the first.
        conv_depths: inverted-bottleneck blocks in each of them.
        conv_expansion: width of a block's depthwise convolution over its output width.
        hidden_size: transformer width.
        num_hidden_layers: transformer blocks.
        num_attention_heads: attention heads; must divide `hidden_size`.
        intermediate_size: width of the gated MLP.
        layer_norm_eps: epsilon of every norm, convolutional stages included.
        initializer_range: standard deviation of new weights.
    """

    model_type = "tokenflow_vitamin"

    image_size: int = 256
    num_channels: int = 3
    conv_widths: list[int] | tuple[int, ...] = (192, 384)
    conv_depths: list[int] | tuple[int, ...] = (2, 4)
    conv_expansion: int = 4
    hidden_size: int = 1152
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    intermediate_size: int = 2304
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    patch_size = 16

    def __post_init__(self, **kwargs: Any) -> None:
        self.conv_widths, self.conv_depths = list(self.conv_widths), list(self.conv_depths)
        if len(self.conv_widths) != 2 or len(self.conv_depths) != 2:
            raise ValueError(
                "ViTamin has two convolutional stages: give two conv_widths and two conv_depths, "
                f"not {self.conv_widths} and {self.conv_depths}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ViTaminStem(nn.Module):
    """Two 3x3 convolutions, the first with stride 2."""

    def __init__(self, config: ViTaminConfig):
        super().__init__()
        width = config.conv_widths[0]
        self.conv1 = nn.Conv2d(config.num_channels, width, 3, stride=2, padding=1)
        self.norm1 = ChannelLayerNorm(width, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.norm1(self.conv1(x))))


class ViTaminShortcut(nn.Module):
    """Average pooling with stride 2; a 1x1 `expand` where the width changes."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
        self.expand = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.pool(x))


class ViTaminConvBlock(nn.Module):
    """Inverted bottleneck: norm, 1x1 to 4x the output width, depthwise 3x3, 1x1; plus shortcut."""

    def __init__(self, config: ViTaminConfig, width_in: int, width_out: int, stride: int):
        super().__init__()
        inner = config.conv_expansion * width_out
        self.shortcut = ViTaminShortcut(width_in, width_out) if stride == 2 else nn.Identity()
        self.pre_norm = ChannelLayerNorm(width_in, eps=config.layer_norm_eps)
        self.conv1_1x1 = nn.Conv2d(width_in, inner, 1)
        self.conv2_kxk = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner)
        self.conv3_1x1 = nn.Conv2d(inner, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.conv1_1x1(self.pre_norm(x)))
        return self.conv3_1x1(F.gelu(self.conv2_kxk(inner))) + self.shortcut(x)


class ViTaminPool(nn.Module):
    """Channel norm and a 3x3 convolution with stride 2 to the transformer's width."""

    def __init__(self, config: ViTaminConfig):
        super().__init__()
        self.norm = ChannelLayerNorm(config.conv_widths[-1], eps=config.layer_norm_eps)
        self.proj = nn.Conv2d(config.conv_widths[-1], config.hidden_size, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x))


class ViTaminBackbone(nn.Module):
    """Image `[B, 3, H, W]` to a map `[B, D, H/16, W/16]`."""

    def __init__(self, config: ViTaminConfig):
        super().__init__()
        self.stem = ViTaminStem(config)
        self.stages = nn.ModuleList()
        width_in = config.conv_widths[0]
        for width, depth in zip(config.conv_widths, config.conv_depths, strict=True):
            first = ViTaminConvBlock(config, width_in, width, stride=2)
            rest = [ViTaminConvBlock(config, width, width, stride=1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            width_in = width
        self.pool = ViTaminPool(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.pool(x)


class ViTaminEmbeddings(nn.Module):
    """The backbone's map as row-major tokens `[B, N, D]`."""

    def __init__(self, config: ViTaminConfig):
        super().__init__()
        self.backbone = ViTaminBackbone(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # the flattened map is a transposed view; without the copy later layers would carry its strides along
        return self.backbone(pixel_values).flatten(2).transpose(1, 2).contiguous()


class ViTaminAttention(nn.Module):
    """Multi-head self-attention with a fused projection in the order q, k, v."""

    def __init__(self, config: ViTaminConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTaminMLP(nn.Module):
    """Gated MLP with a norm of its own (so it follows the block's `norm2` directly)."""

    def __init__(self, config: ViTaminConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.w0 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x)) * self.w1(x))


class ViTaminBlock(GradientCheckpointingLayer):
    def __init__(self, config: ViTaminConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = ViTaminAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTaminMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTaminModel(PreTrainedModel):
    """The tower: image to tokens, without head and final norm."""

    config_class = ViTaminConfig
    base_model_prefix = "vitamin"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ViTaminBlock", "ViTaminConvBlock"]  # noqa: RUF012 (transformers' way)

    def __init__(self, config: ViTaminConfig):
        super().__init__(config)
        self.patch_embed = ViTaminEmbeddings(config)
        self.blocks = nn.ModuleList([ViTaminBlock(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # every parameter sits in a Linear, Conv2d or (Channel)LayerNorm, and those the parent knows
        super()._init_weights(module)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Run the tower.

        Args:
            pixel_values: `[B, 3, H, W]`, already normalised with the mean and standard deviation that the
                weights expect (OpenAI CLIP's for the released ones); `H` and `W` multiples of 16.
            output_hidden_states: also return what enters and leaves each block.

        Returns:
            `last_hidden_state` `[B, (H/16)*(W/16), hidden_size]`, row-major, no class token, no final norm;
            `hidden_states`, if asked for: `num_hidden_layers + 1` of these.
        """
        hidden = self.patch_embed(pixel_values)
        states = [hidden]
        for block in self.blocks:
            hidden = block(hidden)
            if output_hidden_states:
                states.append(hidden)
        return BaseModelOutput(
            last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None
        )
