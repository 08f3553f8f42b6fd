"""The FID network and the Frechet distance.

"FID" is a distance in the features of one particular network: the Inception graph of 2015-12-05, whose
weights live in `pt_inception-2015-12-05-*.pth` (pytorch-fid) and `weights-inception-2015-12-05-*.pth`
(torch-fidelity); both files have the layout below. No weights come with this package: the user names the
file, and its sha256 is part of every result.

The network differs from the usual Inception v3 in two places: average pooling does not count the padding,
and the last block pools by maximum. Pictures are resized to 299 as TensorFlow 1 did it, without half-pixel
centres.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.errors import UserError

FEATURES = 2048
INPUT_SIDE = 299


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35 grid: 1x1, 5x5, two 3x3, pooled."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNormAct(inputs, 64, 1)
        self.branch5x5_1 = ConvNormAct(inputs, 48, 1)
        self.branch5x5_2 = ConvNormAct(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNormAct(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNormAct(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormAct(96, 96, 3, padding=1)
        self.branch_pool = ConvNormAct(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35 -> 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNormAct(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNormAct(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNormAct(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormAct(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 x 17 grid: 7x7 as pairs of 1x7 and 7x1."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvNormAct(inputs, 192, 1)
        self.branch7x7_1 = ConvNormAct(inputs, width, 1)
        self.branch7x7_2 = ConvNormAct(width, width, row, padding=(0, 3))
        self.branch7x7_3 = ConvNormAct(width, 192, column, padding=(3, 0))
        self.branch7x7dbl_1 = ConvNormAct(inputs, width, 1)
        self.branch7x7dbl_2 = ConvNormAct(width, width, column, padding=(3, 0))
        self.branch7x7dbl_3 = ConvNormAct(width, width, row, padding=(0, 3))
        self.branch7x7dbl_4 = ConvNormAct(width, width, column, padding=(3, 0))
        self.branch7x7dbl_5 = ConvNormAct(width, 192, row, padding=(0, 3))
        self.branch_pool = ConvNormAct(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 -> 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNormAct(inputs, 192, 1)
        self.branch3x3_2 = ConvNormAct(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNormAct(inputs, 192, 1)
        self.branch7x7x3_2 = ConvNormAct(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNormAct(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNormAct(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 x 8 grid: branches that fork into 1x3 and 3x1. The very last block pools by maximum."""

    def __init__(self, inputs: int, max_pool: bool) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.max_pool = max_pool
        self.branch1x1 = ConvNormAct(inputs, 320, 1)
        self.branch3x3_1 = ConvNormAct(inputs, 384, 1)
        self.branch3x3_2a = ConvNormAct(384, 384, row, padding=(0, 1))
        self.branch3x3_2b = ConvNormAct(384, 384, column, padding=(1, 0))
        self.branch3x3dbl_1 = ConvNormAct(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNormAct(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNormAct(384, 384, row, padding=(0, 1))
        self.branch3x3dbl_3b = ConvNormAct(384, 384, column, padding=(1, 0))
        self.branch_pool = ConvNormAct(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        forks = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        forks += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(pooled)], 1)


class FidInception(nn.Module):
    """uint8 pictures [B, 3, H, W] -> pooled features [B, 2048] fp32 (23.9 M parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormAct(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormAct(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormAct(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormAct(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormAct(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool=32)
        self.Mixed_5c = BlockA(256, pool=64)
        self.Mixed_5d = BlockA(288, pool=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, width=128)
        self.Mixed_6c = BlockC(768, width=160)
        self.Mixed_6d = BlockC(768, width=160)
        self.Mixed_6e = BlockC(768, width=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, max_pool=False)
        self.Mixed_7c = BlockE(2048, max_pool=True)
        self.fc = nn.Linear(FEATURES, 1008)  # in the file; FID does not use it

    def forward(self, pictures: Tensor) -> Tensor:
        x = (resize_like_tensorflow1(pictures.float(), INPUT_SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))

    @classmethod
    def from_file(cls, path: str | Path) -> FidInception:
        """Read a `pt_inception-2015-12-05` file. Raises `UserError` when the file is missing or has another
        layout."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; --inception wants pt_inception-2015-12-05-6726825d.pth")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types here, all meaning "not such a file"
            raise UserError(
                f"{path}: not a readable PyTorch weights file ({type(error).__name__})"
            ) from error
        network = cls()
        # Older files have no batch counters; they are of no use in eval mode.
        wanted = {k for k in network.state_dict() if not k.endswith("num_batches_tracked")}
        given = {k for k in state if not k.endswith("num_batches_tracked")}
        if wanted != given:
            odd = sorted(wanted ^ given)
            raise UserError(
                f"{path}: not the FID Inception layout: {len(odd)} keys missing or unexpected, "
                f"the first is {odd[0]!r}"
            )
        try:
            network.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise UserError(f"{path}: not the FID Inception layout, a tensor has another shape") from error
        return network.eval().requires_grad_(False)


def resize_like_tensorflow1(x: Tensor, side: int) -> Tensor:
    """Bilinear resize [B, C, H, W] -> [B, C, side, side] whose sample i lies at i * H / side (no half-pixel
    centres)."""
    for dim in (2, 3):
        size = x.shape[dim]
        position = torch.arange(side, dtype=torch.float32, device=x.device) * (size / side)
        low = position.floor().long()
        high = (low + 1).clamp_max(size - 1)
        share = (position - low).view([-1 if d == dim else 1 for d in range(4)])
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * share
    return x


class GaussianStatistics:
    """Running mean and covariance of feature vectors, in fp64 so that order and batch size do not matter."""

    def __init__(self, dimensions: int = FEATURES) -> None:
        self.count = 0
        self.sum = torch.zeros(dimensions, dtype=torch.float64)
        self.products = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add `features` [N, D]."""
        x = features.detach().to("cpu", torch.float64)
        self.count += len(x)
        self.sum += x.sum(0)
        self.products += x.T @ x

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased covariance [D, D], fp64. Raises `UserError` below two samples."""
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 pictures on each side, got {self.count}")
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians (Heusel et al. 2017, eq. 6).

    The trace of the root is taken through the symmetric C_a^(1/2) C_b C_a^(1/2), which has the same
    eigenvalues as C_a C_b and stays real when a covariance is singular (fewer pictures than dimensions).
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(distance), 0.0)
