"""Settings of the tokenizer's loss: plain values only, so that a recipe or ``--help`` loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from tokenflow.errors import UserError


@dataclass(frozen=True)
class LossConfig:
    """Weights and choices of the tokenizer's training objective; defaults are the paper's (Eq. 4, Tab. 11).

    Two defaults follow the released code where the paper is silent or differs: the discriminator joins at
    step 20,000, and the semantic loss is one minus the cosine similarity (the paper's text says l2).
    """

    reconstruction: Literal["l2", "l1"] = "l2"
    """Pixel loss: mean squared or mean absolute error of images in [-1, 1]."""
    reconstruction_weight: float = 1.0

    perceptual: Literal["lpips", "vgg16-trunk", "teacher", "none"] = "lpips"
    """``lpips`` and ``vgg16-trunk`` read ``perceptual_file``; ``teacher`` compares the teacher's features."""
    perceptual_weight: float = 1.0
    perceptual_file: str = ""
    """lpips: torchvision's VGG16 (.pth, .safetensors), with or without heads; vgg16-trunk: a Keras .h5."""
    lpips_heads_file: str = ""
    """lpips: the ``vgg.pth`` of the lpips package; not needed with the combined file."""
    perceptual_stages: int = 5
    """vgg16-trunk: compare the first 1 to 5 stages (fewer is faster)."""
    perceptual_size: int | None = None
    """vgg16-trunk: shrink images to this side in pixels first (faster); None keeps their size."""

    discriminator: Literal["patchgan", "stylegan", "none"] = "patchgan"
    discriminator_width: int = 64
    """patchgan: channels of the first convolution."""
    discriminator_layers: int = 3
    """patchgan: convolutions with stride 2."""
    discriminator_loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    generator_loss: Literal["hinge", "non_saturating"] = "hinge"
    discriminator_weight: float = 0.5
    """The paper's lambda_G; scales the adversarial term of the generator and the discriminator's own loss."""
    discriminator_start: int = 20_000
    """Optimizer step from which the adversarial terms count; before it their weight is 0."""
    adaptive_weight: bool = False
    """Scale the adversarial term by the ratio of gradient norms at the last layer (VQGAN, Eq. 7)."""

    semantic: Literal["cosine", "l2"] = "cosine"
    """Distance to the teacher's tokens: 1 - mean cosine (released code) or mean squared error (paper)."""
    semantic_weight: float = 1.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if isinstance(value, str) and choices and value not in choices:
                raise UserError(f"loss.{field.name}={value!r} is unknown: use one of {', '.join(choices)}")
            if field.name.endswith("_weight") and value < 0:
                raise UserError(
                    f"loss.{field.name}={value} must not be negative: use 0 to switch the term off"
                )
        if self.perceptual in ("teacher", "none"):
            for name in ("perceptual_file", "lpips_heads_file"):
                if value := getattr(self, name):
                    raise UserError(
                        f"loss.{name}={value!r} would not be read: loss.perceptual is {self.perceptual!r}, "
                        "use lpips or vgg16-trunk"
                    )
        if not 1 <= self.perceptual_stages <= 5:
            raise UserError(
                f"loss.perceptual_stages={self.perceptual_stages}: VGG16 has 5 stages, use 1 to 5"
            )
