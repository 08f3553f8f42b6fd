"""The tokenizer's training objective: L_total = L_sem + L_VQ + L_pix (Sec. 3.2, Eq. 4).

Where the released code differs from the paper, or from what it means to compute:

* the semantic loss is 1 - the cosine similarity in the code, an l2 distance in the paper: both are here;
* the non-saturating losses of the code swap prediction and target inside a cross entropy: the generator then
  minimises ``1 - mean(D) + log(1 + 1/e)``, and the discriminator gets no gradient from reconstructions. Here
  they are the non-saturating losses of Goodfellow et al. 2014;
* the code's loss module can put LPIPS and the teacher into train mode (dropout); ours stay in eval mode;
* before `discriminator_start` the code runs the discriminator with weight 0 in the generator's step; here it
  is left out, which gives the same total and the same gradients.

Nothing here keeps state between calls except the BatchNorm statistics of PatchGAN, so the step may be split
by gradient accumulation or over processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tokenflow.errors import UserError
from tokenflow.training.discriminators import build_discriminator
from tokenflow.training.loss_config import LossConfig
from tokenflow.training.perceptual import FrozenDistance, build_perceptual

__all__ = ["LossConfig", "TokenizerLoss", "build_tokenizer_loss"]

LossDict = dict[str, Tensor]


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 * (mean relu(1 - D(x)) + mean relu(1 + D(x'))) of logits of any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def logistic_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 * (mean softplus(-D(x)) + mean softplus(D(x'))): both "vanilla" and "non_saturating"."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean D(x')."""
    return -fake.mean()


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """mean softplus(-D(x')): minus the log probability that the reconstruction is real."""
    return F.softplus(-fake).mean()


DISCRIMINATOR_LOSSES = {
    "hinge": hinge_discriminator_loss,
    "vanilla": logistic_discriminator_loss,
    "non_saturating": logistic_discriminator_loss,
}
GENERATOR_LOSSES = {"hinge": hinge_generator_loss, "non_saturating": non_saturating_generator_loss}


def semantic_loss(prediction: Tensor, target: Tensor, kind: str = "cosine") -> Tensor:
    """Distance of decoded semantic tokens to the teacher's.

    Args:
        prediction, target: ``[B, N, T]``; no gradient reaches `target`.
        kind: "cosine" (released code): 1 - mean cosine over tokens; "l2" (paper): mean squared error.
    """
    prediction, target = prediction.float(), target.detach().float()
    if kind == "l2":
        return F.mse_loss(prediction, target)
    return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()


