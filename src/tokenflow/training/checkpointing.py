"""Training checkpoints: atomic, rotated, and complete: a resumed run repeats the uninterrupted one.

A checkpoint is a folder `checkpoints/step-00001000/`. It is written under a hidden name, flushed to disk and
renamed, so a folder of that name is always whole. Weights are safetensors; optimizer states are torch files
that are only ever read with `weights_only=True`. `export/` inside it is a `from_pretrained` folder of the
averaged weights.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenflow.errors import UserError
from tokenflow.files import flush, write_error

if TYPE_CHECKING:
    from tokenflow.tokenizer.modeling import TokenFlowModel

PREFIX = "step-"


# ---------------------------------------------------------------------------------------------------- folders
def checkpoint_folders(root: Path) -> list[Path]:
    """The whole checkpoints under `root`, oldest first."""
    return sorted(p for p in root.glob(f"{PREFIX}*") if p.is_dir())


def latest_checkpoint(root: Path) -> Path | None:
    folders = checkpoint_folders(root)
    return folders[-1] if folders else None


def step_folder(root: Path, step: int) -> Path:
    return root / f"{PREFIX}{step:08d}"


def rotate(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed runs left half-written."""
    for folder in checkpoint_folders(root)[: -max(1, keep)]:
        shutil.rmtree(folder)
    for leftover in root.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover)


# ---------------------------------------------------------------------------------------------- random states
def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators as plain values and tensors."""
    version, values, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the global one, on purpose)
    state = {
        "python": [version, list(values), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------------------------------------------- tensors
def transient_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the state dict leaves out, such as the usage windows, by full name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def load_buffers(model: nn.Module, path: Path) -> None:
    """Copy stored `transient_buffers` into the model; a window whose size has changed starts empty."""
    stored = load_file(path)
    for name, buffer in transient_buffers(model).items():
        if name in stored and stored[name].shape == buffer.shape:
            buffer.copy_(stored[name])


def save_torch(value: Any, path: Path) -> None:
    """Write a torch file. Raises OSError where the disk is full or `path` cannot be written."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch hides the OSError below an internal error of its zip writer
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_torch(path: Path) -> Any:
    """A torch file of tensors and plain values. Raises UserError for anything else, or a damaged file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file. Raises UserError where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}; delete its folder to go back to an older one"
        ) from error


def save_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------- export
def save_export(model: TokenFlowModel, weights: dict[str, Tensor], folder: Path) -> None:
    """A `from_pretrained` folder: `weights` (a full state dict) and the model's image processor."""
    from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor

    model.save_pretrained(folder, state_dict={name: t.clone() for name, t in weights.items()})
    TokenFlowImageProcessor(size=model.config.image_size).save_pretrained(folder)


def point_to(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, replacing an older link at once."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def export_half(model_dir: str | Path, out: str | Path) -> Path:
    """Write the tokenizer in `model_dir` in the form that ships with the package: half-precision safetensors.

    Codebooks and weights are float16 in the file and float32 again after `TokenFlowModel.from_pretrained`.
    The folder also gets config.json and preprocessor_config.json.

    Raises:
        UserError: a weight does not fit into float16; `out` cannot be written to.
    """
    from tokenflow.tokenizer.modeling import TokenFlowModel

    model = TokenFlowModel.from_pretrained(model_dir)
    state = _halves(model.state_dict(), model_dir)
    return _fill(out, lambda folder: save_export(model, state, folder))


def export_half_generator(model_dir: str | Path, out: str | Path, image_tokenizer: str) -> Path:
    """The same for a text-to-image model, whose image tokenizer is named instead of copied.

    Code vectors stay float32: the model was trained on these.
    """
    from tokenflow.generation.pipeline import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained(model_dir)
    state = _halves(pipe.model.state_dict(), model_dir) | {"code_table.codes": pipe.model.code_table.codes}
    pipe.model.config.image_tokenizer = image_tokenizer

    def write(folder: Path) -> None:
        pipe.model.save_pretrained(folder, state_dict=state)
        pipe.text_tokenizer.save_pretrained(folder)

    return _fill(out, write)


def _halves(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    halves = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    for name, t in halves.items():
        if not t.isfinite().all():
            raise UserError(f"{source}: {name} has values beyond the range of float16 (65504)")
    return halves


def _fill(out: str | Path, write: Callable[[Path], None]) -> Path:
    """Write files into a folder, each whole or not at all; a card beside them stays."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".") as temporary:
            write(Path(temporary))
            for path in Path(temporary).iterdir():
                flush(path)
                os.replace(path, out / path.name)
    except (OSError, SafetensorError) as error:
        raise write_error(out, error) from error
    return out
