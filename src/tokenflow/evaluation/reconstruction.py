"""How well images come back: PSNR, SSIM, perceptual distances, rFID and codebook usage.

Definitions (the ones that published numbers most often leave open): pictures are centre-cropped as the
tokenizer's own processor does it; reconstructions are truncated to 8 bits (`clamp(127.5 x + 128)`) and
compared with 8-bit originals; PSNR is taken per image and averaged in dB; SSIM has data range 1, an
11-pixel Gaussian window of sigma 1.5, RGB.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenflow.data.loader import iterate_eval
from tokenflow.data.sources import Source, default_split
from tokenflow.errors import UserError
from tokenflow.evaluation import baselines, pictures, report
from tokenflow.evaluation.inception import FidInception, GaussianStatistics, frechet_distance
from tokenflow.evaluation.options import ReconstructionEval

if TYPE_CHECKING:
    from tokenflow.tokenizer.modeling import TokenFlowModel

# PSNR given to a picture that comes back without any error, where the formula has no value.
IDENTICAL_DB = 100.0


def to_unit_range(pictures: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1], what the tokenizer reads."""
    return pictures.float() / 127.5 - 1


def to_uint8(pixel_values: Tensor) -> Tensor:
    """[-1, 1] (not clamped) -> uint8, truncating as the released code does."""
    return (127.5 * pixel_values.float() + 128).clamp(0, 255).to(torch.uint8)


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    """PSNR in dB of each uint8 picture [B, 3, H, W] -> [B] fp64; `IDENTICAL_DB` where the two are equal."""
    error = (real.double() - fake.double()).square().mean((1, 2, 3))
    return torch.where(error > 0, 10 * torch.log10(255**2 / error), IDENTICAL_DB)


def ssim(real: Tensor, fake: Tensor) -> Tensor:
    """SSIM of each uint8 picture [B, 3, H, W] -> [B] fp64, data range 1 (torchmetrics; Wang et al. 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    real, fake = real.float() / 255, fake.float() / 255
    value = structural_similarity_index_measure(fake, real, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)  # a tuple only where the full image is asked for
    return value.double()


class CodebookUsage:
    """Which codes were seen, overall and per scale."""

    def __init__(self, codebook_size: int, scales: Sequence[int]) -> None:
        self.scales = list(scales)
        self.seen = torch.zeros(len(self.scales), codebook_size, dtype=torch.bool)
        self.pictures = 0

    def update(self, indices: Tensor) -> None:
        """Add `indices` [B, L] int64, scales in order."""
        parts = indices.cpu().split([side * side for side in self.scales], dim=1)
        for seen, part in zip(self.seen, parts, strict=True):
            seen[part.reshape(-1)] = True
        self.pictures += len(indices)

    def compute(self) -> dict[str, Any]:
        """`overall`: distinct codes / K; `per scale`: distinct codes / min(K, tokens of that scale seen)."""
        codebook_size = self.seen.shape[1]
        per_scale = {}
        for side, seen in zip(self.scales, self.seen, strict=True):
            tokens = self.pictures * side * side
            per_scale[f"{side}x{side}"] = int(seen.sum()) / max(min(codebook_size, tokens), 1)
        return {"overall": int(self.seen.any(0).sum()) / codebook_size, "per scale": per_scale}


# A distance takes two uint8 batches [B, 3, H, W] and returns one number per picture [B].
Distance = Callable[[Tensor, Tensor], Tensor]


def measure(
    batches: Iterable[Tensor],
    rebuild: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    *,
    usage: CodebookUsage | None = None,
    distances: dict[str, Distance] | None = None,
    inception: FidInception | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rebuild every batch and average over pictures.

    Args:
        batches: uint8 pictures [B, 3, H, W].
        rebuild: uint8 batch -> (uint8 batch, indices [B, L] or None).
        usage: counts the indices where given.
        distances: further per-picture distances by name, such as LPIPS.
        inception: adds rFID where given.

    Returns:
        the metrics, and what was measured on: `pictures` and `sha256` (of the prepared pixels, so
        that any difference in crop, resize, decoding or order shows).

    Raises:
        UserError: there was no batch.
    """
    distances = distances or {}
    totals: dict[str, list[Tensor]] = {"PSNR (dB)": [], "SSIM": [], **{name: [] for name in distances}}
    statistics = (GaussianStatistics(), GaussianStatistics())
    digest = hashlib.sha256()
    pictures = 0
    with torch.inference_mode():
        for real in batches:
            digest.update(real.cpu().contiguous().numpy().tobytes())
            pictures += len(real)
            fake, indices = rebuild(real)
            totals["PSNR (dB)"].append(psnr(real, fake))
            totals["SSIM"].append(ssim(real, fake))
            for name, distance in distances.items():
                totals[name].append(distance(real, fake).double().reshape(-1))
            if inception is not None:
                for gaussian, side in zip(statistics, (real, fake), strict=True):
                    gaussian.update(inception(side.to(inception.fc.weight.device)))
            if usage is not None and indices is not None:
                usage.update(indices)
    if not pictures:
        raise UserError("the evaluation set is empty: no picture could be read; check data and split")
    metrics: dict[str, Any] = {name: float(torch.cat(values).mean()) for name, values in totals.items()}
    if inception is not None:
        (mean, covariance), (fake_mean, fake_covariance) = (s.mean_and_covariance() for s in statistics)
        metrics["rFID"] = frechet_distance(mean, covariance, fake_mean, fake_covariance)
    if usage is not None:
        metrics["codebook usage"] = usage.compute()
    return metrics, {"pictures": pictures, "sha256": digest.hexdigest()}