def adaptive_weight(base: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Factor with which the adversarial term pulls as hard as the others (Esser et al. 2021, Eq. 7).

    Returns |d base / d last_layer| / (|d adversarial / d last_layer| + 1e-4), at most 1e4, without gradient.
    """
    (base_gradient,) = torch.autograd.grad(base, last_layer, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (base_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0, 1e4).detach()


class TokenizerLoss(nn.Module):
    """Losses of the generator (the tokenizer) and of the discriminator.

    Args:
        config: weights and choices.
        perceptual: maps (images, reconstruction) to one distance an image, see
            `tokenflow.training.perceptual`; None leaves the term out.
        discriminator: maps images to logits; None leaves the adversarial terms out.
    """

    def __init__(
        self, config: LossConfig, perceptual: nn.Module | None = None, discriminator: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.perceptual = perceptual
        self.discriminator_network = discriminator

    def adversarial_weight(self, step: int) -> float:
        """Weight of the adversarial terms at an optimizer step; 0 before the start."""
        if self.discriminator_network is None or step < self.config.discriminator_start:
            return 0.0
        return self.config.discriminator_weight

    def generator(
        self,
        images: Tensor,
        reconstruction: Tensor,
        semantic: Tensor | None = None,
        target: Tensor | None = None,
        quantizer: LossDict | None = None,
        *,
        step: int,
        last_layer: Tensor | None = None,
    ) -> tuple[Tensor, LossDict]:
        """Loss of the tokenizer.

        Args:
            images, reconstruction: ``[B, 3, H, W]`` in [-1, 1]; the reconstruction is not clamped.
            semantic, target: decoded and the teacher's tokens ``[B, N, T]``, or None without a semantic flow.
            quantizer: the quantizer's losses, already weighted; all are added.
            step: optimizer steps done so far (not micro-batches).
            last_layer: weight of the pixel decoder's last convolution; only `adaptive_weight` needs it.

        Returns:
            the total, and its unweighted parts as detached scalars for the log; once the discriminator has
            joined also `adversarial_weight`, the factor of `adversarial` in the total.
        """
        config = self.config
        if (semantic is None) != (target is None):
            raise ValueError("give semantic and target both, or neither")
        images, reconstruction = images.detach().float(), reconstruction.float()
        parts: LossDict = {}

        pixel_loss = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
        parts["reconstruction"] = pixel_loss(reconstruction, images)
        total = config.reconstruction_weight * parts["reconstruction"]
        if self.perceptual is not None and config.perceptual_weight:
            parts["perceptual"] = self.perceptual(images, reconstruction).mean()
            total = total + config.perceptual_weight * parts["perceptual"]

        weight = self.adversarial_weight(step)
        if weight and self.discriminator_network is not None:
            logits = self._frozen_logits(self.discriminator_network, reconstruction)
            parts["adversarial"] = GENERATOR_LOSSES[config.generator_loss](logits)
            factor = reconstruction.new_tensor(weight)
            if config.adaptive_weight:
                if last_layer is None:
                    raise ValueError(
                        "adaptive_weight=True needs last_layer, the weight of the decoder's last convolution"
                    )
                factor = factor * adaptive_weight(total, parts["adversarial"], last_layer)
            parts["adversarial_weight"] = factor
            total = total + factor * parts["adversarial"]

        if semantic is not None and target is not None:
            parts["semantic"] = semantic_loss(semantic, target, config.semantic)
            total = total + config.semantic_weight * parts["semantic"]
        for name, value in (quantizer or {}).items():
            parts[name] = value
            total = total + value
        return total, {name: value.detach() for name, value in parts.items()}

    def discriminator(self, images: Tensor, reconstruction: Tensor, *, step: int) -> tuple[Tensor, LossDict]:
        """Loss of the discriminator; call it after the generator's step, on the same batch.

        The real batch goes first, then the reconstructions, each with its own BatchNorm statistics.

        Args:
            images, reconstruction: ``[B, 3, H, W]`` in [-1, 1]; no gradient reaches them.
            step: as in `generator`. Before the start the loss has weight 0, and the call may be left out.

        Returns:
            the loss, and for the log: `discriminator` (unweighted), `logits_real` and `logits_fake` (means).

        Raises:
            ValueError: there is no discriminator.
        """
        if self.discriminator_network is None:
            raise ValueError("there is no discriminator: LossConfig.discriminator is 'none'")
        real = self.discriminator_network(images.detach().float()).float()
        fake = self.discriminator_network(reconstruction.detach().float()).float()
        loss = DISCRIMINATOR_LOSSES[self.config.discriminator_loss](real, fake)
        parts = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return self.adversarial_weight(step) * loss, {name: value.detach() for name, value in parts.items()}

    @staticmethod
    def _frozen_logits(network: nn.Module, images: Tensor) -> Tensor:
        """Logits whose gradient reaches the images but not the parameters, which another optimizer owns."""
        frozen = {name: parameter.detach() for name, parameter in network.named_parameters()}
        return functional_call(network, frozen, (images,)).float()


def build_tokenizer_loss(
    config: LossConfig, image_size: int, teacher=None, perceptual: FrozenDistance | None = None
) -> TokenizerLoss:
    """The loss that the config describes.

    Args:
        config: weights and choices.
        image_size: side of the training images in pixels.
        teacher: `SemanticTeacher`; only ``perceptual="teacher"`` needs it here.
        perceptual: a distance of your own instead of the config's.

    Raises:
        UserError: weights are missing, or the discriminator does not exist for this image size.
    """
    if config.adaptive_weight and config.discriminator == "none":
        raise UserError("loss.adaptive_weight=True needs a discriminator: choose patchgan or stylegan")
    if perceptual is None and config.perceptual_weight:
        perceptual = build_perceptual(config, teacher)
    return TokenizerLoss(config, perceptual, build_discriminator(config, image_size))
