"""Discriminators of the adversarial loss, with the parameter names of the released training checkpoints.

* `PatchGANDiscriminator` (the default): a map of logits, one per 70-pixel patch (Isola et al. 2017).
* `StyleGANDiscriminator`: one logit an image, residual blocks with blurred downsampling (Karras et al. 2020);
  square images with a power-of-two side only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.errors import UserError
from tokenflow.training.loss_config import LossConfig

STYLEGAN_CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}


class PatchGANDiscriminator(nn.Module):
    """4x4 convolutions with BatchNorm and leaky ReLU; ``width=64, num_layers=3`` is the released layout.

    BatchNorm makes the logits of a batch depend on each other; real and fake batches go through on their own.
    """

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, num_layers + 1):
            wider = width * min(2**i, 8)
            stride = 1 if i == num_layers else 2
            layers += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to logits ``[B, 1, h, w]``; 224 px gives 26x26."""
        return self.main(images)


class Blur(nn.Module):
    """Depthwise low-pass filter: outer product of (1, 2, 1) over 16, reflect padding."""

    f: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        taps = self.f / self.f.sum()
        kernel = torch.outer(taps, taps).to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


class StyleGANBlock(nn.Module):
    """Residual block that halves the side: two 3x3 convolutions, blur, strided 3x3; 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class StyleGANDiscriminator(nn.Module):
    """One logit an image; ``image_size=256`` is the released layout.

    Raises `UserError` where `image_size` is no power of two between 8 and 1024 (so not for 224 or 384 px).
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        if image_size not in STYLEGAN_CHANNELS or image_size < 8:
            raise UserError(
                f"the StyleGAN discriminator has no layout for image size {image_size}: use a power of two "
                "from 8 to 1024, or discriminator='patchgan'"
            )
        channels = STYLEGAN_CHANNELS[image_size]
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.LeakyReLU(0.2)]
        side = image_size
        while side > 4:
            side //= 2
            blocks.append(StyleGANBlock(channels, STYLEGAN_CHANNELS[side]))
            channels = STYLEGAN_CHANNELS[side]
        self.blocks = nn.Sequential(*blocks)
        self.final_conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(
            nn.Linear(channels * 4 * 4, channels), nn.LeakyReLU(0.2), nn.Linear(channels, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, image_size, image_size]`` in [-1, 1] to logits ``[B, 1]``."""
        return self.final_linear(self.final_conv(self.blocks(images)).flatten(1))


def build_discriminator(config: LossConfig, image_size: int) -> nn.Module | None:
    """The discriminator that the config names, freshly initialised, or None."""
    if config.discriminator == "none":
        return None
    if config.discriminator == "stylegan":
        return StyleGANDiscriminator(image_size)
    return PatchGANDiscriminator(config.discriminator_width, config.discriminator_layers)
