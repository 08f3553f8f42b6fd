"""Semantic encoders (vision transformers), the semantic decoder, and the frozen teacher (Sec. 3.2).

Notable: any transformers vision model serves as encoder or teacher; CLIP and the semantic decoder resize
their positions on every forward with the released code's scale factor; SigLIP's unused last layer and head
are not even built.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

from tokenflow.errors import UserError
from tokenflow.tokenizer.configuration import vision_config
from tokenflow.tokenizer.flows import SemanticFlow


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings `[1 + g0 * g0, D]` (class token first) for a `grid` x `grid` image.

    Bicubic with scale factor (grid + 0.1) / g0, used as it is for the sampling grid: `size=(grid, grid)`
    would sample elsewhere and change half of the codes of the released checkpoints.
    """
    base = round((positions.shape[0] - 1) ** 0.5)
    if grid == base:
        return positions
    patches = positions[1:].T.reshape(1, -1, base, base)
    factor = (grid + 0.1) / base
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:1], patches.flatten(2)[0].T])


class ImageScaling(nn.Module):
    """Pixels in [-1, 1] to normalised pixels: clamp to 8-bit range, then (y - mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, x: Tensor) -> Tensor:
        y = ((x + 1) * 127.5).clamp(0, 255) / 255
        # Python constants, not buffers: nothing to save, nothing that loading could leave unset.
        mean, std = (y.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (y - mean) / std


class VisionTower(nn.Module):
    """A vision transformer: pixels `[B, 3, H, W]` in [-1, 1] to patch features `[B, g * g, width]`.

    Class and register tokens are dropped. Layers after `hidden_state` and pooling heads are not built.
    """

    def __init__(
        self,
        encoder: dict,
        hidden_state: int = -1,
        final_norm: bool = True,
        image_mean: tuple[float, ...] | None = None,
        image_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        if hidden_state >= 0 or (final_norm and hidden_state != -1):
            raise UserError(
                f"hidden_state {hidden_state}: give -1 (last), or -2, -3, ... with final_norm=False"
            )
        config = copy.deepcopy(vision_config(encoder))
        config.num_hidden_layers = config.num_hidden_layers + 1 + hidden_state
        if isinstance(getattr(config, "vision_use_head", None), bool):
            config.vision_use_head = False  # the pooling head is never read
        self.model: Any = (  # a transformers vision model
            AutoModel.from_config(config)
            if encoder["model_type"] != "tokenflow_vitamin"
            else _vitamin(config)
        )
        self.final_norm = final_norm
        self.scaling = (
            nn.Identity() if image_mean is None else ImageScaling(image_mean, image_std or (1.0, 1.0, 1.0))
        )
        self.width: int = config.hidden_size
        self.patch_size: int = config.patch_size
        # The grid that positions are stored for; SigLIP 2 gives it as a number of patches.
        patches = getattr(config, "num_patches", None)
        self.base_grid: int = round(patches**0.5) if patches else config.image_size // config.patch_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.scaling(pixel_values)
        grid = x.shape[-1] // self.patch_size
        if isinstance(self.model, CLIPVisionModel):
            tokens = self._clip(x, grid)
        elif isinstance(self.model, SiglipVisionModel):
            h = self.model.embeddings(x, interpolate_pos_encoding=grid != self.base_grid)
            h = self.model.encoder(inputs_embeds=h).last_hidden_state
            tokens = self.model.post_layernorm(h) if self.final_norm else h
        else:
            out = self.model(**self._inputs(x, grid), output_hidden_states=not self.final_norm)
            tokens = out.last_hidden_state if self.final_norm else out.hidden_states[-1]
        return tokens[:, tokens.shape[1] - grid * grid :]

    def _clip(self, x: Tensor, grid: int) -> Tensor:
        embeddings = self.model.embeddings
        patches = embeddings.patch_embedding(x).flatten(2).transpose(1, 2)
        h = torch.cat([embeddings.class_embedding.expand(x.shape[0], 1, -1), patches], dim=1)
        h = self.model.pre_layrnorm(h + resize_positions(embeddings.position_embedding.weight, grid))
        h = self.model.encoder(inputs_embeds=h).last_hidden_state
        return self.model.post_layernorm(h) if self.final_norm else h

    def _inputs(self, x: Tensor, grid: int) -> dict[str, Tensor | bool]:
        if self.model.config.model_type == "siglip2_vision_model":
            # takes flat patches, rows of (y, x, channel)
            p = self.patch_size
            flat = F.unfold(x[..., : grid * p, : grid * p], p, stride=p)
            flat = flat.unflatten(1, (3, p * p))  # [B, 3, p*p, N]
            shapes = torch.full((x.shape[0], 2), grid, dtype=torch.long, device=x.device)
            mask = torch.ones(x.shape[0], grid * grid, dtype=torch.long, device=x.device)
            patches = flat.permute(0, 3, 2, 1).flatten(2)
            return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        if grid != self.base_grid and self.model.config.model_type == "vit":  # others need not be asked
            return {"pixel_values": x, "interpolate_pos_encoding": True}
        return {"pixel_values": x}


def _vitamin(config: Any) -> nn.Module:
    from tokenflow.tokenizer.vitamin import ViTaminModel

    return ViTaminModel(config)


class SemanticEncoder(nn.Module):
    """Vision tower and encoding head: pixels `[B, 3, H, W]` to the feature `[B, dim, g, g]` to quantize."""

    def __init__(self, flow: SemanticFlow):
        super().__init__()
        self.tower = VisionTower(
            flow.encoder, flow.hidden_state, flow.final_norm, flow.image_mean, flow.image_std
        )
        width = self.tower.width
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, flow.dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.head(self.tower(pixel_values))
        grid = round(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (grid, grid))


class Attention(nn.Module):
    """Multi-head attention without a key bias (the released layout keeps only query and value biases)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SemanticDecoder(nn.Module):
    """Quantized semantic map `[B, dim, g, g]` to the teacher's feature space, `[B, g * g, T]` (row-major)."""

    def __init__(self, flow: SemanticFlow, width: int, base_grid: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(flow.dim, width, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + base_grid**2, width))
        self.blocks = nn.ModuleList(Block(width, flow.decoder_heads) for _ in range(flow.decoder_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, flow.target_dim))

    def forward(self, z: Tensor) -> Tensor:
        x = self.patch_embed(z).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + resize_positions(self.pos_embed[0], z.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 1:]))


