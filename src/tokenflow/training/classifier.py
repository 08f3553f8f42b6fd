"""EfficientNet-Lite (Tan and Le, 2019; the "lite" variants have no squeeze-excitation and use ReLU6).

An ImageNet classifier has two jobs here: the tiny teacher is distilled from it (`training/teacher.py`), and
it is the independent judge of pictures in evaluation. Module names follow the published PyTorch checkpoints,
so that their state dicts load as they are.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow.errors import UserError

# (expansion, channels, repeats, stride, kernel) of the seven stages of EfficientNet-B0, Tab. 1 of the paper.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
# name: (width, depth, image size)
VARIANTS = {"lite0": (1.0, 1.0, 224), "lite1": (1.0, 1.1, 240), "lite2": (1.1, 1.2, 260)}


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: the odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        pad_h, pad_w = (
            max((math.ceil(n / s) - 1) * s + k - n, 0)
            for n, k, s in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        )
        if pad_h % 2 == 0 and pad_w % 2 == 0:
            padding = (pad_h // 2, pad_w // 2)
            return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Inverted residual: widen, depthwise convolution, narrow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = expansion != 1
        if self.expand:
            self._expand_conv = _conv(inputs, width)
            self._bn0 = _norm(width)
        self._depthwise_conv = _conv(width, width, kernel, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv = _conv(width, outputs)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """ImageNet-1k classifier.

    Args:
        variant: "lite0", "lite1" or "lite2"; `image_size` is the side it was trained at.
    """

    def __init__(self, variant: str = "lite0", num_classes: int = 1000):
        super().__init__()
        width, depth, self.image_size = VARIANTS[variant]
        self._conv_stem = _conv(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks, inputs = [], 32
        for stage, (expansion, channels, repeats, stride, kernel) in enumerate(STAGES):
            outputs = max(8, int(channels * width + 4) // 8 * 8)
            # The lite variants leave the depth of the first and the last stage alone.
            count = repeats if stage in (0, len(STAGES) - 1) else math.ceil(repeats * depth)
            for i in range(count):
                blocks.append(Block(inputs, outputs, expansion, kernel, stride if i == 0 else 1))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _conv(inputs, 1280)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, num_classes)

    @property
    def channels(self) -> int:
        """Channels of a `trunk` map."""
        return self._conv_head.in_channels

    def trunk(self, pixel_values: Tensor) -> Tensor:
        """Bottleneck features [B, 320, H/32, W/32] (Lite2: 352) of `pixel_values` [B, 3, H, W] in [-1, 1]."""
        x = pixel_values * (127.5 / 128) + 0.5 / 128  # the network was trained on (uint8 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return x

    def pooled(self, features: Tensor) -> Tensor:
        """What the last layer reads [B, 1280] of (a crop of) a `trunk` map [B, 320, h, w]."""
        return F.relu6(self._bn1(self._conv_head(features))).mean((2, 3))

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits [B, 1000] of `pooled` features."""
        return self._fc(pooled)

    def head(self, features: Tensor) -> Tensor:
        """Logits [B, 1000] of (a crop of) a `trunk` map [B, 320, h, w]."""
        return self.classify(self.pooled(features))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [B, 1000] of `pixel_values` [B, 3, H, W] in [-1, 1], best at H = W = `image_size`."""
        return self.head(self.trunk(pixel_values))


def load_classifier(path: str | Path) -> EfficientNetLite:
    """The frozen classifier of a `.pth` file, or of a folder with one, whose name says lite0, lite1 or lite2.

    Raises:
        UserError: no such file, several, an unknown variant, or a state dict of another network.
    """
    files = sorted(Path(path).glob("*.pth")) if Path(path).is_dir() else [Path(path)]
    if len(files) != 1 or not files[0].is_file():
        raise UserError(f"classifier {path}: expected one .pth file of EfficientNet-Lite weights")
    match = re.search(r"lite[0-2]", files[0].name)
    if match is None:
        raise UserError(f"classifier {files[0]}: the file name must contain one of {', '.join(VARIANTS)}")
    state = torch.load(files[0], map_location="cpu", weights_only=True)
    model = EfficientNetLite(match[0])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"classifier {files[0]}: not EfficientNet-{match[0]}: {reason}") from None
    return model.eval().requires_grad_(False)
