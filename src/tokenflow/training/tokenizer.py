"""The parts of the tokenizer's training: the model from a recipe, and the modules whose forward gives losses.

Model and losses are wrapped in one module each for the generator's and the discriminator's step, so that the
hooks of data-parallel wrappers fire.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenflow.data.sources import Source
from tokenflow.errors import UserError
from tokenflow.tokenizer.configuration import PRESETS, SemanticFlow, TokenFlowConfig
from tokenflow.tokenizer.modeling import PixelFlowDecoder, TokenFlowModel
from tokenflow.tokenizer.pixel import PixelDecoder, PixelEncoder
from tokenflow.tokenizer.semantic import SemanticEncoder, SemanticTeacher, load_tower
from tokenflow.training.losses import TokenizerLoss, build_tokenizer_loss
from tokenflow.training.muon import MuonAdamW, muon_groups
from tokenflow.training.recipe import ModelRecipe, OptimizerRecipe, TrainRecipe

SHARDED_BLOCKS = {
    "Block",
    "Level",
    "CLIPEncoderLayer",
    "SiglipEncoderLayer",
    "ViTaminBlock",
    "ViTaminConvBlock",
}


# -------------------------------------------------------------------------------------------- from the recipe
def build_config(recipe: ModelRecipe) -> TokenFlowConfig:
    """The tokenizer's configuration: a preset (or a folder's config.json) with the recipe's changes.

    Raises:
        UserError: unknown preset or folder; a flow that the preset does not have.
    """
    known = recipe.preset in PRESETS or not Path(recipe.preset).is_dir()
    config = (
        TokenFlowConfig.from_preset(recipe.preset)
        if known
        else TokenFlowConfig.from_pretrained(recipe.preset)
    )
    values = config.to_dict()
    flows = {flow["name"]: flow for flow in config.flows}
    for name in (*(recipe.flows or ()), *(recipe.decoder_flows or ())):
        if name not in flows:
            raise UserError(f"{recipe.preset} has no flow {name!r}; its flows are {', '.join(flows)}")
    if recipe.flows is not None:
        values["flows"] = [flows[name] for name in recipe.flows]
    if recipe.decoder_flows is not None:
        values["pixel_decoder"] = {**config.pixel_decoder, "flows": recipe.decoder_flows}
    for key in (
        "codebook_size",
        "scales",
        "scale_drop",
        "entropy_weight",
        "codebook_init",
        "codebook_update",
        "restart_dead_codes",
        "prefix_decoding",
    ):
        if getattr(recipe, key) is not None:
            values[key] = getattr(recipe, key)
    return TokenFlowConfig(
        **{key: values[key] for key in values if key not in ("model_type", "transformers_version")}
    )


def build_teacher(recipe: ModelRecipe, config: TokenFlowConfig) -> SemanticTeacher | None:
    """The frozen teacher of the flow "semantic"; None without such a flow or teacher.

    Raises:
        UserError: the teacher cannot be loaded, or its features do not have the flow's `target_dim`.
    """
    flow = next((flow for flow in config.flow_specs if flow.name == "semantic"), None)
    if not isinstance(flow, SemanticFlow) or not recipe.teacher:
        return None
    fix = "make one with `tokenflow train teacher tokenflow-tiny-teacher` or give --model.teacher FOLDER"
    local = recipe.teacher.startswith((".", "/", "~")) or recipe.teacher.count("/") > 1  # no hub name
    if local and not Path(recipe.teacher).exists():
        raise UserError(f"no teacher at {recipe.teacher}: {fix}")
    try:
        teacher = SemanticTeacher.from_pretrained(recipe.teacher, flow.hidden_state, flow.final_norm)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # of transformers and the hub, several lines long
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"cannot load the teacher {recipe.teacher} ({reason}): {fix}") from error
    width = teacher.tower.width if teacher.projection is None else teacher.projection.out_features
    if width != flow.target_dim:
        raise UserError(
            f"the teacher {recipe.teacher} gives {width} channels; the semantic decoder gives "
            f"{flow.target_dim} (target_dim)"
        )
    return teacher


def build_model(
    recipe: ModelRecipe, config: TokenFlowConfig, teacher: SemanticTeacher | None
) -> TokenFlowModel:
    """The tokenizer with fresh, the teacher's or a given model's weights; frozen parts need no gradients."""
    model = TokenFlowModel(config)
    if recipe.semantic_init and teacher is not None:
        student = cast(SemanticEncoder, model.encoders["semantic"])
        load_tower(student.tower, teacher.tower.model.state_dict())
    if recipe.init_from is not None:  # what it excepts keeps the teacher's weights
        load_initial_weights(model, recipe.init_from, recipe.init_except)
    set_trainable(model, recipe.trainable)
    for name, decoder in model.semantic_decoders.items():
        if teacher is None or name != "semantic":
            decoder.requires_grad_(False)  # no loss would reach it
    return model


def build_optimizer(model: TokenFlowModel, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """AdamW over what is trained, or with a `muon_lr` Muon for its linear layers and convolutions."""
    options: dict[str, Any] = {"betas": recipe.betas, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.muon_lr is None:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr, **options)
    stems = ("patch_embedding", "conv_in")  # they read pixels
    return MuonAdamW(muon_groups(model, recipe.muon_lr, recipe.lr, recipe.weight_decay, stems), **options)


def build_losses(
    recipe: TrainRecipe, config: TokenFlowConfig, teacher: SemanticTeacher | None
) -> TokenizerLoss:
    """The recipe's losses; a discriminator that would never count is not built.

    Raises:
        UserError: the semantic loss has a weight but no teacher is given.
    """
    loss = recipe.loss
    if not loss.discriminator_weight or loss.discriminator_start >= recipe.steps:
        loss = replace(loss, discriminator="none", adaptive_weight=False)
    semantic = any(flow.kind == "semantic" for flow in config.flow_specs)
    if semantic and loss.semantic_weight and teacher is None and recipe.model.trainable == "all":
        raise UserError(
            "the semantic loss needs a teacher: give --model.teacher FOLDER or set --loss.semantic-weight 0"
        )
    return build_tokenizer_loss(loss, config.image_size, teacher)


def load_initial_weights(model: TokenFlowModel, name_or_path: str, exceptions: tuple[str, ...] = ()) -> None:
    """Copy another tokenizer's weights into `model`.

    Args:
        name_or_path: a model folder, or a bundled or hub name.
        exceptions: prefixes of names that may be missing or of another shape there; they keep their fresh
            values.

    Raises:
        UserError: any other name is missing, left over or of another shape.
    """
    source = TokenFlowModel.from_pretrained(name_or_path).state_dict()
    wanted = model.state_dict()

    def excepted(name: str) -> bool:
        return name.startswith(tuple(exceptions)) if exceptions else False

    different = sorted(
        name
        for name in {*source, *wanted}
        if not excepted(name)
        and (name not in source or name not in wanted or source[name].shape != wanted[name].shape)
    )
    if different:
        raise UserError(
            f"{name_or_path} differs from this model in {len(different)} weights, such as {different[0]}; "
            "name what may start fresh with --model.init-except PREFIX"
        )
    model.load_state_dict({name: source[name] for name in source if not excepted(name)}, strict=False)


def set_trainable(model: TokenFlowModel, part: str) -> None:
    """Let gradients reach all of the model, or only the pixel decoder's network (Sec. B.1)."""
    if part == "decoder":
        if model.pixel_decoder is None:
            raise UserError('trainable="decoder" needs a model with a pixel decoder')
        model.requires_grad_(False)
        model.pixel_decoder.network.requires_grad_(True)
        return
    for encoder in model.encoders.values():
        tower = getattr(encoder, "tower", None)
        if tower is not None and not tower.final_norm:  # never read, so it would never get a gradient
            for name, parameter in tower.model.named_parameters():
                if "post_layernorm" in name:
                    parameter.requires_grad_(False)


