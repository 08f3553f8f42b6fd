from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenflow.errors import UserError
from tokenflow.training.discriminators import (
    Blur,
    PatchGANDiscriminator,
    StyleGANDiscriminator,
    build_discriminator,
)
from tokenflow.training.loss_config import LossConfig


@pytest.mark.parametrize(("size", "side"), [(64, 6), (128, 14), (224, 26)])
def test_patchgan_gives_a_map_of_logits(size, side):
    model = PatchGANDiscriminator(width=4)
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 1, side, side)


def test_patchgan_initial_weights():
    model = PatchGANDiscriminator()
    convolutions = [m for m in model.main if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.main if isinstance(m, nn.BatchNorm2d)]
    assert [m.bias is not None for m in convolutions] == [True, False, False, False, True]
    assert convolutions[3].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert norms[2].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert norms[2].weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("size", [8, 32])
def test_stylegan_gives_one_logit_an_image(size):
    model = StyleGANDiscriminator(size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 1)


@pytest.mark.parametrize("size", [4, 224, 384, 2048])
def test_stylegan_names_the_sizes_it_has(size):
    with pytest.raises(UserError, match=f"image size {size}: use a power of two"):
        StyleGANDiscriminator(size)


def test_blur_keeps_constants_and_spreads_a_point():
    blur = Blur()
    assert torch.allclose(blur(torch.full((1, 3, 5, 6), 2.0)), torch.full((1, 3, 5, 6), 2.0))
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 16.0
    assert blur(point)[0, 0, 1:4, 1:4].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]


def test_build_discriminator():
    small = build_discriminator(LossConfig(discriminator_width=8, discriminator_layers=2), 128)
    assert isinstance(small, PatchGANDiscriminator)
    assert small.main[0].out_channels == 8
    assert len([m for m in small.main if isinstance(m, nn.BatchNorm2d)]) == 2
    assert isinstance(build_discriminator(LossConfig(discriminator="stylegan"), 8), StyleGANDiscriminator)
    assert build_discriminator(LossConfig(discriminator="none"), 128) is None
