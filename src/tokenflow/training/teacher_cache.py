"""What the teacher learns from, computed once and memory-mapped: pictures, classifier features, text vectors.

Images are decoded and resized once (uint8); the classifier runs once per image and its bottleneck map is
kept, so that a training step crops picture and map alike and pays only for the student.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tokenflow.data.crops import center_crop
from tokenflow.data.images import read_image
from tokenflow.errors import UserError
from tokenflow.files import atomic_write
from tokenflow.training.classifier import load_classifier
from tokenflow.training.teacher_recipe import TeacherRecipe

PROMPT = "a photo of a {}"


@dataclass
class Source:
    """The rows `start` to `stop` of the cache, which came from one pack.

    `texts`, unit vectors: [classes, 1, T], of the classes `class_ids` with the names `class_names`, or
    [n, captions, T], of every picture's own captions. `labels` [n] int64: each picture's row of `texts`.
    """

    name: str
    start: int
    stop: int
    class_ids: list[int]
    class_names: list[str]
    texts: Tensor
    labels: Tensor


@dataclass
class TeacherCache:
    """images uint8 [N, 3, S, S]; features fp16 [N, C, h, w] of the classifier, None with live targets; one
    `Source` per pack."""

    images: np.ndarray
    features: np.ndarray | None
    sources: list[Source]
    classifier_texts: Tensor


def read_square(data: bytes, size: int) -> np.ndarray:
    """Encoded image -> centre square, uint8 [3, size, size]."""
    return np.asarray(center_crop(read_image(data), size)).transpose(2, 0, 1)


def read_pack(path: str | Path, split: str, columns: tuple[str, ...] = ()) -> list[dict]:
    """Rows of `PATH/SPLIT.parquet` with the encoded image under "bytes"."""
    file = Path(path) / f"{split}.parquet"
    if not file.is_file():
        raise UserError(f"pack {path}: no {split}.parquet there")
    rows = pq.read_table(file, columns=["image", *columns]).to_pylist()
    for row in rows:
        row["bytes"] = row.pop("image")["bytes"]
    return rows


@torch.inference_mode()
def embed_texts(text_encoder: str, texts: list[str], batch_size: int = 256) -> Tensor:
    """Unit sentence vectors [n, T] fp32: mean of the encoder's last hidden states (Sentence-BERT)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = AutoModel.from_pretrained(text_encoder, dtype=torch.float32).eval().to(device)
    # Sorting by length saves most of the padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for start in tqdm(range(0, len(order), batch_size), desc="texts", disable=len(order) <= batch_size):
        chosen = order[start : start + batch_size]
        tokens = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(device)
        mask = tokens["attention_mask"].unsqueeze(-1)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model(**tokens).last_hidden_state.float()
        vectors[chosen] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu()
    return vectors


def text_vectors(recipe: TeacherRecipe, texts: list[str]) -> Tensor:
    """`embed_texts` kept in half precision in `OUTPUT/texts-HASH.safetensors`.

    A run that finds the file needs no text encoder; its name depends on the encoder's and the texts only.
    """
    key = json.dumps([Path(recipe.text_encoder).name, texts])
    file = Path(recipe.output_dir) / f"texts-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not file.exists():
        vectors = embed_texts(recipe.text_encoder, texts)
        with atomic_write(file) as temporary:
            save_file({"texts": vectors.half()}, temporary)
    return F.normalize(load_file(file)["texts"].float(), dim=-1)


def _batches(start: int, stop: int, size: int) -> Iterator[slice]:
    for i in range(start, stop, size):
        yield slice(i, min(i + size, stop))


