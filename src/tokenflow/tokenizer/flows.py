"""What a tokenizer is made of: its flows, their convolutional networks, and the pixel decoder.

A flow's encoder is of one of two kinds: `semantic` (a vision transformer, an encoding head, and a semantic
decoder that is trained to give back a teacher's features) or `pixel` (a convolutional encoder).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import PreTrainedConfig

from tokenflow.errors import UserError
from tokenflow.tokenizer.config_checks import check_keys, check_number


@dataclass(frozen=True)
class ConvSpec:
    """A convolutional encoder or decoder (Sec. A.2; the VQGAN layout of the released checkpoints).

    `patch` > 1 works on pixel-unshuffled images (side / patch, 3 * patch^2 channels): far cheaper, a little
    softer. The total stride is `patch * 2 ** (len(multipliers) - 1)`. `blocks` residual blocks a level;
    attention at the lowest.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 256
    patch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if not self.multipliers:
            raise UserError("multipliers: must name at least one level, got none")
        for key in ("width", "blocks", "latent_channels", "patch"):
            check_number(key, getattr(self, key), 1)
        for multiplier in self.multipliers:
            check_number("multipliers", multiplier, 1)

    @property
    def stride(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class SemanticFlow:
    """A flow whose encoder is a vision transformer (any transformers vision model, or our ViTamin).

    Attributes:
        encoder: the vision model's configuration (any `CLIPVisionConfig`, ...), or it as a dict with its
            `model_type`.
        hidden_state: which hidden state is the feature: -1 the last layer's, -2 the one before (SigLIP).
            Layers after it are not built.
        final_norm: whether the model's last norm is applied to the feature.
        image_mean, image_std: normalisation of pixels in [0, 1]; None feeds the pixels in [-1, 1] as they
            are, which the released CLIP tokenizers do (their teacher, however, sees normalised pixels).
        decoder_layers, decoder_heads: the semantic decoder; 12 heads at every width in the released files.
        target_dim: channels `T` of the teacher's features.
    """

    name: str = "semantic"
    dim: int = 32
    weight: float = 1.0
    encoder: dict[str, Any] = field(default_factory=dict)
    hidden_state: int = -1
    final_norm: bool = True
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    decoder_layers: int = 3
    decoder_heads: int = 12
    target_dim: int = 512
    kind: Literal["semantic"] = "semantic"

    def __post_init__(self) -> None:
        if isinstance(self.encoder, PreTrainedConfig):
            object.__setattr__(self, "encoder", self.encoder.to_dict())


@dataclass(frozen=True)
class PixelFlow:
    """A flow whose encoder is convolutional."""

    name: str = "pixel"
    dim: int = 8
    weight: float = 1.0
    encoder: ConvSpec = field(default_factory=ConvSpec)
    kind: Literal["pixel"] = "pixel"

    def __post_init__(self) -> None:
        if isinstance(self.encoder, dict):
            check_keys(f"flow {self.name!r}, encoder,", self.encoder, names_of(ConvSpec))
            object.__setattr__(self, "encoder", ConvSpec(**self.encoder))


@dataclass(frozen=True)
class PixelDecoderSpec(ConvSpec):
    """The pixel decoder: reads the quantized vectors of the flows in `flows`."""

    blocks: int = 3
    flows: tuple[str, ...] = ("pixel",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "flows", tuple(self.flows))


Flow = SemanticFlow | PixelFlow
FLOW_KINDS: dict[str, type[Flow]] = {"semantic": SemanticFlow, "pixel": PixelFlow}


def names_of(spec: type) -> list[str]:
    """The fields of one of these classes."""
    return [f.name for f in fields(spec)]
