"""The networks that judge generated pictures, and how each is asked.

A set of labels that the ImageNet classifier knows is judged by its own last layer, with only the classes of
the set to choose from. Any other set (102 flowers) is judged by a linear probe on the classifier's features
of the set's train split.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tokenflow.bundled import resolve
from tokenflow.data.loader import iterate_eval
from tokenflow.data.sources import Source, open_source
from tokenflow.errors import UserError
from tokenflow.evaluation import pictures, report
from tokenflow.evaluation.options import GenerationEval
from tokenflow.evaluation.probes import PROBE_ITERATIONS, PROBE_STRENGTH, fit_linear_probe
from tokenflow.evaluation.reconstruction import to_unit_range

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

    from tokenflow.training.classifier import EfficientNetLite

# More rows of `train` change the probe little (102 flowers: 93 % from 2,500 rows) and cost minutes.
PROBE_ROWS = 2500


@dataclass
class Judges:
    """The networks that look at pictures.

    Attributes:
        classifier: gives the features of the Frechet distance, and its opinion where there are labels.
        scores: pooled features [N, 1280] to a score for each label [N, C]; None leaves agreement out.
        teacher: image tower with a projection into the space of `texts`.
        texts: unit vectors of the prompts, [N, T].
        labels: what the C columns stand for, int64 [C], ascending.
        settings: what the figures depend on (hashes, methods), for the fingerprint.
    """

    classifier: EfficientNetLite | None = None
    scores: Callable[[Tensor], Tensor] | None = None
    teacher: CLIPVisionModelWithProjection | None = None
    texts: Tensor | None = None
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    settings: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def pooled_features(
    classifier: EfficientNetLite, shown: Tensor, batch_size: int = 32, quiet: bool = False
) -> Tensor:
    """The classifier's pooled features [N, 1280] of uint8 pictures [N, 3, H, W], enlarged bicubically."""
    device, side = next(classifier.parameters()).device, classifier.image_size
    found = []
    for batch in tqdm(shown.split(batch_size), desc="classifier", disable=quiet or None, leave=False):
        pixels = F.interpolate(to_unit_range(batch.to(device)), (side, side), mode="bicubic").clamp(-1, 1)
        found.append(classifier.pooled(classifier.trunk(pixels)).cpu())
    return torch.cat(found)


@torch.inference_mode()
def image_vectors(teacher: CLIPVisionModelWithProjection, shown: Tensor, batch_size: int = 64) -> Tensor:
    """The teacher's unit vectors [N, T] of uint8 pictures [N, 3, H, W]."""
    from tokenflow.training.teacher_model import embed_images

    side, found = teacher.config.image_size, []
    assert isinstance(side, int)  # transformers also allows pairs
    for batch in shown.split(batch_size):
        pixels = to_unit_range(batch.to(teacher.device))
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        found.append(embed_images(teacher, pixels).float().cpu())
    return torch.cat(found)


