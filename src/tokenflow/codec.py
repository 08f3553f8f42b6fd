"""Files to tokens and back: the work of `tokenflow encode`, `decode` and `reconstruct`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from tokenflow.bundled import resolve
from tokenflow.data.images import read_image, save_image
from tokenflow.errors import UserError
from tokenflow.files import atomic_write
from tokenflow.tokenizer.configuration import TokenFlowConfig
from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
from tokenflow.tokenizer.modeling import TokenFlowModel, check_weights
from tokenflow.tokenizer.token_file import TokenFile, codebook_fingerprint, load_tokens, save_tokens

if TYPE_CHECKING:
    from os import PathLike

Module = TypeVar("Module", bound=torch.nn.Module)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and the processor that belongs to it."""

    model: TokenFlowModel
    processor: TokenFlowImageProcessor
    name: str

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """`[B, 3, H, W]` on the model's device."""
        return self.processor(list(pictures), return_tensors="pt").pixel_values.to(self.model.device)


def load(name: str, *, device: str = "auto", dtype: str = "float32") -> Loaded:
    """Load a model by bundled name, folder or hub name.

    Args:
        device: "auto" (a GPU if there is one), or any device that torch knows.
        dtype: of the decoders, "float32" or "bfloat16"; encoders and quantizer are always float32.

    Raises:
        UserError: no such model, another kind of model, damaged files, or no such device.
    """
    folder = resolve(name)
    tokenizer_config(name)
    try:
        model, report = TokenFlowModel.from_pretrained(name, output_loading_info=True)
        check_weights(name, "unexpected", report["unexpected_keys"])
        try:
            processor = TokenFlowImageProcessor.from_pretrained(folder)
        except OSError:  # a folder without preprocessor_config.json, as training writes while it runs
            processor = TokenFlowImageProcessor(size=model.config.image_size)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load model {name}: {first_line(error)}") from error
    model = place(model, device, dtype)
    return Loaded(model.eval(), processor, name)


@torch.inference_mode()
def encode_files(
    images: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    model: str = "tokenflow-tiny",
    resize_mode: str = "crop",
    device: str = "auto",
    batch_size: int = 16,
) -> TokenFile:
    """Encode image files (or folders of them) into one token file, which is also returned.

    Raises:
        UserError: an image cannot be read, the model cannot be loaded, the output cannot be written or is one
            of the images; no file is written then.
    """
    paths = image_paths(images)
    spare_inputs([Path(output)], paths)
    check_writable(output)
    loaded = load(model, device=device)
    loaded.processor.resize_mode = resize_mode
    parts, sizes = [], []
    for batch in _batches(paths, batch_size, "encode"):
        pictures = [read_image(path) for path in batch]
        sizes += [picture.size for picture in pictures]
        parts.append(loaded.model.encode(loaded.pixels(pictures)).indices.cpu())
    config = loaded.model.config
    tokens = TokenFile(
        indices=torch.cat(parts),
        model=model,
        fingerprint=codebook_fingerprint(loaded.model),
        codebook_size=config.codebook_size,
        scales=list(config.scales),
        image_size=config.image_size,
        files=[str(path) for path in paths],
        sizes=sizes,
    )
    save_tokens(output, tokens)
    return tokens


@torch.inference_mode()
def decode_file(
    tokens: str | PathLike[str],
    output: str | PathLike[str],
    *,
    model: str | None = None,
    num_scales: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    batch_size: int = 16,
) -> list[Path]:
    """Decode a token file into PNG pictures in the folder `output`, named after the original files.

    Args:
        model: the one named in the file by default; another one must have the same codebook.
        num_scales: decode only the first so many scales.

    Raises:
        UserError: the file is damaged, the model is not the one that made it, or `output` cannot be written
            or holds the original files.
    """
    stored = load_tokens(tokens)
    targets = _targets(Path(output), stored.files)
    spare_inputs(targets, [Path(tokens), *map(Path, stored.files)])
    check_writable(targets[0] if targets else Path(output) / "x.png")
    loaded = load(model or stored.model, device=device, dtype=dtype)
    stored.check_model(loaded.model, loaded.name)
    for batch in _batches(range(len(targets)), batch_size, "decode"):
        indices = stored.indices[batch[0] : batch[-1] + 1].to(loaded.model.device)
        quantized = loaded.model.quantized_from_indices(indices, num_scales)
        pictures = loaded.processor.postprocess(loaded.model.decode_pixels(quantized))
        for i, picture in zip(batch, pictures, strict=True):
            save_image(picture, targets[i])
    return targets


