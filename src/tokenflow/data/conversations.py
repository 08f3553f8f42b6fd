"""Conversations about images to learn from: LLaVA's JSON and JSONL files, parquet files, hub names.

A row has `conversations`, a list of `{"from": "human" | "gpt" | "system", "value": text}` or of
`{"role": "user" | "assistant" | "system", "content": text}`, and `image` or `images`: encoded, or names of
files in an image folder. Each `<image>` in a text stands for a picture. What is wrong with a row is told when
the row is read, so that whoever reads can skip it, count it and name it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from tokenflow.data.sources import Source, encoded_image, open_rows
from tokenflow.errors import UserError

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LAYOUTS = (("from", "value"), ("role", "content"))  # of a turn
_LINES, _DOCUMENT = ".jsonl", ".json"


class ConversationError(UserError):
    """A row that is no conversation, or one that does not fit its pictures. The message is one line."""


@dataclass(frozen=True)
class Message:
    """What one side says: `images` pictures, then `text`. The role is "system", "user" or "assistant"."""

    role: str
    text: str
    images: int = 0


class Conversations:
    """The rows of one source, read when they are asked for.

    Args:
        source: a .json or .jsonl file or a pattern of such files, or what `open_rows` opens.
        image_folder: where file names of images start; by default the folder of the source.

    Raises:
        UserError: no such source, one without conversations, or one whose turns are of neither layout.
    """

    def __init__(self, source: Source, image_folder: str | Path | None = None):
        self.source = source
        files = _json_files(source)
        rows = _from_json(files) if files else open_rows(source)
        if "conversations" not in rows.features:
            raise UserError(f"{source} has no column 'conversations'; it has {', '.join(rows.features)}")
        kind = rows.features["conversations"]
        if not _holds_turns(kind):
            raise UserError(
                f'{source}: conversations must be lists of {{"from", "value"}} or {{"role", "content"}}, '
                f"all texts, not {kind}"
            )
        pictured = [name for name in ("image", "images") if name in rows.features]
        self._pictures = _undecoded(rows.select_columns(pictured[:1]), pictured[0]) if pictured else None
        self._texts = rows.select_columns([name for name in ("conversations", "id") if name in rows.features])
        place = Path(files[0] if files else source.path_or_name).expanduser()
        self.image_folder = Path(image_folder or (place if place.is_dir() else place.parent)).expanduser()

    def __len__(self) -> int:
        return len(self._texts)

    def name(self, row: int) -> str:
        """What to call a row in messages."""
        identity = self._texts[row].get("id")
        return f"row {row} of {self.source}" + (f" (id {identity})" if identity not in (None, "") else "")

    def images(self, row: int) -> list[Any]:
        """The encoded pictures of a row, as `read_image` takes them: bytes or paths.

        Raises:
            ImageError: a remote file cannot be fetched.
        """
        if self._pictures is None:
            return []
        (value,) = self._pictures[row].values()
        values = value if isinstance(value, list) else [value]
        return [self._located(encoded_image(v, self.name(row))) for v in values if v not in (None, "")]

    def messages(self, row: int, pictures: int) -> list[Message]:
        """What is said in a row that has so many pictures.

        Raises:
            ConversationError: it is no conversation, or its `<image>` marks do not fit its pictures.
        """
        try:
            return clean_messages(self._texts[row]["conversations"], pictures)
        except ConversationError as error:
            raise ConversationError(f"{self.name(row)} {error}") from error

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Characters and `<image>` marks of every row, int64 `[rows]` each, without looking at a picture."""
        sizes = np.zeros((2, len(self)), dtype=np.int64)
        for row, turns in enumerate(self._texts["conversations"]):
            said = [_role_and_text(turn)[1] or "" for turn in turns or []]
            marks = sum(text.count(IMAGE_MARK) for text in said)
            sizes[:, row] = sum(map(len, said)) - marks * len(IMAGE_MARK), marks
        return sizes[0], sizes[1]

    def _located(self, image: Any) -> Any:
        return self.image_folder / image if isinstance(image, str) else image


