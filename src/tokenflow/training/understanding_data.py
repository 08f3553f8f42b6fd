"""What a language model learns about images from: conversations as token ids, labels and pictures.

What is notable:
- the labels are the answers, as the templates mark them; or the released code's, which for ChatML also hold
  role marks and newlines (parity: tests/parity/i2t, section 6);
- batches are of conversations with pictures or without, and of like length. The order depends on the seed
  alone, so a resumed run sees the batches that would have come;
- a row that cannot be used, for its picture or its text, is left out, counted and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import LlavaProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from tokenflow.data.conversations import ConversationError, Conversations, Message
from tokenflow.data.images import ImageError, read_image
from tokenflow.data.sources import Source
from tokenflow.errors import UserError
from tokenflow.understanding.llava import chat_template

IGNORE = -100
_TRIES = 100  # rows tried in place of one that cannot be used, before the data is given up
_MEGA = 50  # batches that are sorted by length together


# -------------------------------------------------------------------------------------- one conversation
class ConversationEncoder:
    """Messages to token ids and labels.

    Args:
        processor: of the model; only its tokenizer and image token are used.
        template: see `chat_template`. "plain" keeps of the first question nothing but its pictures, and the
            first answer alone.
        image_tokens: N, places of one picture.
        max_length: where ids are cut.
        labels: "answers", or "released" for those of the released code.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        template: str,
        image_tokens: int,
        max_length: int,
        labels: str = "answers",
    ):
        self.tokenizer: Any = processor.tokenizer
        self.image_token, self.image_id = processor.image_token, processor.image_token_id
        self.plain, self.template = template == "plain", chat_template(template)
        self.image_tokens, self.max_length = image_tokens, max_length
        self.whole_turns = labels == "released" and "<|im_start|>" in self.template
        specials = {*self.tokenizer.all_special_tokens, self.image_token}
        specials |= {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        self._special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))

    def __call__(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation, of one length; -100 marks what is not learned.

        Raises:
            ConversationError: nothing to learn, or not all pictures, before `max_length`.
        """
        if self.plain:
            question, answer = [m for m in messages if m.role != "system"][:2]
            messages = [Message("user", "", question.images), answer]
        turns = [{"role": m.role, "content": self._content(m)} for m in messages]
        rendered: Any = render_jinja_template(
            [turns], chat_template=self.template, return_assistant_tokens_mask=True
        )
        (text,), (spans,) = rendered
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids, labels = encoded.input_ids, [IGNORE] * len(encoded.input_ids)
        for place, (start, end) in enumerate(encoded.offset_mapping):
            if any(start < last and first < end for first, last in spans):
                labels[place] = ids[place]
        if self.whole_turns:
            labels = self._released_labels(ids, [m.role for m in messages])
        return self._expanded(ids, labels, sum(m.images for m in messages))

    def _content(self, message: Message) -> Any:
        # What would be read as a special token is text here, as it is when the model is asked.
        text = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", message.text)
        return [{"type": "image"}] * message.images + [{"type": "text", "text": text}]

    def _released_labels(self, ids: list[int], roles: list[str]) -> list[int]:
        """Answers with header and newline; of the other turns the role marks and every single newline."""
        start, end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        marks = {start, end, *self.tokenizer("\n", add_special_tokens=False).input_ids}
        roles = roles if roles[0] == "system" else ["system", *roles]
        labels, turn = [], -1
        for token in ids:
            turn += token == start
            labels.append(token if token in marks or roles[turn] == "assistant" else IGNORE)
        return labels

    def _expanded(self, ids: list[int], labels: list[int], pictures: int) -> tuple[list[int], list[int]]:
        """A place for each feature of each picture, cut to `max_length`."""
        if pictures:
            repeats = [self.image_tokens if token == self.image_id else 1 for token in ids]
            ids = [token for token, n in zip(ids, repeats, strict=True) for _ in range(n)]
            labels = [label for label, n in zip(labels, repeats, strict=True) for _ in range(n)]
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if ids.count(self.image_id) != pictures * self.image_tokens:
            raise ConversationError(f"has pictures that do not fit into {self.max_length} tokens")
        if all(label == IGNORE for label in labels[1:]):
            raise ConversationError(f"has no answer in its first {self.max_length} tokens")
        return ids, labels


# ---------------------------------------------------------------------------------------------- all rows
class Pictures(Protocol):
    """What the model is shown of a row: its pictures' pixels, or what a tower made of them before."""

    def __call__(self, source: int, row: int) -> list[Tensor]: ...


class PicturePixels:
    """Pictures as the image processor makes them, `[3, H, W]` float32, read anew each time."""

    def __init__(self, data: Sequence[Conversations], processor: LlavaProcessor):
        self.data, self.processor = data, processor.image_processor

    def __call__(self, source: int, row: int) -> list[Tensor]:
        data = self.data[source]
        opened = [read_image(image, name=picture_name(data, row, image)) for image in data.images(row)]
        return list(self.processor(opened, return_tensors="pt")["pixel_values"]) if opened else []


def picture_name(data: Conversations, row: int, image: Any) -> str:
    """What to call a picture in messages."""
    return f"{image} in {data.name(row)}" if isinstance(image, Path) else f"of {data.name(row)}"


class ConversationRows(Dataset):
    """The conversations of several sources as ids, labels and pictures.

    An item is `{"input_ids", "labels"}` (lists of one length), `"pictures"` (tensors) and `"skipped"`: what
    is wrong with the rows that this one takes the place of.

    Args:
        data: the sources, opened.
        pictures: gives the pictures of a row.
        encoder: gives ids and labels.

    Attributes:
        drawn: the places that will be read, all until told otherwise; others take nobody's place.

    Raises:
        UserError: there is no row.
    """

    def __init__(self, data: Sequence[Conversations], pictures: Pictures, encoder: ConversationEncoder):
        self.data, self.pictures, self.encoder = data, pictures, encoder
        self.sources = np.repeat(np.arange(len(data)), [len(source) for source in data])
        self.rows = np.concatenate([np.arange(len(source)) for source in data])
        characters, images = np.concatenate([source.sizes() for source in data], axis=1)
        # About four characters a token: enough to tell long from short without reading every row.
        self.lengths, self.pictured = characters // 4 + images * encoder.image_tokens, images > 0
        self.drawn = np.arange(len(self.rows))
        if not len(self.rows):
            raise UserError(f"there is no conversation in {', '.join(str(source.source) for source in data)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped: list[str] = []
        lots = np.random.default_rng(int(index)).choice(self.drawn, _TRIES)  # the same in every run
        for place in dict.fromkeys([int(index), *lots.tolist()]):
            source, row = int(self.sources[place]), int(self.rows[place])
            try:
                pictures = self.pictures(source, row)
                ids, labels = self._encoded(source, row, len(pictures))
            except (ConversationError, ImageError) as error:
                skipped.append(str(error))
                continue
            return {"input_ids": ids, "labels": labels, "pictures": pictures, "skipped": skipped}
        raise UserError(f"{len(skipped)} conversations tried, none can be used; the last: {skipped[-1]}")

    def _encoded(self, source: int, row: int, pictures: int) -> tuple[list[int], list[int]]:
        messages = self.data[source].messages(row, pictures)
        try:
            return self.encoder(messages)
        except ConversationError as error:
            raise ConversationError(f"{self.data[source].name(row)} {error}") from error


def open_conversations(
    texts: Sequence[str], split: str, image_folder: str | None
) -> tuple[list[Conversations], list[float]]:
    """Sources "PATH_OR_NAME" or "PATH_OR_NAME@TIMES", and how often each is read in an epoch.

    Raises:
        UserError: none are given, or one cannot be opened.
    """
    sources = [Source.parse(text, split=split) for text in texts]
    return [Conversations(source, image_folder) for source in sources], [s.weight for s in sources]


# ------------------------------------------------------------------------------------------ order and batches
class GroupedOrder(Sampler[int]):
    """`count` rows, epoch after epoch, in batches of like length and kind; equal for every process.

    Args:
        rows: what to order.
        times: how often a row of each source is read in an epoch; a fraction reads so many of its rows.
        batch_size: of one optimizer step. What is left of an epoch after its last whole batch is not read.
        count: rows in all.
    """

    def __init__(
        self, rows: ConversationRows, times: Sequence[float], batch_size: int, count: int, seed: int
    ):
        self.rows, self.times, self.batch_size = rows, np.asarray(times), batch_size
        self.count, self.seed = count, seed

    @staticmethod
    def rows_an_epoch(rows: ConversationRows, times: Sequence[float], batch_size: int) -> int:
        """How many rows an epoch has: whole batches, at least one."""
        total = int(np.asarray(times)[rows.sources].sum())
        return max(1, total // batch_size) * batch_size

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        given, epoch = 0, 0
        while given < self.count:
            for batch in self.epoch(epoch):
                yield from batch[: self.count - given].tolist()
                given += len(batch[: self.count - given])
            epoch += 1

    def epoch(self, number: int) -> list[np.ndarray]:
        """The batches of an epoch, each in the order of its lengths."""
        rng, rows = np.random.default_rng([self.seed, number]), self.rows
        times = self.times[rows.sources]
        order = np.repeat(np.arange(len(rows)), np.floor(times + rng.random(len(rows))).astype(int))
        order = rng.permutation(order)
        batches, rest = [], []
        for kind in (True, False):
            of_kind = order[rows.pictured[order] == kind]
            for start in range(0, len(of_kind), _MEGA * self.batch_size):
                mega = of_kind[start : start + _MEGA * self.batch_size]
                mega = mega[np.argsort(rows.lengths[mega], kind="stable")]
                whole = len(mega) // self.batch_size * self.batch_size
                batches += np.split(mega[:whole], whole // self.batch_size) if whole else []
                rest.append(mega[whole:])
        left = np.concatenate(rest) if rest else order
        left = left[: len(left) // self.batch_size * self.batch_size]
        batches += np.split(left, len(left) // self.batch_size) if len(left) else []
        if not batches:
            batches = [np.resize(order if len(order) else np.arange(len(rows)), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


class ConversationCollator:
    """Items to a batch: `input_ids`, `attention_mask`, `labels` `[B, T]`, padded on the right as long as the
    longest, `pixel_values` of all pictures in order (None without any), and `skipped`."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        length = max(len(item["input_ids"]) for item in items)
        shape = (len(items), length)
        ids, labels = torch.full(shape, self.pad_id), torch.full(shape, IGNORE)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, item in enumerate(items):
            size = len(item["input_ids"])
            ids[row, :size], labels[row, :size] = torch.tensor([item["input_ids"], item["labels"]])
            mask[row, :size] = 1
        pictures = [picture for item in items for picture in item["pictures"]]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "pixel_values": torch.stack(pictures) if pictures else None,
            "skipped": [line for item in items for line in item["skipped"]],
        }