@torch.inference_mode()
def reconstruct_files(
    images: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    model: str = "tokenflow-tiny",
    metrics: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Images through tokens and back: one PNG each and `comparison.png` in the folder `output`.

    Args:
        metrics: also measure PSNR (dB) and SSIM against the cropped original and write `metrics.json`.

    Returns:
        one dict an image: `file`, `reconstruction`, and with `metrics` also `psnr` and `ssim`.

    Raises:
        UserError: as `encode_files`.
    """
    if metrics:
        import torchmetrics  # noqa: F401  (missing? Say so before the work, not after)

    from tokenflow.evaluation.reconstruction import psnr, ssim, to_uint8

    paths, folder = image_paths(images), Path(output)
    targets = _targets(folder, [str(path) for path in paths])
    spare_inputs([*targets, folder / "comparison.png", folder / "metrics.json"], paths)
    check_writable(folder / "comparison.png")
    loaded = load(model, device=device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[Image.Image, Image.Image]] = []
    for batch in _batches(range(len(paths)), batch_size, "reconstruct"):
        pixels = loaded.pixels([read_image(paths[i]) for i in batch])
        rebuilt = loaded.model.decode_pixels(loaded.model.encode(pixels).quantized)
        pictures = loaded.processor.postprocess(rebuilt)
        pairs += zip(loaded.processor.postprocess(pixels), pictures, strict=True)
        for i, picture in zip(batch, pictures, strict=True):
            save_image(picture, targets[i])
            rows.append({"file": str(paths[i]), "reconstruction": str(targets[i])})
        if metrics:
            real, fake = to_uint8(pixels), to_uint8(rebuilt)
            for i, decibel, similarity in zip(batch, psnr(real, fake), ssim(real, fake), strict=True):
                rows[i] |= {"psnr": float(decibel), "ssim": float(similarity)}
    save_image(comparison_sheet(pairs, [path.stem for path in targets]), folder / "comparison.png")
    if metrics:
        with atomic_write(folder / "metrics.json") as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def tokenizer_config(name: str) -> TokenFlowConfig:
    """A model's configuration; anything else that `name` may be is a UserError, never default values."""
    try:
        found, _ = TokenFlowConfig.get_config_dict(resolve(name))
        if not found:
            raise UserError(f"{name} is not a model: there is no config.json in it")
        kind = found.get("model_type")
        if kind != TokenFlowConfig.model_type:
            raise UserError(f"{name} is not a tokenflow tokenizer: its config says model_type {kind!r}")
        return TokenFlowConfig.from_dict(found)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {name}: {first_line(error)}") from error


def image_paths(given: Sequence[str | PathLike[str]]) -> list[Path]:
    """Files as they are, folders as the image files directly in them, sorted.

    Raises:
        UserError: a file that does not exist, a folder without images, or nothing given.
    """
    paths: list[Path] = []
    for item in map(Path, given):
        if item.is_dir():
            inside = sorted(path for path in item.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f"no images in folder {item}")
            paths += inside
        elif not item.exists():
            raise UserError(f"cannot read image {item}: no such file")
        else:
            paths.append(item)
    if not paths:
        raise UserError("no images given; name at least one file or folder")
    return paths


def check_writable(path: str | PathLike[str]) -> None:
    """Raise the UserError of a write to `path` before the work is done. Leaves nothing but its folder."""

    class Untouched(Exception):
        pass

    with suppress(Untouched), atomic_write(path):
        raise Untouched


def comparison_sheet(
    pairs: Sequence[tuple[Image.Image, Image.Image]], names: Sequence[str], pairs_in_row: int = 3
) -> Image.Image:
    """Originals beside their reconstructions on white, each pair under its name, below column headings."""
    side, gap, line = pairs[0][0].width, 4, 16
    columns = min(pairs_in_row, len(pairs))
    rows = -(-len(pairs) // columns)
    width, height = 2 * side + 4 * gap, side + line + 2 * gap
    sheet = Image.new("RGB", (columns * width, line + rows * height), "white")
    for column in range(columns):
        _write(sheet, "original", column * width + gap, 0, side)
        _write(sheet, "reconstruction", column * width + 2 * gap + side, 0, side)
    for i, (original, rebuilt) in enumerate(pairs):
        left, top = i % columns * width + gap, line + i // columns * height
        _write(sheet, names[i], left, top, 2 * side + gap)
        sheet.paste(original, (left, top + line))
        sheet.paste(rebuilt, (left + side + gap, top + line))
    return sheet


def _write(sheet: Image.Image, text: str, left: int, top: int, width: int) -> None:
    """One line of text, cut off where it would run into the next."""
    label = Image.new("RGB", (width, 14), "white")
    ImageDraw.Draw(label).text((0, 0), text, "black", ImageFont.load_default(11))
    sheet.paste(label, (left, top))


def _targets(folder: Path, files: Sequence[str]) -> list[Path]:
    """A PNG path an image; equal stems get a number."""
    targets: list[Path] = []
    taken = {"comparison"}
    for file in files:
        stem = Path(file.replace("\\", "/")).stem or "image"
        name, number = stem, 2
        while name.lower() in taken:  # file systems that ignore case must not lose a picture
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.lower())
        targets.append(folder / f"{name}.png")
    return targets


def spare_inputs(targets: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise a UserError if writing `targets` would replace one of the existing `inputs`."""
    # By identity, not by name: links, and file systems that ignore case, give one file several names.
    files = {_identity(path) for path in inputs} - {None}
    for target in targets:
        if _identity(target) in files:
            raise UserError(f"output {target} would overwrite an input file; choose another --output")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # not there, or (from a token file) nothing that could be a path here
        return None
    return found.st_dev, found.st_ino


def _batches(items: Sequence[Any], size: int, what: str) -> Iterator[Sequence[Any]]:
    if size < 1:
        raise UserError(f"batch size must be at least 1, got {size}")
    with tqdm(total=len(items), desc=what, unit="image", disable=None) as bar:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            bar.update(len(batch))


def place(model: Module, device: str, dtype: str) -> Module:
    """A model on a device ("auto": a GPU if there is one) in a dtype.

    Raises:
        UserError: no such device.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if found is None else found.type
    try:
        return model.to(device, getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use device {device!r}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an exception says, without the rest of a long explanation."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