def hits(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Whether each row's label has the best score and one of the five best of [N, C]: fp64 [N], 0 and 1."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {"top-1": best[:, 0].double(), "top-5": best.any(1).double()}


def frechet(real: Tensor, fake: Tensor) -> float:
    """Frechet distance (Heusel et al. 2017, eq. 6) of two sets of features [N, D] and [M, D].

    The trace of (C_a C_b)^(1/2) is the nuclear norm of A B^T, for C_a = A^T A, C_b = B^T B: exact, also for
    fewer pictures than dimensions, and then much cheaper than the D x D covariances.
    """
    means, roots = [], []
    for features in (real.double(), fake.double()):
        means.append(features.mean(0))
        root = (features - means[-1]) / (len(features) - 1) ** 0.5
        roots.append(root if len(root) <= root.shape[1] else torch.linalg.qr(root, mode="r").R)
    a, b = roots
    cross = torch.linalg.svdvals(a @ b.T).sum()
    distance = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def label_names(source: Source) -> dict[int, str]:
    """The labels of a set with their names ("" without a column `label_name`); empty for a set without
    labels."""
    opened = open_source(source)
    if "label" not in opened.columns:
        return {}
    wanted = [name for name in ("label", "label_name") if name in opened.columns]
    rows = opened.dataset.select_columns(wanted)
    stated = opened.label_names()
    found = {}
    for row in rows:
        if isinstance(row["label"], int):
            found[row["label"]] = row.get("label_name") or (stated[row["label"]] if stated else "")
    return dict(sorted(found.items()))


def class_columns(data: str, names: dict[int, str], table: str | Path) -> list[int] | None:
    """The classifier's class of each label of a data set, or None where it does not know them all.

    By wnid where the set has a `classes.json` (a list "classes" of "label" and "wnid"), else by name: a label
    is known if exactly one class has its name among its synonyms.

    Args:
        names: label -> name.
        table: .tsv with columns index, wnid, name (synonyms with ", " between them).

    Raises:
        UserError: `table` is missing or has other columns.
    """
    by_wnid, by_name = {}, defaultdict(set)
    try:
        with open(table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                by_wnid[row["wnid"]] = int(row["index"])
                for name in row["name"].lower().split(", "):
                    by_name[name].add(int(row["index"]))
    except OSError as error:
        raise UserError(f"{table}: cannot be read: {error.strerror}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{table}: not a table of classes with columns index, wnid and name") from error
    columns: list[int | None]
    if (wnids := Path(data) / "classes.json").is_file():
        entries = {entry["label"]: entry["wnid"] for entry in json.loads(wnids.read_text())["classes"]}
        columns = [by_wnid.get(entries.get(label, "")) for label in names]
    else:
        found = [by_name.get(name.lower(), set()) for name in names.values()]
        columns = [next(iter(places)) if len(places) == 1 else None for places in found]
    known = [column for column in columns if column is not None]
    return known if len(known) == len(columns) else None


def probe_scores(
    classifier: EfficientNetLite, source: Source, side: int, labels: list[int]
) -> Callable[[Tensor], Tensor]:
    """Fit a linear probe on pictures of `side` pixels of `source`; returns features [N, D] -> scores [N, C].

    Args:
        labels: the C labels that the columns stand for; one that `source` lacks scores minus infinity.
    """
    images = iterate_eval(source, side, limit=PROBE_ROWS)
    features, targets = [], []
    for batch, rows in pictures.batched(images, 64, f"probe on {source.split}"):
        features.append(pooled_features(classifier, batch, quiet=True))
        targets.append(pictures.labels_of(rows, source))
    probe = fit_linear_probe(torch.cat(features), torch.cat(targets))
    place = {label: column for column, label in enumerate(labels)}
    kept = [(i, place[int(label)]) for i, label in enumerate(probe.classes_) if int(label) in place]

    def scores(features: Tensor) -> Tensor:
        found = torch.full((len(features), len(labels)), float("-inf"), dtype=torch.float64)
        logs = torch.from_numpy(probe.predict_log_proba(features.float().numpy()))
        found[:, [column for _, column in kept]] = logs[:, [i for i, _ in kept]].double()
        return found

    return scores


def load_judges(options: GenerationEval, prompts: list[str], side: int, device: torch.device) -> Judges:
    """The judges whose files `options` names, made ready for `prompts` and pictures of `side` pixels.

    Raises:
        UserError: none is named, a file is missing or wrong, or one of teacher and text encoder is missing.
    """
    from tokenflow.training.classifier import load_classifier

    if options.classifier is None and options.teacher is None:
        raise UserError("nothing to judge by; give --classifier FILE, or --teacher and --text-encoder")
    if (options.teacher is None) != (options.text_encoder is None):
        raise UserError("--teacher and --text-encoder only mean something together; give both")
    judges = Judges()
    if options.classifier is not None:
        judges.classifier = classifier = load_classifier(options.classifier).to(device)
        judges.settings["classifier"] = "efficientnet-lite0"
        judges.settings["classifier_sha256"] = report.model_fingerprint(classifier, "")["sha256"]
        names = label_names(Source(options.data, split=options.split))
        judges.labels = torch.tensor(list(names), dtype=torch.int64)
        table = options.classifier_names
        columns = class_columns(options.data, names, table) if names and table is not None else None
        if columns is not None:
            judges.scores = lambda features: classifier.classify(features.to(device))[:, columns].cpu()
            judges.settings["agreement"] = f"the classifier's own {len(columns)} classes of the set"
        elif names:
            source = Source(options.data, split="train")
            judges.scores = probe_scores(classifier, source, side, list(names))
            probe = f"C {PROBE_STRENGTH}, {PROBE_ITERATIONS} iterations, first {PROBE_ROWS} rows of train"
            judges.settings["agreement"] = f"linear probe, {probe}, {len(names)} classes"
    if options.teacher is not None and options.text_encoder is not None:
        judges.teacher, judges.texts = load_teacher(options.teacher, options.text_encoder, prompts, device)
        judges.settings["similarity"] = "cosine in the space of a small CLIP-style teacher, not OpenAI CLIP"
        judges.settings["teacher_sha256"] = report.model_fingerprint(judges.teacher, "")["sha256"]
        judges.settings["texts_sha256"] = hashlib.sha256(judges.texts.numpy().tobytes()).hexdigest()
    return judges


def load_teacher(
    teacher: str, text_encoder: str, prompts: list[str], device: torch.device
) -> tuple[CLIPVisionModelWithProjection, Tensor]:
    """The image tower, and the sentence encoder's unit vectors [N, T] of `prompts`.

    Raises:
        UserError: a folder cannot be loaded, or the two do not share a space.
    """
    from transformers import CLIPVisionModelWithProjection

    from tokenflow.training.teacher_cache import embed_texts

    try:
        tower = CLIPVisionModelWithProjection.from_pretrained(resolve(teacher)).eval()
        texts = embed_texts(text_encoder, prompts)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load teacher {teacher} with text encoder {text_encoder}: {line}") from error
    if tower.config.projection_dim != texts.shape[1]:
        raise UserError(
            f"teacher {teacher} projects to {tower.config.projection_dim} dimensions, "
            f"text encoder {text_encoder} has {texts.shape[1]}; they do not belong together"
        )
    return tower.requires_grad_(False).to(device), texts
