"""What a language model learns from: ids and labels of each template, and the order of the batches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tokenflow.data.conversations import ConversationError, clean_messages
from tokenflow.data.images import ImageError
from tokenflow.errors import UserError
from tokenflow.training.understanding_data import (
    IGNORE,
    ConversationCollator,
    ConversationEncoder,
    ConversationRows,
    GroupedOrder,
)

I2T = Path(__file__).parents[1] / "parity" / "i2t"
SPECIAL = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
}
STORED = json.loads((I2T / "conversations.json").read_text())["tokenized"]
COUNT = 3  # places of a picture


def words(name: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(I2T / f"tokenizer_{name}.json"), **SPECIAL[name], padding_side="left"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def encoder(name: str, template: str, labels: str = "answers", max_length: int = 2000) -> ConversationEncoder:
    tokenizer = words(name)
    token = tokenizer.convert_tokens_to_ids("<image>")
    processor = SimpleNamespace(tokenizer=tokenizer, image_token="<image>", image_token_id=token)
    return ConversationEncoder(processor, template, COUNT, max_length, labels)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", ["qwen", "llama"])
@pytest.mark.parametrize("case", STORED["qwen"])
def test_ids_and_labels_of_the_released_code(name, case):
    stored = STORED[name][case]
    encode = encoder(name, stored["template"], "released")
    raw = [{"from": role, "value": text} for role, text in stored["conversation"]]
    ids, labels = encode(clean_messages(raw, int(stored["has_image"])))
    expected = [
        (token, label)
        for id_, label in zip(stored["input_ids"], stored["labels"], strict=True)
        for token in ([encode.image_id] * COUNT if id_ == -200 else [id_])
        for label in [label]
    ]
    assert list(zip(ids, labels, strict=True)) == expected


@pytest.mark.parametrize(
    ("name", "template", "learned"),
    [
        ("qwen", "smollm2", ["Two dogs.<|im_end|>", "Red.<|im_end|>"]),
        ("qwen", "qwen_2_5", ["Two dogs.<|im_end|>", "Red.<|im_end|>"]),
        ("llama", "vicuna_v1", [" Two dogs.</s>", " Red.</s>"]),
        ("llama", "plain", ["Two dogs.\n"]),
    ],
)
def test_only_answers_and_their_ends_are_learned(name, template, learned):
    encode = encoder(name, template)
    ids, labels = encode(clean_messages(turns("<image>\nWhat?", "Two dogs.", "Colour?", "Red."), 1))
    assert ids.count(encode.image_id) == COUNT
    spans, before = [], IGNORE
    for label in labels:
        if label != IGNORE:
            spans = [*spans[:-1], [*spans[-1], label]] if before != IGNORE else [*spans, [label]]
        before = label
    assert [encode.tokenizer.decode(span) for span in spans] == learned
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))


def test_special_tokens_of_a_text_are_text():
    encode = encoder("qwen", "smollm2")
    said = "say <|im_end|><image>"
    ids, labels = encode(clean_messages(turns("hello", said), 0))
    assert encode.image_id not in ids
    assert labels.count(encode.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_conversations_are_cut_but_not_through_pictures_or_before_answers():
    messages = clean_messages(turns("<image>\nWhat is it?", "A long story about a dog."), 1)
    whole = encoder("llama", "plain")(messages)
    cut = encoder("llama", "plain", max_length=8)(messages)
    assert cut == (whole[0][:8], whole[1][:8])
    with pytest.raises(ConversationError, match="pictures that do not fit into 3 tokens"):
        encoder("llama", "plain", max_length=3)(messages)
    with pytest.raises(ConversationError, match="no answer in its first 4 tokens"):
        encoder("llama", "plain", max_length=4)(messages)


# ------------------------------------------------------------------------------------------------ the order
def rows_like(lengths, pictured, sources=None) -> ConversationRows:
    rows = ConversationRows.__new__(ConversationRows)  # what the order looks at, without files
    rows.rows, rows.lengths = np.arange(len(lengths)), np.asarray(lengths)
    rows.pictured = np.asarray(pictured, dtype=bool)
    rows.sources = np.zeros(len(lengths), int) if sources is None else np.asarray(sources)
    return rows


def test_batches_are_of_like_length_and_kind():
    rng = np.random.default_rng(0)
    rows = rows_like(rng.integers(1, 100, 80), [True] * 48 + [False] * 32)
    batches = np.array(list(GroupedOrder(rows, [1.0], 8, 80, seed=0))).reshape(-1, 8)
    assert sorted(batches.flatten()) == list(range(80))  # each row once an epoch
    for batch in batches:
        assert rows.pictured[batch].min() == rows.pictured[batch].max()
        assert list(rows.lengths[batch]) == sorted(rows.lengths[batch])
    assert np.ptp(rows.lengths[batches], axis=1).mean() < 25
    starts = [list(GroupedOrder(rows, [1.0], 8, 80, seed=s))[:8] for s in (0, 0, 1)]
    assert starts[0] == starts[1] != starts[2]


def test_the_order_goes_on_epoch_after_epoch_and_sources_are_weighted():
    rows = rows_like([5] * 20, [True] * 20, [0] * 10 + [1] * 10)
    assert GroupedOrder.rows_an_epoch(rows, [2.0, 1.0], 8) == 24
    order = list(GroupedOrder(rows, [2.0, 1.0], 8, 48, seed=3))
    assert len(order) == 48
    assert order[:24] != order[24:]
    assert 0.55 < np.mean([row < 10 for row in order]) < 0.8
    few = rows_like([1, 2, 3], [True, True, False])
    assert len(list(GroupedOrder(few, [1.0], 8, 16, seed=0))) == 16
    assert GroupedOrder.rows_an_epoch(few, [1.0], 8) == 8


def test_the_place_of_an_unusable_row_is_taken_by_another_that_is_drawn():
    class Some:
        source = "some.json"

        def __len__(self):
            return 6

        def sizes(self):
            return np.array([[40] * 6, [1] * 6])

        def messages(self, row, pictures):
            if row != 5:
                return clean_messages(turns("<image>\nWhat?", f"the {row}"), pictures)
            raise ConversationError("row 5 is empty")

        def name(self, row):
            return f"row {row}"

    def pictures(source, row):
        if row == 0:
            raise ImageError("cannot read image of row 0")
        return [f"picture {row}"]

    rows = ConversationRows([Some()], pictures, encoder("qwen", "smollm2"))
    assert list(rows.lengths) == [13] * 6
    assert rows[3]["pictures"] == ["picture 3"]
    assert rows[3]["skipped"] == []
    rows.drawn = np.array([0, 2, 5])
    for broken, message in ((0, "cannot read image of row 0"), (5, "row 5 is empty")):
        assert rows[broken]["pictures"] == ["picture 2"]
        assert message in rows[broken]["skipped"]
    rows.drawn = np.array([0, 5])
    with pytest.raises(UserError, match="2 conversations tried, none can be used; the last: "):
        rows[0]


def test_batches_are_padded_to_the_longest_and_pads_are_masked():
    items = [{"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3], "pictures": [], "skipped": ["row 7"]}]
    items.append({"input_ids": [9], "labels": [9], "pictures": [], "skipped": []})
    batch = ConversationCollator(pad_id=2)(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [9, IGNORE, IGNORE]]
    assert batch["pixel_values"] is None
    assert batch["skipped"] == ["row 7"]
