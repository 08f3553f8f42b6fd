"""The tower of a teacher: its patch tokens, where it starts from, and the folder it is left in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tokenflow.errors import UserError
from tokenflow.training.teacher_cache import Source
from tokenflow.training.teacher_recipe import TeacherRecipe


def patch_tokens(
    model: CLIPVisionModelWithProjection, pixel_values: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Projected patch tokens, the target of the tokenizer's semantic flow (released CLIP layouts).

    Args:
        pixel_values: [B, 3, H, W] in [-1, 1].
        kept: [B, n] int64, the patches to look at (FLIP); all h*w if None.

    Returns:
        [B, n or h*w, projection_dim].
    """
    vision = model.vision_model
    embedded = vision.embeddings(pixel_values)
    if kept is not None:
        patches = embedded[:, 1:].gather(1, kept[..., None].expand(-1, -1, embedded.shape[-1]))
        embedded = torch.cat([embedded[:, :1], patches], dim=1)
    hidden = vision.encoder(vision.pre_layrnorm(embedded)).last_hidden_state[:, 1:]
    return model.visual_projection(vision.post_layernorm(hidden))


def embed_images(model: CLIPVisionModelWithProjection, pixel_values: Tensor) -> Tensor:
    """Unit image vectors [B, projection_dim] of `pixel_values` [B, 3, H, W]: mean projected patch tokens."""
    return F.normalize(patch_tokens(model, pixel_values).mean(1), dim=-1)


def build_model(recipe: TeacherRecipe, projection_dim: int) -> CLIPVisionModelWithProjection:
    """The tower of a recipe, freshly initialised."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            patch_size=recipe.patch_size,
            image_size=recipe.image_size,
            hidden_act="quick_gelu",
            projection_dim=projection_dim,
        )
    )


@torch.no_grad()
def whiten_patch_embedding(model: CLIPVisionModelWithProjection, pixel_values: Tensor) -> None:
    """Start the patch embedding from whitened principal components of the patches of [B, 3, H, W] pictures.

    Patches of photographs are mostly brightness: with random filters all tokens look alike for many steps.
    The idea is from Jordan's fast CIFAR-10 training (arXiv 2404.00498).
    """
    convolution = model.vision_model.embeddings.patch_embedding
    patches = F.unfold(pixel_values, convolution.kernel_size, stride=convolution.stride)
    patches = patches.transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    count = min(convolution.out_channels, len(variances))
    filters = directions[:, -count:].T / (variances[-count:, None] + 0.1).sqrt()
    convolution.weight[:count] = filters.view(count, *convolution.weight.shape[1:])


def load_start(model: CLIPVisionModelWithProjection, name_or_path: str) -> None:
    """Copy the weights of an exported tower, or of a bundled one, into `model`.

    Raises:
        UserError: it does not exist, or has another shape.
    """
    from tokenflow.bundled import bundled_names, bundled_path

    folder = bundled_path(name_or_path) if name_or_path in bundled_names() else Path(name_or_path)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except OSError as error:
        raise UserError(f"init_from={name_or_path}: no model.safetensors there") from error
    except RuntimeError as error:
        raise UserError(f"init_from={name_or_path}: {str(error).splitlines()[1].strip()}") from error


def export_teacher(model: CLIPVisionModelWithProjection, sources: list[Source], folder: Path) -> None:
    """Write a transformers folder with the class-text vectors beside the model, then swap it in."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    labelled = [s for s in sources if s.class_names]
    save_file(
        {s.name: s.texts[:, 0].contiguous() for s in labelled},
        fresh / "class_embeddings.safetensors",
        metadata={s.name: json.dumps({"ids": s.class_ids, "names": s.class_names}) for s in labelled},
    )
    size = {"height": model.config.image_size, "width": model.config.image_size}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": model.config.image_size},
        "crop_size": size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (fresh / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
