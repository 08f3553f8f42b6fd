"""The pixel encoder and decoder: the VQGAN layout of the released checkpoints (Sec. A.2).

Notable: downsampling pads right and bottom only (as the released weights expect); attention at the lowest
resolution runs through `scaled_dot_product_attention`; an optional pixel-unshuffle stem makes small models
several times cheaper.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.tokenizer.flows import ConvSpec


class GroupNorm(nn.GroupNorm):
    """Group norm of 32 groups that stays exact for float32 inference in channels-last.

    PyTorch's kernel for that format sums squares of whole images in float32, and decoded images were seen to
    be off by 1.5e-4. Here rows are summed first and added up in float64. `out` may be overwritten.
    """

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.float32 or not is_channels_last(x):
            return super().forward(x)

        def channels(t: Tensor) -> Tensor:  # [B, groups, C / groups] or [B, groups, 1] to [B, C, 1, 1]
            return t.expand(-1, -1, x.shape[1] // self.num_groups).flatten(1)[:, :, None, None].float()

        mean = self.group_means(x)
        out = torch.sub(x, channels(mean), out=out)
        variance = self.group_means(out.square_())
        scale = self.weight.view(self.num_groups, -1) * (variance + self.eps).rsqrt()
        shift = self.bias.view(self.num_groups, -1) - mean * scale
        return torch.addcmul(channels(shift), x, channels(scale), out=out)

    def group_means(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to float64 `[B, groups, 1]`."""
        rows = x.permute(0, 2, 3, 1).mean(2).double()
        return rows.mean(1).unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def fastest_format(x: Tensor, patch: int) -> Tensor:
    """Channels-last for full-resolution inference on CPUs and for half precision; else as it is."""
    if patch > 1 or (x.dtype == torch.float32 and (x.device.type != "cpu" or torch.is_grad_enabled())):
        return x
    return x.contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        # In place where possible: at full resolution, asking for memory costs more than the arithmetic.
        normed = F.silu(self.norm1(x), inplace=True)
        h = self.conv1(normed)
        h = F.silu(self.norm2(h, out=normed if normed.shape == h.shape else None), inplace=True)
        return self.conv2(h).add_(self.shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # [B, 1, HW, C]
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only: the released weights expect it


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if asked, then a change of resolution."""

    def __init__(
        self, in_channels: int, channels: int, blocks: int, attention: bool, resample: nn.Module | None
    ):
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else channels, channels) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(channels) for _ in range(blocks if attention else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self.resample is None else self.resample(x)


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)
    )


class PixelEncoder(nn.Module):
    """`[B, 3, H, W]` in [-1, 1] to `[B, latent_channels, H / stride, W / stride]`."""

    def __init__(self, spec: ConvSpec):
        super().__init__()
        self.patch = spec.patch
        widths = [spec.width * m for m in spec.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3 * spec.patch**2, spec.width, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[i - 1] if i else spec.width,
                w,
                spec.blocks,
                i == last,
                None if i == last else Downsample(w),
            )
            for i, w in enumerate(widths)
        )
        self.mid = middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], spec.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(fastest_format(F.pixel_unshuffle(x, self.patch), self.patch))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))


class PixelDecoder(nn.Module):
    """`[B, latent_channels, h, w]` to `[B, 3, h * stride, w * stride]`; no output activation, no clamp."""

    def __init__(self, spec: ConvSpec):
        super().__init__()
        self.patch = spec.patch
        widths = [spec.width * m for m in reversed(spec.multipliers)]  # lowest resolution first
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.levels = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, spec.blocks, i == 0, None if i == last else Upsample(w))
            for i, w in enumerate(widths)
        )
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * spec.patch**2, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive adversarial weight looks at."""
        return cast(nn.Parameter, self.conv_out.weight)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(fastest_format(z, self.patch)))
        for level in self.levels:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x), inplace=True)), self.patch)
