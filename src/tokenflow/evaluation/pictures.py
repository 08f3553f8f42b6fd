"""Batches of prepared pictures from a source, and the part of a fingerprint that they decide."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.data.loader import EvalImages
from tokenflow.errors import UserError


def batched(images: EvalImages, batch_size: int, what: str) -> Iterator[tuple[Tensor, list[dict[str, Any]]]]:
    """uint8 pictures [B, 3, H, W] with their rows' other columns, behind a progress bar named `what`."""
    total = None if images.opened.source.streaming else len(images.opened.dataset)
    if images.limit is not None:
        total = images.limit if total is None else min(images.limit, total)
    pictures: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    for picture, row in tqdm(images, total=total, desc=what, unit="image"):
        pictures.append(picture)
        rows.append(row)
        if len(pictures) == batch_size:
            yield torch.stack(pictures), rows
            pictures, rows = [], []
    if pictures:
        yield torch.stack(pictures), rows


def readers_for(device: torch.device) -> int:
    """How many processes shall decode pictures for a model there: it alone keeps the cores of a CPU busy."""
    return 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))


def fingerprint(images: EvalImages, image_size: int) -> dict[str, Any]:
    """How the pictures were chosen and prepared. The name is the last part of the path, so that it does not
    depend on where the user keeps the data; the hash of the pixels, added by whoever reads them, says
    whether it is the same set."""
    import PIL

    source = images.opened.source
    text = source.path_or_name
    named = {"name": Path(text).expanduser().resolve().name if Path(text).expanduser().exists() else text}
    if source.only is not None:
        named["only"] = source.only
    return {
        "reference": named | {"split": source.split},
        "image_size": image_size,
        "crop": "centre",
        "resize": "box halvings, bicubic, then crop",
        "pillow": PIL.__version__,
    }


def labels_of(rows: list[dict[str, Any]], source: Any) -> Tensor:
    """The `label` column as int64 [B]. Raises `UserError` when a row has none."""
    labels = [row.get("label") for row in rows]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        bad = next(label for label in labels if not (isinstance(label, int) and label >= 0))
        columns = ", ".join(rows[0]) or "none"
        raise UserError(
            f"{source}: needs a column 'label' of integers, got {bad!r}; the columns are {columns}"
        )
    return torch.tensor(labels, dtype=torch.int64)


@contextmanager
def eval_mode(model: nn.Module | str) -> Iterator[None]:
    """Eval mode inside the block, the former mode after it: in training mode a tokenizer may skip a scale."""
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