def to_channels_last(module: torch.nn.Module) -> None:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs


def pixel_networks(model: TokenFlowModel) -> list[torch.nn.Module]:
    """The convolutional encoders and the pixel decoder's network."""
    return [m for m in model.modules() if isinstance(m, (PixelEncoder, PixelDecoder))]


def parse_source(text: str) -> Source:
    """ "PATH", "PATH@WEIGHT", "PATH[column=value]" or "PATH[column=value]@WEIGHT" as a source."""
    match = re.fullmatch(r"(.+)\[(\w+=[^\]]+)\](@[\d.]+)?", text)
    if match is None:
        return Source.parse(text)
    return Source.parse(match[1] + (match[3] or ""), only=match[2])


# ---------------------------------------------------------------------------------------------- the two steps
def to_model_range(images: Tensor) -> Tensor:
    """uint8 `[B, 3, H, W]` to float32 in [-1, 1], as the image processor does: (x / 255 - 0.5) / 0.5."""
    return images.float() / 127.5 - 1.0


def trainable_attention(device: torch.device) -> AbstractContextManager[None]:
    # On a CPU the fused attention's backward pass in bfloat16 takes twice as long as the plain one (seen: 30
    # and 15 ms for 32 images of 65 tokens); its forward pass, which the teacher uses, is the faster one.
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


