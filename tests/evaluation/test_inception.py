"""The FID network's layout and the Frechet distance."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from tokenflow.errors import UserError
from tokenflow.evaluation.inception import (
    FidInception,
    GaussianStatistics,
    frechet_distance,
    resize_like_tensorflow1,
)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of the layout with random weights; old files have no batch counters."""
    torch.manual_seed(0)
    state = {k: v for k, v in FidInception().state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("fid") / "pt_inception-2015-12-05.pth"
    torch.save(state, path)
    return path


def test_layout_of_the_fid_file(weights_file):
    state = torch.load(weights_file, weights_only=True)
    assert len(state) == 472  # 94 convolutions of 5 tensors, and the classifier's two
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_6b.branch7x7dbl_2.conv.weight"].shape == (128, 128, 7, 1)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    network = FidInception.from_file(weights_file)
    assert torch.equal(network.Mixed_7a.branch3x3_2.conv.weight, state["Mixed_7a.branch3x3_2.conv.weight"])
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_features_do_not_depend_on_the_batch(weights_file):
    network = FidInception.from_file(weights_file)
    pictures = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    with torch.inference_mode():
        both, one = network(pictures), network(pictures[1:])
    assert both.shape == (2, 2048)
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)


def test_files_of_another_layout_are_refused(tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, other)
    with pytest.raises(UserError, match=r"not the FID Inception layout.*Conv2d_1a"):
        FidInception.from_file(other)
    other.write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="not a readable PyTorch weights file"):
        FidInception.from_file(other)
    with pytest.raises(UserError, match="no such file"):
        FidInception.from_file(tmp_path / "missing.pth")


def test_resize_samples_like_tensorflow1():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    row = resize_like_tensorflow1(ramp, 8)[0, 0, 0]
    assert row.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]  # sample i at i / 2, the border repeated
    smooth = torch.rand(2, 3, 299, 299)
    assert torch.equal(resize_like_tensorflow1(smooth, 299), smooth)
    half_pixel = F.interpolate(ramp, size=(8, 8), mode="bilinear", align_corners=False)[0, 0, 0]
    assert row.tolist() != half_pixel.tolist()


def gaussian(rng, dimensions, rank):
    root = rng.normal(size=(dimensions, rank))
    return torch.from_numpy(rng.normal(size=dimensions)), torch.from_numpy(root @ root.T / rank)


@pytest.mark.parametrize("rank", [24, 5])
def test_frechet_distance_equals_the_formula_with_a_matrix_root(rank):
    rng = np.random.default_rng(rank)
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(rng, 16, rank), gaussian(rng, 16, 24)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * np.trace(root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(mean_b, cov_b, mean_a, cov_a) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(mean_a, cov_a, mean_a, cov_a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_isotropic_gaussians_is_analytic():
    mean, identity = torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    # |3|^2 in each of 8 dims + 8 * (1 + 4 - 2 * 2)
    assert frechet_distance(mean, identity, mean + 3, 4 * identity) == pytest.approx(8 * 9 + 8)


def test_statistics_do_not_depend_on_the_batches():
    features = torch.randn(57, 6, dtype=torch.float64) + 100
    whole, parts = GaussianStatistics(6), GaussianStatistics(6)
    whole.update(features)
    for chunk in features.split(10):
        parts.update(chunk)
    for statistics in (whole, parts):
        mean, covariance = statistics.mean_and_covariance()
        torch.testing.assert_close(mean, features.mean(0))
        torch.testing.assert_close(covariance, torch.cov(features.T))
    with pytest.raises(UserError, match="at least 2 pictures"):
        GaussianStatistics(6).mean_and_covariance()