def evaluate_reconstruction(
    model: TokenFlowModel | str,
    source: Source,
    *,
    name: str = "model",
    image_size: int | None = None,
    limit: int | None = None,
    distances: dict[str, Distance] | None = None,
    settings: dict[str, Any] | None = None,
    inception: FidInception | None = None,
    batch_size: int = 16,
) -> report.Result:
    """Rebuild the pictures of `source` and measure what is lost.

    Args:
        model: a tokenizer, or the name of a baseline such as "webp:250".
        source: centre crops are taken from it in its own order.
        name: what the result calls the model.
        image_size: side of the pictures for a baseline; a model has its own.
        limit: only the first rows.
        distances: further distances by name, of uint8 batches (see `measure`).
        settings: what distances and `inception` depend on (sha256 of weights), for the fingerprint.
        inception: adds rFID.
        batch_size: changes the speed, not the figures.

    Returns:
        a result for `report`.

    Raises:
        UserError: a tokenizer without a pixel decoder; an unknown baseline; no picture that can be read.
    """
    started = time.perf_counter()
    usage = None
    if isinstance(model, str):
        side, device, dtype = image_size or 0, torch.device("cpu"), torch.float32
        about = {"name": model, "parameters": 0, "sha256": ""}

        def rebuild(real: Tensor) -> tuple[Tensor, Tensor | None]:
            return baselines.reconstruct(model, real), None
    else:
        if model.pixel_decoder is None:
            raise UserError(f"{name}: this tokenizer has no pixel decoder, so there is nothing to rebuild")
        side, device, dtype = model.config.image_size, model.device, model.decoder_dtype
        about = report.model_fingerprint(model, name)
        usage = CodebookUsage(model.config.codebook_size, model.config.scales)

        def rebuild(real: Tensor) -> tuple[Tensor, Tensor | None]:
            encoded = model.encode(to_unit_range(real).to(device))
            decoded = model.decode_pixels(encoded.quantized)
            return to_uint8(decoded).to(real.device), encoded.indices

    images = iterate_eval(source, side, num_workers=pictures.readers_for(device), limit=limit)
    batches = (batch for batch, _ in pictures.batched(images, batch_size, "rebuilding"))
    with pictures.eval_mode(model):
        metrics, measured = measure(batches, rebuild, usage=usage, distances=distances, inception=inception)
    fingerprint = pictures.fingerprint(images, side)
    fingerprint["reference"] |= measured
    fingerprint |= {
        "rounding": "truncate",
        "dtype": str(dtype).removeprefix("torch."),
        "backend": device.type,
    }
    return {
        "kind": "reconstruction",
        "metrics": metrics,
        "fingerprint": fingerprint | {"ssim": _ssim_settings()} | (settings or {}),
        "model": about,
        "skipped": len(images.skipped),
        "seconds": round(time.perf_counter() - started, 1),
    }


def run(options: ReconstructionEval) -> report.Result:
    """What `tokenflow eval reconstruction` does: load, measure, write the JSON where asked. Prints nothing
    but progress."""
    import torchmetrics  # noqa: F401  (missing? Say so before the work, not after)

    from tokenflow.codec import check_writable, load
    from tokenflow.tokenizer.configuration import TokenFlowConfig

    if options.out is not None:
        check_writable(options.out)
    subject: TokenFlowModel | str
    if options.baseline is not None:
        baselines.parse(options.baseline)
        subject, device = options.baseline, torch.device("cpu")
        image_size = TokenFlowConfig.from_pretrained(options.model).image_size
    else:
        subject = load(options.model, device=options.device, dtype=options.dtype).model
        device, image_size = subject.device, subject.config.image_size
    distances, settings = perceptual_distances(options, device)
    inception = None
    if options.inception is not None:
        inception = FidInception.from_file(options.inception).to(device)
        settings["inception_sha256"] = report.file_sha256(options.inception)
    result = evaluate_reconstruction(
        subject,
        Source(options.data, split=options.split or default_split(options.data)),
        name=options.model,
        image_size=image_size,
        limit=options.limit,
        distances=distances,
        settings=settings,
        inception=inception,
        batch_size=options.batch_size,
    )
    result["command"] = report.command_line()
    if options.out is not None:
        report.write(result, options.out)
    return result


def perceptual_distances(
    options: ReconstructionEval, device: torch.device
) -> tuple[dict[str, Distance], dict[str, Any]]:
    """The perceptual distances whose weights the user gave, and their part of the fingerprint."""
    # These networks live with the losses that they also serve; nothing of the training itself is loaded.
    from tokenflow.training.perceptual import LPIPS, FrozenDistance, VGG16TrunkDistance

    networks: dict[str, FrozenDistance] = {}
    settings: dict[str, Any] = {}
    if options.vgg16 is not None:
        networks["vgg16-trunk"] = VGG16TrunkDistance.from_keras_h5(options.vgg16)
        settings["vgg16_sha256"] = report.file_sha256(options.vgg16)
    if options.lpips is not None:
        networks["LPIPS"] = LPIPS.from_files(options.lpips, options.lpips_heads)
        settings["lpips_sha256"] = report.file_sha256(options.lpips)
    if options.lpips_heads is not None:
        settings["lpips_heads_sha256"] = report.file_sha256(options.lpips_heads)

    def on_pictures(network: FrozenDistance) -> Distance:
        network.to(device)
        return lambda real, fake: network(*(to_unit_range(x).to(device) for x in (real, fake))).cpu()

    distances = {name: on_pictures(network) for name, network in networks.items()}
    return distances, settings


def _ssim_settings() -> str:
    import torchmetrics

    return f"data range 1, Gaussian window 11, sigma 1.5, RGB, torchmetrics {torchmetrics.__version__}"
