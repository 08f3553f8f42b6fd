"""Where images come from: folders, parquet files, webdataset tar shards and hub names, through `datasets`.

The image column is left encoded, since one broken image would end the iteration of a decoded column:
`read_image` decodes, and whoever reads decides what to do about a broken one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow.data.images import ImageError
from tokenflow.errors import UserError
from tokenflow.hub import copies_if_silent

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_SPLIT_NAMES = re.compile(r"(train|val|validation|valid|dev|test|testing|eval|evaluation|heldout)(?=[-_.]|$)")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Source:
    """One set of images. Plain values only, so that recipes and the command line can hold it."""

    path_or_name: str
    """A folder of images, of parquet files or of webdataset .tar shards; one such file or a pattern like
    "shards/*.tar"; or a dataset's name on the Hugging Face hub."""
    split: str = "train"
    """Which split of a folder or hub dataset. A folder without splits counts as "train"; a file has none."""
    weight: float = 1.0
    """Share of the draws relative to the other sources (not to the number of images)."""
    image_column: str | None = None
    """The column with the images; found by itself if there is only one."""
    only: str | None = None
    """Use only the rows where a column has a value, written "column=value"."""
    config: str | None = None
    """Configuration of a hub dataset that has several."""
    streaming: bool = False
    """Read in order, through a shuffle buffer, instead of by random access (which needs a local copy)."""

    def __post_init__(self) -> None:
        if not self.path_or_name:
            raise UserError("a source of images needs a path or a name; it is empty")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"source {self.path_or_name}: weight {self.weight} must be a positive number")
        if self.only is not None and "=" not in self.only:
            raise UserError(f'source {self.path_or_name}: only={self.only!r} must look like "column=value"')

    @classmethod
    def parse(cls, text: str, **fields: Any) -> Source:
        """The short form of the command line, "PATH_OR_NAME" or "PATH_OR_NAME@WEIGHT"."""
        path, at, weight = text.rpartition("@")
        if at and re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight):
            return cls(path, weight=float(weight), **fields)
        return cls(text, **fields)

    def __str__(self) -> str:
        return f"{self.path_or_name} ({self.split})"


@dataclass(frozen=True)
class OpenSource:
    """A source after `open_source`: rows with an encoded image each."""

    source: Source
    dataset: Dataset | IterableDataset
    image_column: str

    @property
    def columns(self) -> list[str]:
        """All columns but the image."""
        return [name for name in self.dataset.column_names if name != self.image_column]

    def label_names(self, column: str = "label") -> list[str] | None:
        """Class names of a label column, in the order of its integers, if the data set states them."""
        return getattr(self.dataset.features.get(column), "names", None)


def open_source(source: Source) -> OpenSource:
    """Open a source without decoding anything.

    Returns its `datasets` data set (`Dataset`, or `IterableDataset` if `source.streaming`), filtered by
    `source.only`, and the name of its image column, whose values `encoded_image` makes fit for `read_image`.

    Raises UserError, one line, if there is no such path, split or column, or the files cannot be read.
    """
    import datasets

    dataset = open_rows(source)
    column = _find_image_column(source, dataset.features)
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return OpenSource(source, dataset, column)


def open_rows(source: Source) -> Any:
    """The `datasets` data set of a source, filtered by `source.only`, whatever its columns.

    Raises UserError, one line, as `open_source` does.
    """
    import datasets

    arguments = _load_arguments(source)
    with nullcontext() if "data_files" in arguments else copies_if_silent() as silent:
        try:
            dataset = datasets.load_dataset(**arguments, streaming=source.streaming)
        except Exception as error:  # `datasets` wraps whatever happened below it in exceptions of many kinds
            reason = silent if silent and isinstance(error, ConnectionError) else _root_cause(error)
            if "data_files" not in arguments:
                reason = f"there is no such path here, and as a name on the hub: {reason}"
            raise UserError(f"cannot open {source}: {reason}") from error
    if dataset.features is None:
        raise UserError(
            f"cannot open {source}: its columns are not known before reading; use streaming=False"
        )
    return dataset if source.only is None else _filtered(source, dataset)


def default_split(path_or_name: str) -> str:
    """What to measure on if nobody says: "val", or the only split of a folder ("train" if it has none)."""
    folder = Path(path_or_name).expanduser()
    if not folder.is_dir():
        return "val"
    found: set[str | None] = set(_split_folders(folder))
    for suffix in _BUILDERS:
        if splits := _split_of_files(folder, suffix):
            found = {*splits.values()} - {None}
            break
    return "val" if len(found) > 1 else next(iter(found), None) or "train"


def local_files(source: Source) -> list[str]:
    """The parquet or tar files of a source that is on this machine; none for pictures and hub names.

    Raises UserError if there is no such path or split.
    """
    arguments = _load_arguments(source)
    files = arguments.get("data_files", {}).get("train", [])
    files = [files] if isinstance(files, str) else files
    return [file for file in files if "://" not in file and Path(file).suffix in _BUILDERS]


def split_of(source: Source) -> str:
    """The split that a source is: of a single file by its name (val.parquet), else `source.split`."""
    path = Path(source.path_or_name)
    return (_split_in(path.stem) if path.suffix in _BUILDERS else None) or source.split