class SemanticTeacher(nn.Module):
    """The frozen network whose patch features the semantic decoder learns to give back (Sec. 3.2).

    Always in eval mode and without gradients. For CLIP the target is the projected, normed patch tokens
    `[B, g * g, 512]` of normalised pixels; for other towers it is the patch feature itself.

    Args:
        tower: the vision model.
        projection: CLIP's `visual_projection`, or None.
    """

    def __init__(self, tower: VisionTower, projection: nn.Linear | None = None):
        super().__init__()
        self.tower, self.projection = tower, projection
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> SemanticTeacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.tower(pixel_values)
        return tokens if self.projection is None else self.projection(tokens)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        hidden_state: int = -1,
        final_norm: bool = True,
        image_mean: tuple[float, ...] | None = None,
        image_std: tuple[float, ...] | None = None,
    ) -> SemanticTeacher:
        """A teacher from a transformers vision model: a bundled name, a folder or a hub name.

        `image_mean` and `image_std` default to those of the folder's image processor, which the teacher needs
        even where the student sees the pixels as they are.
        """
        from transformers import AutoConfig, CLIPVisionModelWithProjection

        from tokenflow.bundled import bundled_names, bundled_path

        if name_or_path in bundled_names():
            name_or_path = str(bundled_path(name_or_path))
        config = AutoConfig.from_pretrained(name_or_path)
        config = getattr(config, "vision_config", config)
        if image_mean is None:
            image_mean, image_std = _image_statistics(name_or_path)
        if config.model_type == "clip_vision_model":
            source = CLIPVisionModelWithProjection.from_pretrained(name_or_path, dtype=torch.float32)
            weights, projection = source.vision_model.state_dict(), source.visual_projection
        else:
            source = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
            weights, projection = getattr(source, "vision_model", source).state_dict(), None
        tower = VisionTower(config.to_dict(), hidden_state, final_norm, image_mean, image_std)
        load_tower(tower, weights)
        return cls(tower, projection if hidden_state == -1 else None)


def load_tower(tower: VisionTower, weights: dict[str, Tensor]) -> None:
    """Load a full vision model's weights into a tower that leaves its last layers and head out.

    Raises:
        UserError: a weight that the tower needs is missing.
    """
    wanted = tower.model.state_dict()
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(
            f"vision model lacks {len(missing)} weights, such as {missing[0]}; is it of another family?"
        )
    tower.model.load_state_dict({key: weights[key] for key in wanted})


def _image_statistics(name_or_path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil")
    return tuple(processor.image_mean), tuple(processor.image_std)
