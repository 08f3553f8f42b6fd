from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tokenflow.errors import UserError
from tokenflow.training.classifier import EfficientNetLite, SameConv2d, load_classifier


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    torch.save(EfficientNetLite("lite0").state_dict(), folder / "efficientnet-lite0-x.pth")
    return folder


@pytest.mark.parametrize(("variant", "millions"), [("lite0", 4.652), ("lite1", 5.417), ("lite2", 6.092)])
def test_parameter_counts_are_the_published_ones(variant, millions):
    with torch.device("meta"):
        model = EfficientNetLite(variant)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_logits_are_the_head_of_the_trunk(weights):
    model = load_classifier(weights)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    features = model.trunk(pixels)
    assert features.shape == (2, 320, 2, 2)
    torch.testing.assert_close(model(pixels), model.head(features))


def test_same_padding_puts_the_odd_pixel_last():
    conv = SameConv2d(1, 1, 3, 2, bias=False)
    image = torch.rand(1, 1, 8, 8)
    expected = F.conv2d(F.pad(image, (0, 1, 0, 1)), conv.weight, stride=2)
    torch.testing.assert_close(conv(image), expected)


def test_wrong_files_are_named(weights, tmp_path):
    with pytest.raises(UserError, match="expected one"):
        load_classifier(tmp_path / "none")
    torch.save({}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet\.pth: the file name must contain one of lite0"):
        load_classifier(tmp_path)
    state = torch.load(weights / "efficientnet-lite0-x.pth")
    del state["_conv_stem.weight"]
    torch.save(state, tmp_path / "lite0.pth")
    with pytest.raises(UserError, match=r"not EfficientNet-lite0: .*_conv_stem\.weight"):
        load_classifier(tmp_path / "lite0.pth")
