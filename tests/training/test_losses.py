from __future__ import annotations

import copy
import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenflow.errors import UserError
from tokenflow.training.discriminators import PatchGANDiscriminator, StyleGANDiscriminator
from tokenflow.training.losses import (
    LossConfig,
    TokenizerLoss,
    adaptive_weight,
    build_tokenizer_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    logistic_discriminator_loss,
    non_saturating_generator_loss,
    semantic_loss,
)
from tokenflow.training.perceptual import FeatureDistance

START = 10
CONFIG = LossConfig(perceptual="none", discriminator_start=START)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.rand(2, 4, 3, 16, 16, generator=generator) * 2 - 1
    return images, (0.5 * images + 0.5 * noise).requires_grad_()


def small_loss(config=CONFIG, perceptual=None):
    torch.manual_seed(0)
    return TokenizerLoss(config, perceptual, PatchGANDiscriminator(width=4, num_layers=2)).train()


# ------------------------------------------------------------------------------------------------ settings
def test_defaults_are_the_papers():
    config = LossConfig()
    assert (config.reconstruction, config.reconstruction_weight) == ("l2", 1.0)
    assert (config.perceptual, config.perceptual_weight) == ("lpips", 1.0)
    assert (config.discriminator, config.discriminator_weight, config.discriminator_start) == (
        "patchgan",
        0.5,
        20_000,
    )
    assert (config.discriminator_loss, config.generator_loss) == ("hinge", "hinge")
    assert (config.semantic, config.semantic_weight, config.adaptive_weight) == ("cosine", 1.0, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"perceptual": "vgg"},
            "loss.perceptual='vgg' is unknown: use one of lpips, vgg16-trunk, teacher, none",
        ),
        ({"semantic": "l1"}, "loss.semantic='l1' is unknown: use one of cosine, l2"),
        (
            {"perceptual": "none", "perceptual_file": "vgg.pth"},
            "loss.perceptual_file='vgg.pth' would not be read: loss.perceptual is 'none'",
        ),
        ({"discriminator_weight": -1.0}, "loss.discriminator_weight=-1.0 must not be negative"),
        ({"perceptual_stages": 6}, "loss.perceptual_stages=6: VGG16 has 5 stages"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**change)


def test_settings_load_no_torch():
    code = "import sys, tokenflow.training.loss_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ functions
def test_adversarial_losses_against_closed_forms():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.0 / 2 + 1.5 / 2))
    assert hinge_generator_loss(fake).item() == pytest.approx(1.25)
    probabilities = torch.sigmoid(torch.cat([real, fake])).tolist()
    expected = -0.25 * (
        sum(map(math.log, probabilities[:2])) + sum(math.log(1 - p) for p in probabilities[2:])
    )
    assert logistic_discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)
    expected = -0.5 * sum(map(math.log, probabilities[2:]))
    assert non_saturating_generator_loss(fake).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [hinge_generator_loss, non_saturating_generator_loss])
def test_generator_losses_push_logits_up(loss):
    logits = torch.linspace(-50, 50, 11).requires_grad_()
    loss(logits).backward()
    assert (logits.grad <= 0).all()
    assert logits.grad[0] < -0.05  # not saturated where the discriminator is sure


