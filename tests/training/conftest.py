"""What the tests of `train understanding` read: a small language model, and conversations about pictures."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from small_model import small_language_model, small_words

COLOURS = ("red", "green", "blue", "gold")


def picture(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (36, 40), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    small_language_model().save_pretrained(folder)
    small_words().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    """Eight conversations: four pictures, one row broken, one of text alone, two about a picture again."""
    rows = [{"image": {"bytes": picture(c), "path": f"{c}.png"}, "answers": [c, "square"]} for c in COLOURS]
    rows.append({"image": {"bytes": b"broken", "path": "broken.png"}, "answers": ["none"]})
    rows.append({"image": None, "answers": ["hello"]})
    rows += [{"image": rows[i]["image"], "answers": ["a shape", COLOURS[i], "yes"]} for i in (0, 1)]
    for number, row in enumerate(rows):
        turns = []
        for question, answer in zip(("What?", "Form?", "Sure?"), row.pop("answers"), strict=False):
            mark = "<image>\n" if row["image"] is not None and not turns else ""
            turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        row |= {"conversations": turns, "id": str(number)}
    file = tmp_path_factory.mktemp("data") / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file
