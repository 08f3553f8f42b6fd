"""What the tokens know about their image: nearest neighbours, a linear probe and zero-shot naming.

Everything looks at frozen, mean-pooled features of labelled pictures: the quantized map's semantic flow, its pixel flow,
both, the semantic decoder's output, and the continuous teacher that the semantic flow was trained to follow. The ratio
to the teacher says how much quantization costs; the ratio to the pixel flow says what the semantic flow is for (Sec. 3.2).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenflow.errors import UserError
from tokenflow.evaluation.probes import knn_accuracy, linear_probe_accuracy, zero_shot_accuracy

if TYPE_CHECKING:
    from tokenflow.tokenizer.modeling import TokenFlowModel
    from tokenflow.tokenizer.semantic import SemanticTeacher

TEACHER, DECODED = "teacher", "semantic decoder"


@dataclass
class Features:
    """Mean-pooled features of one split: name -> [N, D] fp32, and labels int64 [N]."""

    by_name: dict[str, Tensor]
    labels: Tensor


def pooled_features(
    model: TokenFlowModel, pixel_values: Tensor, teacher: SemanticTeacher | None = None
) -> dict[str, Tensor]:
    """Mean-pooled features of one batch.

    Args:
        model: in eval mode.
        pixel_values: [B, 3, H, W] in [-1, 1].
        teacher: gives `[B, N, T]`; None leaves its features out.

    Returns:
        each flow's quantized vectors [B, dim] by the flow's name, "both" (all flows) where there are several, and where
        there are such parts "semantic decoder" [B, T] and "teacher" [B, T]; all fp32.
    """
    quantized = model.encode(pixel_values).quantized
    pooled = {name: part.mean((2, 3)) for name, part in model.split_flows(quantized).items()}
    if len(pooled) > 1:
        pooled["both" if len(pooled) == 2 else "all flows"] = quantized.mean((2, 3))
    decoded = model.decode_semantic(quantized)
    if "semantic" in decoded:
        pooled[DECODED] = decoded["semantic"].mean(1)
    if teacher is not None:
        pooled[TEACHER] = teacher(pixel_values).mean(1)
    return {name: value.float() for name, value in pooled.items()}


def collect(
    model: TokenFlowModel, batches: Iterable[tuple[Tensor, Tensor]], teacher: SemanticTeacher | None = None
) -> Features:
    """Features of all (pixel_values [B, 3, H, W], labels [B]) batches, in memory (25,000 x 40 values: 4 MB)."""
    collected: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    device = model.device
    with torch.inference_mode():
        for pixel_values, label in batches:
            labels.append(label.cpu())
            for name, value in pooled_features(model, pixel_values.to(device), teacher).items():
                collected.setdefault(name, []).append(value.cpu())
    if not labels:
        raise UserError("the evaluation set is empty: no picture could be read; check data and split")
    return Features({name: torch.cat(values) for name, values in collected.items()}, torch.cat(labels))


def judge(train: Features, val: Features, class_embeddings: Tensor | None = None, k: int = 20) -> dict[str, Any]:
    """k-NN, linear probe and zero-shot accuracies of `val`, each 0 to 1, by feature; with a teacher also the share of
    the teacher's accuracy that each feature reaches.

    Args:
        train, val: features with the same names.
        class_embeddings: [C, T], row i the text embedding of label i; None leaves zero-shot out.
        k: neighbours.
    """
    metrics: dict[str, Any] = {"k-NN": {}, "linear probe": {}}
    for name, features in train.by_name.items():
        task = (features, train.labels, val.by_name[name], val.labels)
        metrics["k-NN"][name] = knn_accuracy(*task, k=k)
        metrics["linear probe"][name] = linear_probe_accuracy(*task)
    for method in ("k-NN", "linear probe"):
        ceiling = metrics[method].get(TEACHER)
        if ceiling:
            shares = {name: value / ceiling for name, value in metrics[method].items() if name != TEACHER}
            metrics[f"{method}, share of the teacher's"] = shares
    if class_embeddings is not None:
        metrics["zero-shot"] = {
            name: zero_shot_accuracy(val.by_name[name], val.labels, class_embeddings)
            for name in (DECODED, TEACHER)
            if name in val.by_name
        }
    return metrics


def read_class_embeddings(path: str | Path) -> tuple[Tensor, list[str]]:
    """Text embeddings [C, T] and the C class names of a `class_embeddings.safetensors`.

    Raises:
        UserError: the file is missing, or lacks the tensor "embeddings" or one name per row in metadata "names".
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            embeddings = file.get_tensor("embeddings")
            names = json.loads((file.metadata() or {})["names"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a class embedding file (tensor 'embeddings', metadata 'names')") from error
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise UserError(f"{path}: {len(names)} names for embeddings of shape {list(embeddings.shape)}")
    return embeddings.float(), names
