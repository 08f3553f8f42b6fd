"""What a generator learns from: rows of token shards, or of images that are tokenized on the fly.

What is notable:
- the order is `data.mixing`'s one global sequence of draws from weighted sources; all that is random about a
  row (which caption, whether it is dropped, the crop) depends on the seed and the draw's number alone. So
  batches do not depend on workers, and a resumed run sees the batches that would have come next;
- captions: one of several, now and then only its first sentence, now and then none, from which the model
  learns what classifier-free guidance needs.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tokenflow.data.crops import center_crop, random_crop, random_flip
from tokenflow.data.images import ImageError, read_image
from tokenflow.data.mixing import Mixture
from tokenflow.data.sources import OpenSource, Source, encoded_image, open_source
from tokenflow.data.token_shards import ShardInfo, captions_of, holds_tokens, label_captions, open_tokens
from tokenflow.errors import UserError

logger = logging.getLogger(__name__)

_TRIES = 100  # rows tried in place of one with a broken image, before the source is given up


class Draw(NamedTuple):
    """A row to train on, and its place in the sequence of draws."""

    number: int
    source: int
    row: int


class Draws(Sampler[Draw]):
    """The first `count` draws from weighted sources; the same for every process."""

    def __init__(self, sources: list[OpenSource], count: int, seed: int):
        self.sources, self.count, self.seed = sources, count, seed

    def __iter__(self) -> Iterator[Draw]:
        mixture = Mixture(self.sources, seed=self.seed)
        return (Draw(ticket.draw, ticket.source, ticket.row) for ticket in islice(mixture, self.count))

    def __len__(self) -> int:
        return self.count


class GenerationRows(Dataset):
    """Rows of several sources, either all token shards or all images.

    An item is `{"caption", "label"}` (label -1 if there is none) with `"codes"` int64 `[L]`, or, for images,
    `"pixels"` uint8 `[3, H, W]`.

    Args:
        sources: what to read; `weight` is each one's share of the draws.
        image_size: side of the crops, for images.
        train: shuffle captions, drop and shorten them, crop at random. Else first caption, centre crop.
        seed: of all that is random.
        caption_dropout: share of the rows whose caption becomes empty.
        first_sentence: share of the rows whose caption is cut after its first sentence.
        label_templates: captions of rows that have a class name only.
        extra_templates: captions that rows with a class name have beside their own, when training.

    Raises:
        UserError: a source cannot be opened, or some hold tokens and some images.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        image_size: int,
        *,
        train: bool,
        seed: int = 0,
        caption_dropout: float = 0.0,
        first_sentence: float = 0.0,
        label_templates: Sequence[str] = (),
        extra_templates: Sequence[str] = (),
    ):
        if not sources:
            raise UserError("training needs at least one source; give --data.sources")
        kinds = {str(source): holds_tokens(source) for source in sources}
        self.holds_tokens = all(kinds.values())
        if not self.holds_tokens and any(kinds.values()):
            images = next(name for name, tokens in kinds.items() if not tokens)
            raise UserError(f"{images} has images, other sources have tokens; `tokenflow tokenize` it first")
        self.infos: list[ShardInfo] = []
        if self.holds_tokens:
            self.opened, infos = map(list, zip(*map(open_tokens, sources), strict=True))
            self.infos = infos
        else:
            self.opened = [open_source(source) for source in sources]
        self.image_size, self.train, self.seed = image_size, train, seed
        self.caption_dropout, self.first_sentence = caption_dropout, first_sentence
        self.label_templates = tuple(label_templates)
        self.extra_templates = tuple(extra_templates) if train else ()

    def check_tokenizer(self, fingerprint: str, name: str) -> None:
        """Raise UserError unless the tokenizer called `name` made all tokens."""
        for info in self.infos:
            info.check_tokenizer(fingerprint, name)

    def draws(self, count: int) -> Draws:
        return Draws(self.opened, count, self.seed)

    def in_order(self, limit: int | None) -> list[Draw]:
        """The rows of all sources one after the other, at most `limit` of each."""
        pairs = [
            (source, row)
            for source, opened in enumerate(self.opened)
            for row in range(min(len(opened.dataset), limit or len(opened.dataset)))
        ]
        return [Draw(number, *pair) for number, pair in enumerate(pairs)]

    def captions(self, count: int) -> list[str]:
        """The first captions of about `count` rows spread evenly over the sources."""
        found = []
        for opened in self.opened:
            rows: int = len(opened.dataset)
            share = max(1, count // len(self.opened))
            for row in range(0, rows, max(1, rows // share)):
                found += self._captions(opened, opened.dataset[row])[:1]
        return found

    def all_captions(self) -> Iterator[str]:
        """Every caption of every picture, however many views of it there are; reads no images or tokens."""
        columns = {"captions", "caption", "text", "txt", "label", "label_name"}
        columns |= {"row"} if self.holds_tokens else set()
        for opened in self.opened:
            dataset: Any = opened.dataset.select_columns([c for c in opened.columns if c in columns])
            before = None
            for batch in dataset.with_format("arrow").iter(1000):
                for row in batch.to_pylist():
                    place = row.pop("row") if self.holds_tokens else None
                    if place is None or place != before:  # the views of a picture follow each other
                        yield from self._captions(opened, row)
                    before = place

    def __len__(self) -> int:
        return sum(len(opened.dataset) for opened in self.opened)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        rng = random.Random(f"{self.seed} {draw.number}")
        opened = self.opened[draw.source]
        if self.holds_tokens:
            values: dict[str, Any] = opened.dataset[draw.row]
            item: dict[str, Any] = {"codes": np.asarray(values["codes"], dtype=np.int64)}
        else:
            values, pixels = self._picture(opened, draw.row, rng)
            item = {"pixels": pixels}
        label = values.get("label")
        item["label"] = label if isinstance(label, int) else -1
        item["caption"] = self._caption(self._captions(opened, values), rng)
        return item

    def _captions(self, opened: OpenSource, values: dict[str, Any]) -> list[str]:
        names, label = opened.label_names(), values.get("label")
        if names is not None and isinstance(label, int) and label >= 0 and not values.get("label_name"):
            values = {**values, "label_name": names[label]}
        captions = captions_of(values, self.label_templates)
        return list(dict.fromkeys([*captions, *label_captions(values, self.extra_templates)]))

    def _caption(self, captions: list[str], rng: random.Random) -> str:
        if not captions:
            return ""
        if not self.train:
            return captions[0]
        caption = rng.choice(captions)
        if rng.random() < self.caption_dropout:
            return ""
        return first_sentence(caption) if rng.random() < self.first_sentence else caption

    def _picture(self, opened: OpenSource, row: int, rng: random.Random) -> tuple[dict[str, Any], np.ndarray]:
        """A row's values and crop; the next readable row in place of one with a broken image."""
        dataset: Any = opened.dataset
        for attempt in range(min(_TRIES, len(dataset))):
            place = (row + attempt) % len(dataset)
            values, name = dataset[place], f"row {place} of {opened.source}"
            try:
                image = read_image(encoded_image(values[opened.image_column], name), name=name)
                crop = (
                    random_flip(random_crop(image, self.image_size, rng), rng)
                    if self.train
                    else center_crop(image, self.image_size)
                )
            except ImageError as error:
                logger.warning("another image in place of a broken one: %s", error)
                continue
            return values, np.asarray(crop).transpose(2, 0, 1)
        raise UserError(f"rows {row} and the {_TRIES} after it of {opened.source} have no usable image")


def first_sentence(text: str) -> str:
    """`text` up to and with its first full stop, question or exclamation mark that ends a word."""
    found = re.match(r".+?[.!?](?=\s|$)", text, re.S)
    return found[0] if found else text


def stack(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The arrays of a batch of items: "codes" `[B, L]` or "pixels" `[B, 3, H, W]`."""
    name = "codes" if "codes" in items[0] else "pixels"
    return {name: torch.from_numpy(np.stack([item[name] for item in items]))}


class PromptCollator:
    """Items to a batch of the language model: `input_ids`, `attention_mask` and what `stack` gives."""

    def __init__(self, text_tokenizer: Any, max_text_tokens: int, image_open_ids: Sequence[int]):
        self.text_tokenizer, self.max_text_tokens = text_tokenizer, max_text_tokens
        self.image_open_ids = list(image_open_ids)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        from tokenflow.generation.prompt import encode_prompts

        captions = [item["caption"] for item in items]
        ids, mask = encode_prompts(self.text_tokenizer, captions, self.max_text_tokens, self.image_open_ids)
        return {"input_ids": ids, "attention_mask": mask, **stack(items)}


class ClassCollator:
    """Items to a batch of the class-conditional model: `labels` `[B]` and what `stack` gives.

    Raises:
        UserError: a row has no label, or one that the model does not know.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = [item["label"] for item in items]
        for label in labels:
            if not 0 <= label < self.num_classes:
                what = "a row has no label" if label < 0 else f"a row has label {label}"
                raise UserError(f"{what}; this model learns classes 0 to {self.num_classes - 1}")
        return {"labels": torch.tensor(labels), **stack(items)}
