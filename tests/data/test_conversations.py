"""Conversations from JSON, JSONL and parquet, and what is said about broken ones."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tokenflow.data.conversations import ConversationError, Conversations, Message, clean_messages
from tokenflow.data.images import read_image
from tokenflow.data.sources import Source
from tokenflow.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def said(*texts: str, first: str = "human") -> list[dict[str, str]]:
    sides = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": sides[i % 2], "value": text} for i, text in enumerate(texts)]


def encoded(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def llava(tmp_path):
    """Rows as LLaVA's files have them: ids of two kinds, pictures missing, several or none."""
    (tmp_path / "coco").mkdir()
    for colour in ("red", "blue"):
        (tmp_path / "coco" / f"{colour}.png").write_bytes(encoded(colour))
    two = said("<image><image> Which is red?", "The first.")
    return [
        {"id": 7, "image": "coco/red.png", "conversations": TURNS, "model": ""},
        {"id": "b", "image": ["coco/red.png", "coco/blue.png"], "conversations": two},
        {"id": "text", "image": "", "conversations": said("Is <image> a word?", "No.")},
        {"id": "c", "conversations": "none"},
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llavas_files(llava, suffix, tmp_path):
    file = tmp_path / f"mix.{suffix}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in llava)
    file.write_text(lines + "\n" if suffix == "jsonl" else json.dumps(llava), encoding="utf-8")
    data = Conversations(Source(str(file)))
    assert len(data) == 4
    assert [len(data.images(row)) for row in range(4)] == [1, 2, 0, 0]
    assert read_image(data.images(1)[1]).getpixel((0, 0)) == (0, 0, 255)
    assert data.messages(0, 1) == [Message("user", "What?", 1), Message("assistant", "A dog.")]
    assert data.messages(1, 2)[0] == Message("user", "Which is red?", 2)
    assert data.messages(2, 0)[0] == Message("user", "Is <image> a word?")
    with pytest.raises(ConversationError, match=r"row 3 of .*mix.* \(id c\) has no question and answer"):
        data.messages(3, 0)
    characters, marks = data.sizes()
    assert (characters.tolist()[0], marks.tolist()) == (12, [1, 2, 1, 0])
    elsewhere = Conversations(Source(str(file)), tmp_path / "coco")
    assert elsewhere.images(0) == [tmp_path / "coco" / "coco/red.png"]


def test_a_changed_file_is_read_again_and_broken_ones_are_one_line(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps({"conversations": said("What?", "A dog.")}))
    assert len(Conversations(Source(str(file)))) == 1
    file.write_text(f"{file.read_text()}\n" * 2)
    assert len(Conversations(Source(str(file)))) == 2
    file.write_text('{"conversations": []}\n{"conv')
    with pytest.raises(UserError, match=r"cannot read .*some.jsonl: line 2 is no JSON"):
        Conversations(Source(str(file)))
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(UserError, match="holds no list of conversations"):
        Conversations(Source(str(tmp_path / "one.json")))
    (tmp_path / "one.json").write_text("[]")
    with pytest.raises(UserError, match=r"^there is no conversation in .*one.json$"):
        Conversations(Source(str(tmp_path / "one.json")))
    with pytest.raises(UserError, match=r"cannot open .*none\.json .*: no such file"):
        Conversations(Source(str(tmp_path / "none.json")))


def test_parquet_with_one_or_several_pictures(tmp_path):
    one = [{"image": {"bytes": encoded("red"), "path": "red.png"}, "conversations": TURNS, "id": "a"}]
    one.append({"image": None, "conversations": said("Hi?", "Hello."), "id": "b"})
    pq.write_table(pa.Table.from_pylist(one), tmp_path / "one.parquet")
    data = Conversations(Source(str(tmp_path / "one.parquet")))
    assert read_image(data.images(0)[0]).getpixel((0, 0)) == (255, 0, 0)
    assert data.images(1) == []
    assert data.name(1).endswith("(id b)")
    several = [{"images": [{"bytes": encoded(c), "path": None} for c in ("red", "blue")]}]
    several[0]["conversations"] = said("<image><image>What?", "Two.")
    pq.write_table(pa.Table.from_pylist(several), tmp_path / "two.parquet")
    data = Conversations(Source(str(tmp_path / "two.parquet")))
    assert [read_image(image).getpixel((0, 0))[2] for image in data.images(0)] == [0, 255]
    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="has no column 'conversations'; it has image"):
        Conversations(Source(str(tmp_path / "other.parquet")))


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_turns_of_a_role_and_its_content(suffix, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    rows = [{"conversations": [*turns, {"role": "assistant", "content": "A dog."}]}]
    file = tmp_path / f"some.{suffix}"
    if suffix == "json":
        rows.append({"conversations": [{"role": "user", "content": [{"type": "text"}]}, *turns[1:]]})
        file.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    data = Conversations(Source(str(file)))
    expected = [("system", "Be brief."), ("user", "What?"), ("assistant", "A dog.")]
    assert data.messages(0, 0) == [Message(*each) for each in expected]
    assert data.sizes()[0].tolist()[0] == 20
    if suffix == "json":
        with pytest.raises(ConversationError, match=r"row 1 .* has no question and answer"):
            data.messages(1, 0)


@pytest.mark.parametrize(
    "turns", ["What?", ["What?"], [{"said": "What?"}], [{"role": "user", "content": ["a"]}]]
)
def test_a_column_of_no_turns_is_one_line(turns, tmp_path):
    pq.write_table(pa.table({"conversations": [turns]}), tmp_path / "some.parquet")
    with pytest.raises(
        UserError, match=r'lists of {"from", "value"} or {"role", "content"}.*, not .+'
    ) as error:
        Conversations(Source(str(tmp_path / "some.parquet")))
    assert "\n" not in str(error.value)


def test_messages_are_cleaned_as_in_the_released_code():
    assert clean_messages(said("Hello.", "<image>\nWhat?", "A dog.", first="gpt"), 1)[0].text == "What?"
    twice = said("What is <image>?\n<image>", "A dog.")
    assert clean_messages(twice, 1)[0] == Message("user", "What is ?", 1)
    with pytest.raises(ConversationError, match="has 1 <image> marks but 2 pictures"):
        clean_messages(TURNS, 2)
    with pytest.raises(ConversationError, match="has 0 <image> marks but 1 pictures"):
        clean_messages(said("What?", "A dog."), 1)
    with pytest.raises(ConversationError, match="two turns of the same side"):
        clean_messages([*TURNS, {"from": "gpt", "value": "Two."}], 1)
    with pytest.raises(ConversationError, match="from 'robot', neither human nor gpt"):
        clean_messages([{"from": "robot", "value": "Hi"}], 0)