def test_semantic_losses():
    prediction = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], requires_grad=True)
    target = torch.tensor([[[3.0, 0.0], [5.0, 0.0]]], requires_grad=True)
    assert semantic_loss(prediction, target, "cosine").item() == pytest.approx(1 - (1 + 0) / 2)
    assert semantic_loss(prediction, target, "l2").item() == pytest.approx((4 + 0 + 25 + 4) / 4)
    semantic_loss(prediction, target).backward()
    assert target.grad is None
    # the two agree up to a factor on unit vectors (README quirk 11)
    a, b = F.normalize(torch.randn(2, 1, 7, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.testing.assert_close(semantic_loss(a, b, "l2") * 6 / 2, semantic_loss(a, b, "cosine"))


def test_semantic_loss_of_a_zero_token_is_finite():
    prediction = torch.zeros(1, 2, 3, requires_grad=True)
    semantic_loss(prediction, torch.ones(1, 2, 3)).backward()
    assert prediction.grad.isfinite().all()


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight((3 * layer).sum(), (0.5 * layer).sum(), layer)
    assert weight.item() == pytest.approx(3 * 2**0.5 / (0.5 * 2**0.5 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight((1e9 * layer).sum(), (0 * layer).sum(), layer).item() == 1e4


# ------------------------------------------------------------------------------------------------ generator
def test_total_is_the_weighted_sum_of_its_parts(batch):
    images, reconstruction = batch
    config = dataclasses.replace(
        CONFIG,
        perceptual_weight=0.3,
        reconstruction_weight=2.0,
        semantic_weight=0.7,
        discriminator_weight=0.2,
    )
    loss = small_loss(config, FeatureDistance(lambda x: F.avg_pool2d(x, 4)))
    semantic, target = torch.randn(2, 4, 9, 5)
    quantizer = {"vq": torch.tensor(0.1), "commitment": torch.tensor(0.02)}
    total, parts = loss.generator(images, reconstruction, semantic, target, quantizer, step=START)
    expected = (
        2.0 * F.mse_loss(reconstruction, images)
        + 0.3 * parts["perceptual"]
        + 0.2 * parts["adversarial"]
        + 0.7 * semantic_loss(semantic, target)
        + 0.12
    )
    torch.testing.assert_close(total, expected)
    assert set(parts) == {
        "reconstruction",
        "perceptual",
        "adversarial",
        "adversarial_weight",
        "semantic",
        "vq",
        "commitment",
    }
    assert all(value.ndim == 0 and not value.requires_grad for value in parts.values())


def test_l1_reconstruction(batch):
    images, reconstruction = batch
    total, _ = small_loss(dataclasses.replace(CONFIG, reconstruction="l1")).generator(
        images, reconstruction, step=0
    )
    torch.testing.assert_close(total, (images - reconstruction).abs().mean())


def test_the_adversarial_term_begins_at_its_step(batch):
    images, reconstruction = batch
    loss = small_loss()
    assert [loss.adversarial_weight(step) for step in (0, START - 1, START)] == [0.0, 0.0, 0.5]
    _, before = loss.generator(images, reconstruction, step=START - 1)
    _, after = loss.generator(images, reconstruction, step=START)
    assert "adversarial" not in before
    assert after["adversarial_weight"].item() == 0.5
    total, parts = loss.discriminator(images, reconstruction, step=START - 1)
    assert total.item() == 0.0
    assert parts["discriminator"].item() > 0


def test_without_a_discriminator(batch):
    images, reconstruction = batch
    loss = TokenizerLoss(CONFIG)
    total, parts = loss.generator(images, reconstruction, step=START)
    assert set(parts) == {"reconstruction"}
    torch.testing.assert_close(total, F.mse_loss(reconstruction, images))
    with pytest.raises(ValueError, match="there is no discriminator"):
        loss.discriminator(images, reconstruction, step=START)


def test_generator_step_gives_the_discriminator_no_gradient(batch):
    images, reconstruction = batch
    loss = small_loss()
    loss.generator(images, reconstruction, step=START)[0].backward()
    assert reconstruction.grad.any()
    assert all(p.grad is None for p in loss.discriminator_network.parameters())
    # and the adversarial gradient is the one through the ordinary network
    only = dataclasses.replace(CONFIG, reconstruction_weight=0.0)
    twin = small_loss(only)
    expected = torch.autograd.grad(
        -0.5 * copy.deepcopy(twin.discriminator_network)(reconstruction).mean(), reconstruction
    )[0]
    (actual,) = torch.autograd.grad(twin.generator(images, reconstruction, step=START)[0], reconstruction)
    torch.testing.assert_close(actual, expected)


def test_discriminator_step_gives_the_tokenizer_no_gradient(batch):
    images, reconstruction = batch
    loss = small_loss()
    total, parts = loss.discriminator(images, reconstruction, step=START)
    total.backward()
    assert reconstruction.grad is None
    assert all(p.grad is not None for p in loss.discriminator_network.parameters())
    torch.testing.assert_close(total.detach(), 0.5 * parts["discriminator"])


def test_semantic_needs_its_target(batch):
    images, reconstruction = batch
    with pytest.raises(ValueError, match="semantic and target both"):
        small_loss().generator(images, reconstruction, torch.zeros(4, 9, 5), step=0)


def test_adaptive_weight_needs_the_last_layer(batch):
    images, reconstruction = batch
    loss = small_loss(dataclasses.replace(CONFIG, adaptive_weight=True))
    with pytest.raises(ValueError, match="needs last_layer"):
        loss.generator(images, reconstruction, step=START)


def test_training_improves_both_sides():
    """The discriminator learns to tell real from fake, and images that follow its gradient fool it."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    fake = nn.Parameter(torch.zeros(8, 3, 16, 16))
    loss = small_loss(dataclasses.replace(CONFIG, reconstruction_weight=0.0, discriminator_start=0))
    optimizer = torch.optim.Adam(loss.discriminator_network.parameters(), lr=2e-3)
    for _ in range(20):
        total, parts = loss.discriminator(images, fake, step=0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert parts["logits_real"] > parts["logits_fake"] + 1
    before = parts["logits_fake"]
    optimizer = torch.optim.Adam([fake], lr=5e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss.generator(images, fake, step=0)[0].backward()
        optimizer.step()
    assert loss.discriminator(images, fake, step=0)[1]["logits_fake"] > before + 1


def test_gradient_accumulation_adds_up(batch):
    """Two half batches give the gradient of the whole one (StyleGAN's has no batch statistics)."""
    images, reconstruction = batch
    config = dataclasses.replace(CONFIG, discriminator="stylegan")
    loss = build_tokenizer_loss(config, 16, perceptual=FeatureDistance(lambda x: F.avg_pool2d(x, 4))).train()
    (whole,) = torch.autograd.grad(loss.generator(images, reconstruction, step=START)[0], reconstruction)
    for part in (slice(0, 2), slice(2, 4)):
        (loss.generator(images[part], reconstruction[part], step=START)[0] / 2).backward()
    torch.testing.assert_close(reconstruction.grad, whole)
    assert not list(loss.buffers()) or all("f" in name for name, _ in loss.named_buffers())


def test_bf16_autocast_keeps_losses_in_float32(batch):
    images, reconstruction = batch
    loss = small_loss(CONFIG, FeatureDistance(nn.Conv2d(3, 8, 3)))
    expected, _ = loss.generator(images, reconstruction, step=START)
    with torch.autocast("cpu", torch.bfloat16):
        total, parts = loss.generator(images, reconstruction.bfloat16(), step=START)
        disc, _ = loss.discriminator(images, reconstruction.bfloat16(), step=START)
    assert total.dtype == disc.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in parts.values())
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0.01)


# ------------------------------------------------------------------------------------------------ building
def test_build_tokenizer_loss():
    loss = build_tokenizer_loss(dataclasses.replace(CONFIG, discriminator="stylegan"), 16)
    assert loss.perceptual is None
    assert isinstance(loss.discriminator_network, StyleGANDiscriminator)
    own = FeatureDistance(lambda x: x)
    assert build_tokenizer_loss(LossConfig(), 224, perceptual=own).perceptual is own
    with pytest.raises(UserError, match=r"loss.perceptual='lpips' needs weights"):
        build_tokenizer_loss(LossConfig(), 224)
    with pytest.raises(UserError, match="adaptive_weight=True needs a discriminator"):
        build_tokenizer_loss(LossConfig(adaptive_weight=True, discriminator="none"), 224)


# ------------------------------------------------------------------------------------------------ processes
class DiscriminatorStep(nn.Module):
    """What a loop wraps, so that gradients of the raw network are averaged."""

    def __init__(self, loss):
        super().__init__()
        self.network = loss.discriminator_network
        self.call = loss.discriminator

    def forward(self, images, reconstruction):
        return self.call(images, reconstruction, step=START)[0]


def two_process_worker(rank, store, images, reconstruction, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    loss = build_tokenizer_loss(dataclasses.replace(CONFIG, discriminator="stylegan"), 16)
    step = nn.parallel.DistributedDataParallel(DiscriminatorStep(loss))
    half = slice(2 * rank, 2 * rank + 2)
    fake = reconstruction[half].clone().requires_grad_()
    loss.generator(images[half], fake, step=START)[0].backward()  # between the wrapper's steps, unwrapped
    step(images[half], fake).backward()
    if rank == 1:
        gradients = [p.grad for p in loss.discriminator_network.parameters()]
        torch.save((gradients, fake.grad), out)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that tears the interpreter down around them


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_the_whole_batch(batch, tmp_path):
    images, reconstruction = batch[0], batch[1].detach()
    arguments = (str(tmp_path / "store"), images, reconstruction, str(tmp_path / "out.pt"))
    torch.multiprocessing.spawn(two_process_worker, args=arguments, nprocs=2)
    gradients, fake_gradient = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.manual_seed(0)
    loss = build_tokenizer_loss(dataclasses.replace(CONFIG, discriminator="stylegan"), 16)
    fake = reconstruction.clone().requires_grad_()
    loss.generator(images, fake, step=START)[0].backward()
    loss.discriminator(images, fake, step=START)[0].backward()
    torch.testing.assert_close(fake_gradient / 2, fake.grad[2:])
    for actual, parameter in zip(gradients, loss.discriminator_network.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-4, atol=1e-6)