@torch.inference_mode()
def _compute_features(recipe: TeacherRecipe, images: np.ndarray, out: np.ndarray, rows: range) -> None:
    classifier = load_classifier(recipe.classifier)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = classifier.image_size
    for batch in tqdm(list(_batches(rows.start, rows.stop, 32)), desc="classifier"):
        pixels = torch.tensor(images[batch]).float() / 127.5 - 1
        pixels = F.interpolate(pixels, (size, size), mode="bicubic").clamp(-1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            features = classifier.trunk(pixels.contiguous(memory_format=torch.channels_last))
        out[batch] = features.float().contiguous().half().numpy()


def classifier_class_names(path: str | Path) -> list[str]:
    """First names of the classes of a tab-separated list with the columns index, wnid, name."""
    lines = Path(path).read_text().splitlines()[1:]
    return [line.split("\t")[2].split(",")[0] for line in lines]


def _describe(recipe: TeacherRecipe) -> str:
    """What the cache depends on; another recipe makes another cache."""
    key = [recipe.packs, recipe.classifier, recipe.classifier_names, recipe.text_encoder, recipe.cache_size]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def _write_images_and_texts(recipe: TeacherRecipe, folder: Path) -> None:
    packs = [read_pack(p, "train", ("label", "label_name", "captions")) for p in recipe.packs]
    count, size = sum(map(len, packs)), recipe.cache_size
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(count, 3, size, size)
    )
    sources: list[dict] = []
    texts: dict[str, list[list[str]]] = {}
    tensors: dict[str, Tensor] = {}
    start = 0
    for path, rows in zip(recipe.packs, packs, strict=True):
        name = Path(path).name
        with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter's lock
            squares = pool.map(lambda row: read_square(row["bytes"], size), rows)
            for i, square in enumerate(tqdm(squares, total=len(rows), desc=name)):
                images[start + i] = square
        ids: list[int] = []
        names: list[str] = []
        if rows[0]["label_name"] is not None:
            classes = {row["label"]: row["label_name"] for row in rows}
            ids = sorted(classes)  # a pack may lack some of its classes
            names = [classes[i] for i in ids]
            texts[name] = [[PROMPT.format(n)] for n in names]
            place = {label: i for i, label in enumerate(ids)}
            labels = torch.tensor([place[row["label"]] for row in rows])
        else:
            per_image = min(len(row["captions"]) for row in rows)
            texts[name] = [row["captions"][:per_image] for row in rows]
            labels = torch.arange(len(rows))
        sources.append(
            {"name": name, "start": start, "stop": start + len(rows), "class_ids": ids, "class_names": names}
        )
        tensors[f"{name}.labels"] = labels
        start += len(rows)
    prompts = [PROMPT.format(n) for n in classifier_class_names(recipe.classifier_names)]
    flat = [text for group in texts.values() for several in group for text in several]
    vectors = text_vectors(recipe, [*flat, *prompts])
    for name, group in texts.items():
        own, vectors = vectors.split([len(group) * len(group[0]), len(vectors) - len(group) * len(group[0])])
        tensors[f"{name}.texts"] = own.view(len(group), len(group[0]), -1).contiguous()
    tensors["classifier_texts"] = vectors.contiguous()
    images.flush()
    save_file(tensors, folder / "texts.safetensors")
    (folder / "sources.json").write_text(json.dumps(sources))


def build_cache(
    recipe: TeacherRecipe, rank: int = 0, world_size: int = 1, barrier: Callable[[], None] = lambda: None
) -> TeacherCache:
    """The cache of a recipe, `OUTPUT/cache-HASH`, computed by all processes together if it is not there yet.

    Args:
        barrier: called where every process must wait for the others.
    """
    folder = Path(recipe.output_dir) / f"cache-{_describe(recipe)}"
    images_done, features_done = folder / "sources.json", folder / f"features-done-{rank}-of-{world_size}"
    all_done = folder / "done"
    if not all_done.exists():
        if rank == 0 and not images_done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write_images_and_texts(recipe, folder)
        barrier()
        if recipe.live_targets:
            return _open(folder)
        images = np.load(folder / "images.npy", mmap_mode="r")
        if rank == 0 and not (folder / "features.npy").exists():
            classifier = load_classifier(recipe.classifier)
            side = classifier.image_size // 32
            shape = (len(images), classifier.channels, side, side)
            np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float16, shape=shape)
        barrier()
        if not features_done.exists():
            features = np.load(folder / "features.npy", mmap_mode="r+")
            share = -(-len(images) // world_size)
            _compute_features(
                recipe, images, features, range(rank * share, min((rank + 1) * share, len(images)))
            )
            features.flush()
            features_done.touch()
        barrier()
        all_done.touch()
    return _open(folder)


def _open(folder: Path) -> TeacherCache:
    tensors, features = load_file(folder / "texts.safetensors"), folder / "features.npy"
    sources = [
        Source(**s, texts=tensors[f"{s['name']}.texts"], labels=tensors[f"{s['name']}.labels"])
        for s in json.loads((folder / "sources.json").read_text())
    ]
    return TeacherCache(
        np.load(folder / "images.npy", mmap_mode="r"),
        np.load(features, mmap_mode="r") if features.exists() else None,
        sources,
        tensors["classifier_texts"],
    )
