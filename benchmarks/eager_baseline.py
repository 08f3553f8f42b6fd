"""A plain eager fp32 tokenizer, as one would write it from the paper: what the speed figures compare with.

It computes on the weights of a `TokenFlowModel` with CLIP as semantic encoder, so that indices and images can
be compared: two distance matrices, an argmin and a one-hot product at every scale, codebooks normalised at
every call, attention as two products around a softmax, swish as a product with a sigmoid, everything in
fp32 and in PyTorch's default memory format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow import TokenFlowModel
from tokenflow.tokenizer.pixel import AttentionBlock, Level, PixelDecoder, PixelEncoder, ResidualBlock


def encode(model: TokenFlowModel, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, 3, H, W]` in [-1, 1] to indices `[B, L]` and the quantized map `[B, D, g, g]`."""
    semantic = clip_features(model.encoders["semantic"], pixel_values)
    pixel = model.encoders["pixel"]
    features = torch.cat([semantic, pixel.head(pixel_encoder(pixel.network, pixel_values))], dim=1)
    codebooks = [model.quantizer.quantizer.codebooks[name] for name in ("semantic", "pixel")]
    grid = model.config.scales[-1]
    residual, total, indices = features, torch.zeros_like(features), []
    for side in model.config.scales:
        index, codes = quantize(F.adaptive_avg_pool2d(residual, side), codebooks)
        step = F.interpolate(codes, size=(grid, grid), mode="bicubic")
        residual, total = residual - step, total + step
        indices.append(index)
    return torch.cat(indices, dim=1), total


def decode(model: TokenFlowModel, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, D, g, g]` to the image `[B, 3, H, W]` and the semantic features `[B, g * g, T]`."""
    semantic, pixel = quantized.split([model.dims["semantic"], model.dims["pixel"]], dim=1)
    decoder = model.pixel_decoder
    return pixel_decoder(decoder.network, decoder.head(pixel)), semantic_decoder(model, semantic)


# --- quantizer


def quantize(z: Tensor, codebooks: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    b, _, side, _ = z.shape
    parts = z.permute(0, 2, 3, 1).flatten(0, 2).split([c.shape[1] for c in codebooks], dim=1)
    distance: Tensor | float = 0.0
    tables = [F.normalize(codebook, dim=1) for codebook in codebooks]
    for part, table in zip(parts, tables, strict=True):
        part = F.normalize(part, dim=1)
        distance = distance + (
            part.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * part @ table.T
        )
    index = distance.argmin(1)
    codes = torch.zeros_like(distance).scatter_(1, index[:, None], 1) @ torch.cat(tables, dim=1)
    return index.view(b, -1), codes.view(b, side, side, -1).permute(0, 3, 1, 2).contiguous()


# --- transformers


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def resized_positions(positions: Tensor, side: int) -> Tensor:
    stored = round((len(positions) - 1) ** 0.5)
    if stored == side:
        return positions
    factor = (side + 0.1) / stored
    grid = positions[1:].T.reshape(1, -1, stored, stored)
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:1], grid.flatten(2)[0].T])


def clip_features(encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    tower = encoder.tower.model
    heads = tower.config.num_attention_heads
    patches = tower.embeddings.patch_embedding(pixel_values)
    side = patches.shape[-1]
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([tower.embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = tower.pre_layrnorm(x + resized_positions(tower.embeddings.position_embedding.weight, side))
    for layer in tower.encoder.layers:
        h, att = layer.layer_norm1(x), layer.self_attn
        q, k, v = (split_heads(projection(h), heads) for projection in (att.q_proj, att.k_proj, att.v_proj))
        x = x + att.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))
        h = layer.mlp.fc1(layer.layer_norm2(x))
        x = x + layer.mlp.fc2(h * torch.sigmoid(1.702 * h))
    tokens = encoder.head(tower.post_layernorm(x)[:, 1:])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def semantic_decoder(model: TokenFlowModel, semantic: Tensor) -> Tensor:
    decoder = model.semantic_decoders["semantic"]
    x = decoder.patch_embed(semantic).flatten(2).transpose(1, 2)
    x = torch.cat([decoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = x + resized_positions(decoder.pos_embed[0], semantic.shape[-1])
    for block in decoder.blocks:
        att = block.attn
        bias = torch.cat([att.q_bias, torch.zeros_like(att.q_bias), att.v_bias])
        qkv = F.linear(block.norm1(x), att.qkv.weight, bias)
        q, k, v = (split_heads(part, att.heads) for part in qkv.chunk(3, dim=-1))
        x = x + att.proj(attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return decoder.head(decoder.norm(x[:, 1:]))


# --- convolutional networks


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def residual_block(block: ResidualBlock, x: Tensor) -> Tensor:
    h = block.conv1(swish(block.norm1(x)))
    h = block.conv2(swish(block.norm2(h)))
    return block.shortcut(x) + h


def attention_block(block: AttentionBlock, x: Tensor) -> Tensor:
    h = block.norm(x)
    q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (block.q, block.k, block.v))
    return x + block.proj_out(attention(q, k, v).transpose(1, 2).reshape(x.shape))


def run_level(level: Level, x: Tensor) -> Tensor:
    for i, block in enumerate(level.res):
        x = residual_block(block, x)
        if len(level.attn):
            x = attention_block(level.attn[i], x)
    return x


def run_middle(mid: nn.Sequential, x: Tensor) -> Tensor:
    return residual_block(mid[2], attention_block(mid[1], residual_block(mid[0], x)))


def pixel_encoder(network: PixelEncoder, pixel_values: Tensor) -> Tensor:
    x = network.conv_in(F.pixel_unshuffle(pixel_values, network.patch))
    for level in network.levels:
        x = run_level(level, x)
        if level.resample is not None:
            x = level.resample.conv(F.pad(x, (0, 1, 0, 1)))
    return network.conv_out(swish(network.norm_out(run_middle(network.mid, x))))


def pixel_decoder(network: PixelDecoder, z: Tensor) -> Tensor:
    x = run_middle(network.mid, network.conv_in(z))
    for level in network.levels:
        x = run_level(level, x)
        if level.resample is not None:
            x = level.resample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return F.pixel_shuffle(network.conv_out(swish(network.norm_out(x))), network.patch)
