"""What the tokens know about their image: nearest neighbours, a linear probe and zero-shot naming.

Everything looks at frozen, mean-pooled features of labelled pictures: the quantized map's semantic flow,
its pixel flow, both, the semantic decoder's output, and the continuous teacher that the semantic flow was
trained to follow. The ratio to the teacher says how much quantization costs; the ratio to the pixel flow
says what the semantic flow is for (Sec. 3.2).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenflow.data.loader import EvalImages, iterate_eval
from tokenflow.data.sources import Source, open_source
from tokenflow.errors import UserError
from tokenflow.evaluation import pictures, report
from tokenflow.evaluation.options import SemanticsEval
from tokenflow.evaluation.probes import (
    NEIGHBOURS,
    PROBE_ITERATIONS,
    PROBE_STRENGTH,
    knn_accuracy,
    linear_probe_accuracy,
    zero_shot_accuracy,
)
from tokenflow.evaluation.reconstruction import to_unit_range

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
        each flow's quantized vectors [B, dim] by the flow's name, "both" (all flows) where there are
        several, and where there are such parts "semantic decoder" [B, T] and "teacher" [B, T]; all fp32.
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
    """Features of all (pixel_values [B, 3, H, W], labels [B]) batches, in memory (25,000 x 40 values: 4 MB).

    Raises:
        UserError: there was no batch.
    """
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


def judge(
    train: Features, val: Features, class_embeddings: Tensor | None = None, k: int = 20
) -> dict[str, Any]:
    """k-NN, linear probe and zero-shot accuracies of `val`, each 0 to 1, by feature; with a teacher also
    the share of the teacher's accuracy that each feature reaches.

    Args:
        train, val: features with the same names.
        class_embeddings: [C, T], row i the text embedding of label i; None leaves zero-shot out.
    """
    metrics: dict[str, Any] = {"k-NN": {}, "linear probe": {}}
    for name, features in train.by_name.items():
        task = (features, train.labels, val.by_name[name], val.labels)
        metrics["k-NN"][name] = knn_accuracy(*task)
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


def read_class_embeddings(path: str | Path, pack: str | None = None) -> tuple[Tensor, list[str]]:
    """Text embeddings [C, T] (row i for label i) and the C class names of a `class_embeddings.safetensors`.

    Two layouts are read: the tensor "embeddings" with a JSON list in metadata "names", as models ship it;
    and one tensor for each labelled set with metadata {"ids", "names"} under the same name, as the training
    of a teacher leaves it, of which `pack` chooses one.

    Raises:
        UserError: the file is missing, has neither layout, or not one name per row.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            key = "embeddings" if "embeddings" in file.keys() else str(pack)  # noqa: SIM118 (not a dict)
            embeddings, metadata = file.get_tensor(key), file.metadata() or {}
            classes = (
                {"names": json.loads(metadata["names"])} if key == "embeddings" else json.loads(metadata[key])
            )
            names, ids = classes["names"], classes.get("ids", list(range(len(classes["names"]))))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not a class embedding file (tensor 'embeddings', metadata 'names')"
        ) from error
    if embeddings.ndim != 2 or len(names) != len(embeddings) or sorted(ids) != list(range(len(names))):
        raise UserError(f"{path}: {len(names)} names for embeddings of shape {list(embeddings.shape)}")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return embeddings.float()[order], [names[row] for row in order]


