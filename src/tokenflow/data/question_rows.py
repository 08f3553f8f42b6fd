"""Sets with captions, labels or questions: how they are read, and how what comes of them is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflow.errors import UserError
from tokenflow.files import atomic_write

_COLUMNS = ("captions", "label_name", "questions", "answers")


@dataclass(frozen=True)
class Rows:
    """One split of one set: what the questions need, picture by picture."""

    name: str
    images: list[dict[str, Any]]
    columns: dict[str, list[Any]]
    synonyms: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.images)

    def has(self, column: str) -> bool:
        """Whether it has anything in a column."""
        return any(value is not None for value in self.columns.get(column, ()))


def read_rows(path: str, split: str) -> Rows:
    """Read a split with its images as they are, encoded.

    Names that count as a class besides its own are read from `classes.json` in the folder, if there is one:
    {"classes": [{"names": "tabby, tabby cat"}, ...]}, the first of which is the `label_name`.

    Raises:
        UserError: no such path or split, or a damaged classes.json.
    """
    from tokenflow.data.sources import Source, open_source

    opened = open_source(Source(path, split=split))
    wanted: list[str] = [column for column in _COLUMNS if column in opened.columns]
    images = [encoded(value) for value in opened.dataset[opened.image_column]]
    columns = {column: list(opened.dataset[column]) for column in wanted}
    folder = Path(path).expanduser()
    file = (folder if folder.is_dir() else folder.parent) / "classes.json"
    synonyms = {}
    if file.is_file():
        try:
            lists = [entry["names"].split(", ") for entry in json.loads(file.read_text("utf-8"))["classes"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: not a list of classes with their names") from error
        synonyms = {names[0]: names for names in lists}
    name = folder.name if folder.is_dir() else folder.parent.name
    return Rows(name, images, columns, synonyms)


def encoded(value: Any) -> dict[str, Any]:
    """An undecoded image as a parquet file of its own must hold it: its bytes, and the name of its file."""
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return {"bytes": Path(value["path"]).read_bytes(), "path": Path(value["path"]).name}
    return dict(value)


def all_names(sets: Sequence[Rows]) -> tuple[list[str], list[tuple[int, int]]]:
    """Class names of all pictures of all sets, and which (set, picture) each is."""
    owners = [(of_set, i) for of_set, rows in enumerate(sets) for i in range(len(rows))]
    return [sets[of_set].columns["label_name"][i] for of_set, i in owners], owners


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as parquet; their images open as such in `datasets`, still encoded."""
    import datasets

    text = datasets.Value("string")
    columns = {
        "image": datasets.Image(decode=False),
        "conversations": [{"from": text, "value": text}],
        "questions": [text],
        "answers": [[text]],
        "task": text,
        "source": text,
        "id": text,
    }
    features = datasets.Features({name: columns[name] for name in rows[0]})
    with atomic_write(path) as temporary:
        datasets.Dataset.from_list(list(rows), features=features).to_parquet(temporary)