class GeneratorStep(nn.Module):
    """The tokenizer and the losses that train it."""

    def __init__(self, model: TokenFlowModel, losses: TokenizerLoss, teacher: SemanticTeacher | None):
        super().__init__()
        self.model = model
        # Not submodules: they are not trained here, so no wrapper may shard, average or save them with the
        # model.
        self.frozen = (losses, teacher)
        # What FSDP2 shards one by one, if the model has it.
        present = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = sorted(present & SHARDED_BLOCKS)
        self.decoder_only = not any(p.requires_grad for p in model.encoders.parameters())
        self.train()

    def train(self, mode: bool = True) -> GeneratorStep:
        super().train(mode)
        if mode and self.decoder_only:  # codes as at inference: no scale drop, no usage windows, no autocast
            self.model.eval()
        return self

    def forward(self, images: Tensor, step: int) -> Any:
        """Losses of a batch.

        Args:
            images: uint8 `[B, 3, H, W]`.
            step: optimizer steps done so far; the adversarial loss starts at one of them.

        Returns:
            the total loss, its parts for the log, the reconstructions `[B, 3, H, W]` float32. In eval mode
            instead what `reconstruct` returns, so that wrappers which gather sharded weights in `forward` do
            so then too.
        """
        if not self.training:
            return self.reconstruct(to_model_range(images))
        losses, teacher = self.frozen
        pixels = to_model_range(images)
        if self.decoder_only:
            with torch.no_grad():
                quantized = self.model.encode(pixels).quantized
            reconstruction = self.model.decode_pixels(quantized).float()
            total, parts = losses.generator(pixels, reconstruction, step=step, last_layer=self.last_layer)
            return total, parts, reconstruction
        with trainable_attention(pixels.device):
            encoded = self.model.encode(pixels)
            decoded = self.model.decode(cast(Tensor, encoded.quantized))
        reconstruction = cast(Tensor, decoded.pixel_values).float()
        total, parts = losses.generator(
            pixels,
            reconstruction,
            step=step,
            semantic=None if teacher is None else cast(Tensor, decoded.semantic).float(),
            target=None if teacher is None else teacher(pixels).float(),
            quantizer=encoded.losses,
            last_layer=self.last_layer,
        )
        return total, parts, reconstruction

    def reconstruct(self, pixels: Tensor) -> list[Tensor]:
        """Pixels decoded from all scales, from about two thirds of them and from about one third."""
        indices = self.model.encode(pixels).indices
        scales = len(self.model.config.scales)
        prefixes = sorted({scales, max(1, scales * 2 // 3), max(1, scales // 3)}, reverse=True)
        maps = [self.model.quantized_from_indices(indices, count) for count in prefixes]
        return [self.model.decode_pixels(quantized) for quantized in maps]

    @property
    def last_layer(self) -> nn.Parameter:
        return cast(PixelFlowDecoder, self.model.pixel_decoder).network.last_layer


class DiscriminatorStep(nn.Module):
    """The discriminator and its loss."""

    def __init__(self, losses: TokenizerLoss):
        super().__init__()
        self.discriminator = losses.discriminator_network
        self.frozen = (losses,)

    def forward(self, images: Tensor, reconstruction: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on real images (uint8) and detached reconstructions, and its parts for the log."""
        return self.frozen[0].discriminator(to_model_range(images), reconstruction.detach(), step=step)