def evaluate_semantics(
    model: TokenFlowModel,
    train_source: Source,
    val_source: Source,
    teacher: SemanticTeacher | None = None,
    class_embeddings: Tensor | None = None,
    *,
    name: str = "model",
    limit: int | None = None,
    settings: dict[str, Any] | None = None,
    batch_size: int = 64,
) -> report.Result:
    """Judge the tokens of two labelled sets: learn from `train_source`, report on `val_source`.

    Args:
        model: a tokenizer.
        train_source, val_source: sources with an integer column `label`.
        teacher: the continuous features to compare with; sees the same pixels.
        class_embeddings: [C, T], row i the text embedding of label i; adds zero-shot accuracy.
        name: what the result calls the model.
        limit: only the first rows of each source.
        settings: what else the figures depend on (hashes of teacher and embeddings), for the fingerprint.
        batch_size: changes the speed, not the figures.

    Returns:
        a result for `report`.

    Raises:
        UserError: no labels, or more classes than embeddings.
    """
    started = time.perf_counter()
    side, readers = model.config.image_size, pictures.readers_for(model.device)
    splits, prints = [], []
    with pictures.eval_mode(model):
        for source in (train_source, val_source):
            images = iterate_eval(source, side, num_workers=readers, limit=limit)
            digest = hashlib.sha256()
            features = collect(model, _labelled(images, batch_size, digest), teacher)
            splits.append(features)
            about = pictures.fingerprint(images, side)
            about["reference"] |= {"pictures": len(features.labels), "sha256": digest.hexdigest()}
            prints.append(about)
    train, val = splits
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    if class_embeddings is not None and len(class_embeddings) < classes:
        raise UserError(
            f"{len(class_embeddings)} class embeddings for labels up to {classes - 1}; give one per label"
        )
    return {
        "kind": "semantics",
        "metrics": judge(train, val, class_embeddings) | {"chance": 1 / classes},
        "fingerprint": prints[1] | {"train": prints[0]["reference"]} | _methods(model) | (settings or {}),
        "model": report.model_fingerprint(model, name),
        "seconds": round(time.perf_counter() - started, 1),
    }


def run(options: SemanticsEval) -> report.Result:
    """What `tokenflow eval semantics` does: load, measure, write the JSON where asked. Prints nothing but
    progress."""
    import sklearn  # noqa: F401  (missing? Say so before the work, not after)

    from tokenflow.bundled import resolve
    from tokenflow.codec import check_writable, load
    from tokenflow.tokenizer.semantic import SemanticTeacher

    if options.out is not None:
        check_writable(options.out)
    model = load(options.model, device=options.device).model
    teacher, embeddings = None, None
    settings: dict[str, Any] = {}
    if options.teacher is not None:
        teacher = SemanticTeacher.from_pretrained(resolve(options.teacher))
        teacher.to(model.device)
        settings["teacher_sha256"] = report.model_fingerprint(teacher, "teacher")["sha256"]
    val_source = Source(options.data, split=options.split)
    class_embeddings = options.class_embeddings or _own_class_embeddings(options.model, val_source)
    if class_embeddings is not None:
        embeddings, _ = read_class_embeddings(class_embeddings, Path(options.data).name)
        settings["class_embeddings_sha256"] = report.file_sha256(class_embeddings)
    result = evaluate_semantics(
        model,
        Source(options.data, split=options.train_split),
        val_source,
        teacher,
        embeddings,
        name=options.model,
        limit=options.limit,
        settings=settings,
        batch_size=options.batch_size,
    )
    result["command"] = report.command_line()
    if options.out is not None:
        report.write(result, options.out)
    return result


def _own_class_embeddings(model: str, source: Source) -> Path | None:
    """The model folder's class embeddings, if it has some and `source` has the classes they are of."""
    from tokenflow.bundled import resolve

    file = Path(resolve(model)) / "class_embeddings.safetensors"
    if not file.is_file():
        return None
    try:
        _, names = read_class_embeddings(file, Path(source.path_or_name).name)
    except UserError:  # of other sets than this one
        return None
    opened = open_source(source)
    if (stated := opened.label_names()) is not None:
        return file if stated == names else None
    if not {"label", "label_name"} <= set(opened.columns):
        return None
    first = next(iter(opened.dataset.select_columns(["label", "label_name"])), None)
    return file if first and (first["label"], first["label_name"]) in enumerate(names) else None


def _labelled(images: EvalImages, batch_size: int, digest: Any) -> Iterator[tuple[Tensor, Tensor]]:
    source = images.opened.source
    for batch, rows in pictures.batched(images, batch_size, f"features of {source.split}"):
        labels = pictures.labels_of(rows, source)
        digest.update(batch.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
        yield to_unit_range(batch), labels


def _methods(model: TokenFlowModel) -> dict[str, Any]:
    import sklearn

    probe = f"standardised, C {PROBE_STRENGTH}, {PROBE_ITERATIONS} iterations"
    return {
        "pooling": "mean",
        "k-NN": f"k {NEIGHBOURS}, cosine, equal votes",
        "linear probe": f"{probe}, scikit-learn {sklearn.__version__}",
        "dtype": "float32",
        "backend": model.device.type,
    }
