"""Discriminators, LPIPS and the whole loss against the released code (README sections 4.5, 7 and 9)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goldens import LOSS_GRAD_TOL, LOSS_RTOL, PATCHGAN_GRAD_TOL, TOKENIZER, assert_grad_close
from seeded_weights import seeded_tensor

from tokenflow.checkpoints.tokenizer import released_key
from tokenflow.tokenizer.configuration import CLIP_B16, CLIP_MEAN, CLIP_STD
from tokenflow.tokenizer.semantic import SemanticTeacher, VisionTower
from tokenflow.training import losses as L
from tokenflow.training.discriminators import Blur, PatchGANDiscriminator, StyleGANDiscriminator
from tokenflow.training.losses import LossConfig, TokenizerLoss
from tokenflow.training.perceptual import LPIPS


def assert_close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual).double(), expected.double(), rtol=LOSS_RTOL, atol=1e-6)


# The released non-saturating losses call binary_cross_entropy_with_logits(target, logits): arguments swapped.
def swapped_generator_loss(fake):
    return F.binary_cross_entropy_with_logits(torch.ones_like(fake), fake)


def swapped_discriminator_loss(real, fake):
    real_loss = F.binary_cross_entropy_with_logits(torch.ones_like(real), real)
    fake_loss = F.binary_cross_entropy_with_logits(torch.zeros_like(fake), fake)
    return 0.5 * (real_loss + fake_loss)


@pytest.fixture
def patchgan(state_of):
    model = PatchGANDiscriminator()
    model.load_state_dict(state_of("patchgan"), strict=True)
    return model


@pytest.fixture(scope="module")
def lpips(state_of):
    model = LPIPS()
    model.load_state_dict(state_of("lpips_vgg16"), strict=True)
    return model


def test_patchgan(golden, real_and_fake, patchgan):
    case = golden("losses/patchgan")
    real, fake = real_and_fake(224)
    with torch.no_grad():
        patchgan.eval()
        assert_close(patchgan(real), case["eval_logits_real"])
        assert_close(patchgan(fake), case["eval_logits_fake"])
    patchgan.train()
    logits_real, logits_fake = patchgan(real), patchgan(fake)
    assert_close(logits_real, case["train_logits_real"])
    assert_close(logits_fake, case["train_logits_fake"])
    assert_close(patchgan.main[3].running_mean, case["bn_running_mean_after"])
    assert_close(patchgan.main[3].running_var, case["bn_running_var_after"])

    hinge = L.hinge_discriminator_loss(logits_real, logits_fake)
    assert_close(hinge, case["d_hinge"])
    assert_close(L.logistic_discriminator_loss(logits_real, logits_fake), case["d_vanilla"])
    assert_close(L.hinge_generator_loss(logits_fake), case["g_hinge"])
    hinge.backward()
    parameters = dict(patchgan.named_parameters())
    for name in ("main.0.weight", "main.0.bias", "main.3.weight", "main.11.weight", "main.11.bias"):
        tolerance = LOSS_GRAD_TOL if name.startswith("main.11") else PATCHGAN_GRAD_TOL
        assert_grad_close(parameters[name].grad, case[f"d_hinge_grad_{name}"], tolerance)


@pytest.mark.parametrize("file", ["patchgan", "stylegan_256"])
def test_released_non_saturating_losses_are_swapped_and_ours_are_not(golden, file):
    case = golden(f"losses/{file}")
    prefix = "train_" if file == "patchgan" else ""
    real, fake = case[f"{prefix}logits_real"], case[f"{prefix}logits_fake"].requires_grad_()
    # the golden values are those of the swapped call, which reduces to the README's formula ...
    assert_close(swapped_generator_loss(fake), case["g_non_saturating"])
    assert_close(swapped_discriminator_loss(real, fake), case["d_non_saturating"])
    constant = math.log(1 + math.exp(-1))
    assert_close(1 - fake.mean() + constant, case["g_non_saturating"])
    assert_close(0.5 * (1 - real.mean() + constant + math.log(2)), case["d_non_saturating"])
    # ... in which the discriminator learns nothing from reconstructions
    (swapped_gradient,) = torch.autograd.grad(swapped_discriminator_loss(real, fake), fake)
    assert not swapped_gradient.any()
    # ours is the cross entropy with the arguments in their places
    ours = L.non_saturating_generator_loss(fake)
    assert_close(ours, F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake)))
    (gradient,) = torch.autograd.grad(L.logistic_discriminator_loss(real, fake), fake)
    assert (gradient > 0).all()


@pytest.mark.slow
def test_stylegan(golden, real_and_fake, state_of):
    case = golden("losses/stylegan_256")
    assert_close(Blur()(case["blur_input"]), case["blur_output"])
    model = StyleGANDiscriminator(256)
    model.load_state_dict(state_of("stylegan_256"), strict=True)
    checked = ("blocks.0.weight", "blocks.2.conv_res.weight", "final_linear.2.weight")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in checked)
    real, fake = real_and_fake(256)
    logits_real, logits_fake = model(real), model(fake)
    assert_close(logits_real, case["logits_real"])
    assert_close(logits_fake, case["logits_fake"])
    hinge = L.hinge_discriminator_loss(logits_real, logits_fake)
    vanilla = L.logistic_discriminator_loss(logits_real, logits_fake)
    assert_close(hinge, case["d_hinge"])
    assert_close(vanilla, case["d_vanilla"])
    assert_close(L.hinge_generator_loss(logits_fake), case["g_hinge"])
    (hinge + vanilla).backward()  # README 9.4
    parameters = dict(model.named_parameters())
    for name in checked:
        assert_grad_close(parameters[name].grad, case[f"d_hinge_plus_vanilla_grad_{name}"], LOSS_GRAD_TOL)


def test_lpips(golden, real_and_fake, lpips):
    case = golden("losses/lpips")
    real, fake = real_and_fake(224)
    with torch.no_grad():
        maps = lpips.net(lpips.scaling_layer(real))
        assert_close(torch.stack([m.std() for m in maps]), case["feature_std"])
        assert_close(torch.stack(lpips.stages(real, fake)), case["per_layer"])
    fake = fake.requires_grad_()
    value = lpips(real, fake)
    assert_close(value.detach(), case["value"].flatten())
    value.mean().backward()
    assert_grad_close(fake.grad[:, :, ::8, ::8], case["grad_fake_sub"], LOSS_GRAD_TOL)
    assert_grad_close(fake.grad.flatten(1).norm(dim=1), case["grad_fake_l2"], LOSS_GRAD_TOL)


def test_cosine(golden):
    case = golden("losses/full_loss")
    prediction = seeded_tensor("losses.cosine_rec", (2, 5, 16)).requires_grad_()
    value = L.semantic_loss(prediction, seeded_tensor("losses.cosine_target", (2, 5, 16)))
    assert_close(value.detach(), case["cosine_value"])
    value.backward()
    assert_grad_close(prediction.grad, case["cosine_grad_rec"], LOSS_GRAD_TOL)


# ------------------------------------------------------------------------------------------ the complete loss
LOGGED = {  # our names of what the released code logs; it logs the slots of the codebook dict too
    "reconstruction": "rec_loss",
    "perceptual": "p_loss",
    "adversarial": "generator_adv_loss",
    "semantic": "vqkd_loss",
    "vq": "vq_loss",
    "commitment": "commit_loss",
    "entropy": "entropy_loss",
}


def logged_values(step):
    with np.load(TOKENIZER / "losses/full_loss.npz") as arrays:
        names, values = arrays[f"gen_step{step}_names"], arrays[f"gen_step{step}_values"]
    return dict(zip(names.tolist(), values.tolist(), strict=True))


@pytest.fixture
def full_case(golden, real_and_fake, lpips, patchgan, teacher_target):
    values = golden("losses/full_loss")
    real, fake = real_and_fake(224)
    terms = values["codebook_terms"][:3].float()
    return SimpleNamespace(
        values=values,
        real=real,
        fake=fake.requires_grad_(),
        semantic=seeded_tensor("losses.vqkd_recon", (2, 196, 512)).requires_grad_(),
        target=teacher_target,
        quantizer=dict(zip(("vq", "commitment", "entropy"), terms, strict=True)),
        loss=TokenizerLoss(LossConfig(), lpips, patchgan).train(),
    )


@pytest.fixture(scope="module")
def teacher_target(state_of, real_and_fake):
    """Tokens ``[2, 196, 512]`` of the released CLIP teacher, loaded into our `SemanticTeacher`."""
    state = {
        key.replace("visual.", "encoder_vqkd.", 1): value
        for key, value in state_of("clip_vitb16_teacher_visual").items()
    }
    projection = state.pop("encoder_vqkd.proj").T
    tower = VisionTower(CLIP_B16, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    weights = {}
    for key in tower.model.state_dict():
        released, third = released_key(f"encoders.semantic.tower.model.{key}", "clip")
        weights[key] = state[released] if third is None else state[released].chunk(3)[third]
    tower.model.load_state_dict(weights, strict=True)
    linear = torch.nn.Linear(768, 512, bias=False)
    linear.load_state_dict({"weight": projection})
    return SemanticTeacher(tower, linear)(real_and_fake(224)[0])


def test_teacher_target(golden, teacher_target):
    case = golden("losses/full_loss")
    torch.testing.assert_close(
        teacher_target[:, ::4, ::8], case["teacher_target_sub"], rtol=LOSS_RTOL, atol=1e-4
    )
    assert_close(teacher_target.norm(dim=-1), case["teacher_target_l2"])


@pytest.mark.parametrize("step", [7, 20001])
def test_complete_loss(full_case, step):
    c = full_case
    total, parts = c.loss.generator(c.real, c.fake, c.semantic, c.target, c.quantizer, step=step)
    assert_close(total.detach(), c.values[f"gen_step{step}_total"])
    logged = logged_values(step)
    for name, value in parts.items():
        expected = logged["disc_weight"] if name == "adversarial_weight" else logged[LOGGED[name]]
        assert value.item() == pytest.approx(expected, rel=LOSS_RTOL, abs=1e-6), name
    # before the start the discriminator is not even run
    assert ("adversarial" in parts) == (step == 20001)
    total.backward()
    tolerance = PATCHGAN_GRAD_TOL if step == 20001 else LOSS_GRAD_TOL
    assert_grad_close(c.fake.grad[:, :, ::8, ::8], c.values[f"gen_step{step}_grad_recon_sub"], tolerance)
    assert_grad_close(
        c.fake.grad.flatten(1).norm(dim=1), c.values[f"gen_step{step}_grad_recon_l2"], tolerance
    )
    assert_grad_close(c.semantic.grad[:, ::8, ::16], c.values[f"gen_step{step}_grad_sem_sub"], LOSS_GRAD_TOL)
    assert all(p.grad is None for p in c.loss.parameters())

    loss, parts = c.loss.discriminator(c.real, c.fake, step=step)
    assert_close(loss.detach(), c.values[f"disc_step{step}_total"])
    logits = torch.stack([parts["logits_real"], parts["logits_fake"]])
    assert_close(logits, c.values[f"disc_step{step}_logits_mean"])


def test_complete_loss_without_a_semantic_branch(full_case):
    c = full_case
    total, parts = c.loss.generator(c.real, c.fake.detach(), quantizer=c.quantizer, step=7)
    assert_close(total, c.values["gen_step7_total_without_semantic"])
    assert "semantic" not in parts


def test_adaptive_weight(full_case, lpips, patchgan):
    c = full_case
    feature = seeded_tensor("losses.adaptive_feature", (2, 16, 224, 224))
    last_layer = seeded_tensor("losses.adaptive_last_layer", (3, 16, 3, 3), scale=1 / 12).requires_grad_()
    fake = F.conv2d(feature, last_layer, padding=1)
    loss = TokenizerLoss(LossConfig(adaptive_weight=True), lpips, patchgan).train()
    total, parts = loss.generator(
        c.real, fake, c.semantic, c.target, c.quantizer, step=20001, last_layer=last_layer
    )
    terms = torch.stack([parts["reconstruction"], parts["perceptual"], parts["adversarial"]])
    assert_close(terms, c.values["adaptive_terms"])
    # through PatchGAN's gradient, so with its tolerance
    weight = parts["adversarial_weight"].item() / loss.config.discriminator_weight
    assert weight == pytest.approx(c.values["adaptive_weight"].item(), rel=PATCHGAN_GRAD_TOL)
    assert_close(total.detach(), c.values["adaptive_total"])