def clean_messages(turns: Any, pictures: int) -> list[Message]:
    """Raw turns as messages, cleaned as in the released code.

    A first answer without a question is dropped. In a row with pictures the marks of a message move to its
    front; where there are more marks than pictures, those of one message count once. In a row without
    pictures `<image>` is text.

    Raises:
        ConversationError: no question and answer, turns out of turn, marks that do not fit the pictures.
    """
    messages = []
    for turn in turns or []:
        said_by, text = _role_and_text(turn)
        role, text = _ROLES.get(said_by or ""), text or ""
        if role is None:
            raise ConversationError(f"has a turn from {said_by!r}, neither human nor gpt")
        marks = text.count(IMAGE_MARK) if pictures else 0
        messages.append(Message(role, text.replace(IMAGE_MARK, "").strip() if marks else text, marks))
    asked = [m for m in messages if m.role != "system"]
    if asked and asked[0].role == "assistant":
        messages.remove(asked.pop(0))
    if len(asked) < 2 or len(messages) - len(asked) > (messages[0].role == "system"):
        raise ConversationError("has no question and answer")
    if any(m.role != ("user", "assistant")[i % 2] for i, m in enumerate(asked)):
        raise ConversationError("has two turns of the same side one after the other")
    if sum(m.images for m in messages) != pictures:
        messages = [Message(m.role, m.text, min(m.images, 1)) for m in messages]
    marks = sum(m.images for m in messages)
    if marks != pictures:
        raise ConversationError(f"has {marks} {IMAGE_MARK} marks but {pictures} pictures")
    return messages


def _role_and_text(turn: dict[str, Any] | None) -> tuple[Any, Any]:
    turn = turn or {}  # of a missing turn, and of one of neither layout, there is nothing
    for role, text in _LAYOUTS:
        if turn.get(role) is not None:
            return turn[role], turn.get(text)
    return None, None


def _holds_turns(kind: Any) -> bool:
    """Whether a column's type is a list of turns."""
    turn = getattr(kind, "feature", None)
    if not isinstance(turn, dict):
        return False
    texts = {key for key, value in turn.items() if "string" in getattr(value, "dtype", "")}
    return any(texts.issuperset(layout) for layout in _LAYOUTS)


def _json_files(source: Source) -> list[str]:
    text = str(Path(source.path_or_name).expanduser())
    if not text.endswith((_LINES, _DOCUMENT)):
        return []
    files = [text] if Path(text).is_file() else sorted(glob(text))
    if not files:
        raise UserError(f"cannot open {source}: no such file")
    return files


def _from_json(files: list[str]) -> Any:
    """The rows as an Arrow file in the cache of `datasets`, whose own JSON reader wants equal rows."""
    import datasets

    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Value("string")),
            "conversations": datasets.List(turn),
        }
    )
    stamps = [(file, Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
    progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        # The stamps are part of what the cache knows a data set by: a changed file is read again.
        return datasets.Dataset.from_generator(_json_rows, features=features, gen_kwargs={"files": stamps})
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(f"cannot read {', '.join(files)}: {error.__cause__ or error}") from error
    finally:
        if progress:
            datasets.utils.logging.enable_progress_bar()


def _json_rows(files: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    empty = True
    for file, *_ in files:
        for row in _json_objects(file):
            empty = False
            row = row if isinstance(row, dict) else {}
            images = row.get("images") or row.get("image") or []
            turns = row.get("conversations")
            turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
            said = [dict(zip(_LAYOUTS[0], _role_and_text(turn), strict=True)) for turn in turns]
            if any(isinstance(text, list | dict) for turn in said for text in turn.values()):
                said = []  # parts of a message, whose text nobody should learn as it is written
            yield {
                "id": None if row.get("id") is None else str(row["id"]),
                "images": [str(image) for image in (images if isinstance(images, list) else [images])],
                "conversations": [
                    {key: None if text is None else str(text) for key, text in turn.items()} for turn in said
                ],
            }
    if empty:  # of which `datasets` would say that an instruction has no data
        raise UserError(f"there is no conversation in {', '.join(file for file, *_ in files)}")


def _json_objects(file: str) -> Iterator[Any]:
    with open(file, encoding="utf-8") as lines:
        try:
            if file.endswith(_LINES):
                number = 0
                for number, line in enumerate(lines, 1):  # noqa: B007 (told below)
                    if line.strip():
                        yield json.loads(line)
            else:
                rows = json.load(lines)
                if not isinstance(rows, list):
                    raise UserError(f"{file} holds no list of conversations")
                yield from rows
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            where = f"line {number}" if file.endswith(_LINES) else "it"
            raise UserError(f"cannot read {file}: {where} is no JSON ({error})") from error


def _undecoded(rows: Any, column: str) -> Any:
    import datasets

    kind = rows.features[column]
    image = datasets.Image(decode=False)
    if isinstance(kind, datasets.Image):
        return rows.cast_column(column, image)
    if isinstance(getattr(kind, "feature", None), datasets.Image):
        return rows.cast_column(column, datasets.List(image))
    return rows
