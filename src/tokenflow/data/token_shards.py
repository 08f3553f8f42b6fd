"""Token shards: parquet files with the tokens and captions of many images, made once and read often.

A row is one view of one image: `codes` (list of uint16, or of int32 where the codebook needs it: scales in
order, row-major), `captions` (list of strings, perhaps empty), `label` (int64 or null), `label_name` (string
or null) and `row` (the image's place in its data set). Each file says in its schema's metadata which
tokenizer made it, so that tokens of two tokenizers are never mixed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tokenflow.data.sources import OpenSource, Source, local_files, open_source
from tokenflow.errors import UserError
from tokenflow.files import atomic_write

FORMAT = "tokenflow-token-shard-1"
_KEY = b"tokenflow"
_CAPTION_COLUMNS = ("captions", "caption", "text", "txt")


@dataclass(frozen=True)
class ShardInfo:
    """Where a shard comes from.

    Attributes:
        model: the name or path that the tokenizer was loaded by.
        fingerprint: `tokenizer_fingerprint` of that model.
        codebook_size, scales, image_size: of that model.
        made: what else fixes the content: source, its images, rows, crops, flips, seed, templates.
        skipped: one line for each image that could not be read.
    """

    model: str
    fingerprint: str
    codebook_size: int
    scales: list[int]
    image_size: int
    made: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return sum(side * side for side in self.scales)

    def check_tokenizer(self, fingerprint: str, model: str) -> None:
        """Raise UserError unless these tokens are of the tokenizer called `model` with this fingerprint."""
        if self.fingerprint != fingerprint:
            raise UserError(
                f"these token shards were made by tokenizer {self.model!r} (fingerprint "
                f"{self.fingerprint[:12]}), not by {model!r} (fingerprint {fingerprint[:12]}); "
                f"tokenize again with --model {model}"
            )


def write_shard(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], info: ShardInfo) -> None:
    """Write the shard `path`, whole or not at all; equal arguments give equal bytes.

    Args:
        rows: dicts with `codes` (L ints), `captions`, `label`, `label_name` and `row`.
    """
    codes = pa.uint16() if info.codebook_size <= 2**16 else pa.int32()
    schema = pa.schema(
        [
            ("codes", pa.list_(codes)),
            ("captions", pa.list_(pa.string())),
            ("label", pa.int64()),
            ("label_name", pa.string()),
            ("row", pa.int64()),
        ],
        metadata={_KEY: json.dumps({"format": FORMAT, **asdict(info)}).encode()},
    )
    columns = {name: [row[name] for row in rows] for name in schema.names}
    table = pa.table(columns, schema=schema)
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_info(path: str | os.PathLike[str]) -> ShardInfo:
    """What `write_shard` was told.

    Raises:
        UserError: missing, damaged, or not a token shard of this version.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        stated = json.loads(metadata.get(_KEY, b"{}"))
    except FileNotFoundError as error:
        raise UserError(f"cannot read token shard {path}: no such file") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read token shard {path}: it is damaged; delete it and tokenize again"
        ) from error
    if stated.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not a token shard of this version; make some with `tokenflow tokenize`")
    return ShardInfo(**stated)


def holds_tokens(source: Source) -> bool:
    """Whether the source, by its first file, is token shards (else it is images)."""
    files = local_files(source)
    if not files or not files[0].endswith(".parquet"):
        return False
    try:
        return _KEY in (pq.read_schema(files[0]).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def open_tokens(source: Source) -> tuple[OpenSource, ShardInfo]:
    """Open token shards for random access: a `datasets` data set of their rows, and what made them.

    Raises:
        UserError: no such files, no token shards, shards of several tokenizers or of several runs in one
            source, some of a folder missing.
    """
    files = local_files(source)
    if not files:
        raise UserError(f"{source} is not on this machine; token shards are read from local files")
    infos = {file: read_info(file) for file in files}
    first_file, info = next(iter(infos.items()))
    for file, other in infos.items():
        if other.fingerprint != info.fingerprint:
            raise UserError(
                f"{source} mixes tokenizers: {first_file} has fingerprint {info.fingerprint[:12]}, "
                f"{file} has {other.fingerprint[:12]}; tokenize again into an empty folder"
            )
    _check_complete(source, infos)
    return open_source(replace(source, image_column="codes", streaming=False)), info


def _check_complete(source: Source, infos: Mapping[str, ShardInfo]) -> None:
    """Raise UserError for files of runs of different numbers of shards, or a folder that lacks some."""
    # of each folder and split, the files by the count in their names
    sets: dict[tuple[Path, str], dict[int, list[str]]] = {}
    for file in infos:
        path = Path(file)
        if match := re.fullmatch(r"(.+)-\d+-of-(\d+)", path.stem):
            sets.setdefault((path.parent, match[1]), {}).setdefault(int(match[2]), []).append(file)
    for (folder, split), counts in sets.items():
        if len(counts) > 1:
            names = " and ".join(Path(files[0]).name for files in counts.values())
            raise UserError(
                f"{folder} holds the {split} shards of {len(counts)} runs, such as {names}; "
                "delete those of all but one"
            )
        ((count, files),) = counts.items()
        if len(files) < count and Path(source.path_or_name).expanduser().is_dir():
            data = re.sub(r" \(\w+\)$", "", infos[files[0]].made.get("source", "DATASET"))
            command = (
                f"tokenflow tokenize {shlex.quote(data)} --split {split} -o {shlex.quote(str(folder.parent))}"
            )
            raise UserError(
                f"{folder} lacks {count - len(files)} of {count} {split} shards; make them with `{command}` "
                "and the other options of the first run"
            )


def captions_of(row: Mapping[str, Any], templates: Iterable[str]) -> list[str]:
    """The texts of a row: its captions, else its class name in each of the templates, else none.

    Args:
        row: may have `captions` (list), `caption`, `text` or `txt` (string or list), and `label_name`.
        templates: such as "a photo of {a} {name}", where {a} becomes "a" or "an".
    """
    for column in _CAPTION_COLUMNS:
        value = row.get(column)
        if isinstance(value, bytes):
            value = value.decode("utf-8", errors="replace")
        texts = [value] if isinstance(value, str) else list(value if value is not None else [])
        texts = [" ".join(text.split()) for text in texts if text and text.strip()]
        if texts:
            return texts
    return label_captions(row, templates)


def label_captions(row: Mapping[str, Any], templates: Iterable[str]) -> list[str]:
    """A row's `label_name` in each template, where {a} becomes "a" or "an"."""
    name = row.get("label_name")
    if not name:
        return []
    article = "an" if name[0].lower() in "aeiou" else "a"
    return [template.format(a=article, name=name) for template in templates]


def shard_path(folder: Path, split: str, number: int, count: int) -> Path:
    """`folder/SPLIT-00003-of-00010.parquet`: a name by which the data layer finds the split."""
    return folder / f"{split}-{number:05d}-of-{count:05d}.parquet"