def stream_rows(source: Source, dataset: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a streaming data set.

    Raises:
        UserError: a shard breaks off; the message names the source.
    """
    try:
        yield from dataset
    except Exception as error:  # a truncated tar, a damaged parquet page, a lost connection ...
        raise UserError(f"cannot read on in {source}: {_root_cause(error)}") from error


def encoded_image(value: Any, name: str) -> Any:
    """What `read_image` takes (bytes, path or PIL image), from a value of an undecoded image column.

    Raises ImageError, naming the image `name`, if the row has none or a remote file cannot be fetched.
    """
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ImageError(f"cannot read image {name}: the row has none")
    if isinstance(value, str) and "://" in value:
        import fsspec

        try:
            with fsspec.open(value, "rb") as file:
                return file.read()
        except Exception as error:  # each of fsspec's file systems has exceptions of its own
            raise ImageError(f"cannot fetch image {name}: {error}") from error
    return value


def _load_arguments(source: Source) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset`. Files are always named one by one: its own guess of splits would
    take an image called test_1.png for a test split."""
    text = source.path_or_name
    path = Path(text).expanduser()
    if path.is_dir():
        for suffix, builder in _BUILDERS.items():
            if files := _files_of_split(source, path, suffix):
                return _local(builder, files)
        return _local("imagefolder", f"{_image_folder(source, path)}/**")
    if path.is_file() or "://" in text:
        return _local(_builder_of(source, path), text if "://" in text else str(path))
    if re.search(r"[*?\[]", text):
        files = sorted(glob(str(path)))
        if not files:
            raise UserError(f"cannot open {source}: no file matches this pattern")
        return _local(_builder_of(source, Path(files[0])), files)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith(".") or path.suffix in _BUILDERS:
        raise UserError(f"cannot open {source}: no such file or folder")
    return {"path": text, "name": source.config, "split": source.split}


def _local(builder: str, files: str | list[str]) -> dict[str, Any]:
    return {"path": builder, "data_files": {"train": files}, "split": "train"}


def _builder_of(source: Source, path: Path) -> str:
    if path.suffix not in _BUILDERS:
        raise UserError(
            f"cannot open {source}: give a folder, a .parquet or a .tar file, not {path.suffix or path}"
        )
    return _BUILDERS[path.suffix]


def _files_of_split(source: Source, folder: Path, suffix: str) -> list[str]:
    """Files of a split: split.parquet, split-00000-of-00010.parquet, split/*.parquet or data/split-*."""
    splits = _split_of_files(folder, suffix)
    found = {split for split in splits.values() if split}
    if splits and not found:
        _require_train(source)
        return [str(file) for file in splits]
    chosen = [str(file) for file, split in splits.items() if split == source.split]
    if splits and not chosen:
        raise UserError(
            f"{source.path_or_name} has no split {source.split!r}; it has {', '.join(sorted(found))}"
        )
    return chosen


def _image_folder(source: Source, folder: Path) -> Path:
    found = _split_folders(folder)
    if source.split in found:
        return folder / source.split
    if found:
        raise UserError(f"{source.path_or_name} has no split {source.split!r}; it has {', '.join(found)}")
    _require_train(source)
    return folder


def _split_of_files(folder: Path, suffix: str) -> dict[Path, str | None]:
    splits = {file: _split_in(file.stem) for file in sorted(folder.glob(f"*{suffix}"))}
    for file in sorted(folder.glob(f"*/*{suffix}")):
        splits[file] = _split_in(file.stem) or _split_in(file.parent.name)
    return splits


def _split_folders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and _split_in(child.name))


def _split_in(name: str) -> str | None:
    match = _SPLIT_NAMES.match(name)
    return match.group(1) if match else None


def _require_train(source: Source) -> None:
    if source.split != "train":
        raise UserError(f"{source.path_or_name} has no split {source.split!r}: it has no splits, use 'train'")


def _find_image_column(source: Source, features: Any) -> str:
    import datasets

    columns = ", ".join(features)
    if source.image_column is not None:
        if source.image_column not in features:
            raise UserError(f"{source} has no column {source.image_column!r}; it has {columns}")
        return source.image_column
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name in _IMAGE_COLUMNS if name in features]
    if len(found) != 1:
        kind = "several image columns" if found else "no image column"
        raise UserError(f"{source} has {kind}: set image_column to one of {', '.join(found) or columns}")
    return found[0]


def _filtered(source: Source, dataset: Any) -> Any:
    column, _, wanted = (source.only or "").partition("=")
    if column not in dataset.features:
        raise UserError(f"{source} has no column {column!r}; it has {', '.join(dataset.features)}")
    names = getattr(dataset.features[column], "names", None)

    def keep(value: Any) -> bool:
        return str(value) == wanted or (names is not None and value is not None and names[value] == wanted)

    if source.streaming:
        return dataset.filter(keep, input_columns=[column])
    rows = [row for row, value in enumerate(dataset[column]) if keep(value)]
    if not rows:
        raise UserError(f"{source} has no row where {source.only}")
    return dataset.select(rows)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
