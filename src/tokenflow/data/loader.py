"""Batches of images for training, and single passes for evaluation.

What is notable:
- a batch depends on the seed and its place in the sequence only, not on workers or timing;
- `state_dict` after a batch, loaded anywhere, continues with exactly the batch that would have come next;
- broken images are skipped, counted and logged by name; a source that is mostly broken is an error.

Tickets (`mixing.Mixture`) are made in the main process and decoded, a chunk at a time, by DataLoader workers,
which give the chunks back in order.
"""

from __future__ import annotations

import logging
import random
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tokenflow.data.crops import center_crop, random_crop, random_flip
from tokenflow.data.images import ImageError, read_image
from tokenflow.data.mixing import Mixture, Ticket
from tokenflow.data.sources import OpenSource, Source, encoded_image, open_source, stream_rows
from tokenflow.errors import UserError

logger = logging.getLogger(__name__)

_CHUNK = 32  # tickets decoded by one call of a worker
_MIN_TRIED = 100  # a source is judged after this many images ...
_MAX_BROKEN_SHARE = 0.8  # ... and given up if more than this share of them is broken


class ImageLoader:
    """Endless iterator over batches of random crops from weighted sources.

        loader = ImageLoader([Source("flickr8k"), Source("photos", weight=2)], image_size=128, batch_size=64)
        for batch in loader:
            batch["pixel_values"]  # uint8 [B, 3, H, W]
            batch["source"]        # int64 [B], index into the sources

    Args:
        sources: at least one `Source`. `Source.weight` is its share of the draws.
        image_size: side of the square crops in pixels.
        batch_size: images per batch and rank.
        seed: fixes order, crops and flips. The same on all ranks.
        augment: ADM random crop and horizontal flip; otherwise the centre crop.
        num_workers: decoding processes; 0 decodes in this one. Changes no result.
        rank, world_size: this process among those that share the data; no image is drawn by two of them.
        columns: further columns to give with each batch, as lists of B values (None where a source has none).

    Raises UserError for sources that cannot be opened, or whose images are mostly broken.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        image_size: int,
        batch_size: int,
        *,
        seed: int = 0,
        augment: bool = True,
        num_workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        columns: Sequence[str] = (),
    ):
        if not sources:
            raise UserError("training needs at least one source of images; none was given")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        self.sources, self.batch_size, self.num_workers = list(sources), batch_size, num_workers
        self.columns = tuple(columns)
        self._identity: dict[str, Any] = {
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "sources": [f"{source}@{source.weight:g}" for source in sources],
        }
        self._opened = [open_source(source) for source in sources]
        self._decoder = _Decoder(self._opened, image_size, seed, augment, self.columns)
        self._state: dict[str, Any] = {
            "mixture": self._mixture().state_dict(),
            "skip": 0,
            "tried": [0] * len(sources),
            "broken": [0] * len(sources),
        }
        self._batches: Iterator[dict[str, Any]] | None = None
        self._logged: set[str] = set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._batches is None:
            self._batches = self._run()
        return next(self._batches)

    @property
    def skipped(self) -> dict[str, int]:
        """How many draws of each source met a broken image so far."""
        return {str(source): count for source, count in zip(self.sources, self._state["broken"], strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch given, as plain values. Each rank has its own."""
        return deepcopy({**self._identity, **self._state})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken. Batch size and workers may differ.

        Raises UserError if it was taken with other sources, weights, seed, rank or number of ranks.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise UserError(f"cannot resume the data order: {name} was {state[name]} and is now {value}")
        self.close()
        self._state = deepcopy({name: state[name] for name in self._state})

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones at the same place."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
            self._batches = None

    def _mixture(self) -> Mixture:
        seed, rank, world_size = (self._identity[name] for name in ("seed", "rank", "world_size"))
        return Mixture(self._opened, seed=seed, rank=rank, world_size=world_size, columns=self.columns)

    def _run(self) -> Iterator[dict[str, Any]]:
        mixture = self._mixture()
        mixture.load_state_dict(self._state["mixture"])
        tickets_to_skip = self._state["skip"]
        for _ in range(tickets_to_skip):
            next(mixture)
        tried, broken = list(self._state["tried"]), list(self._state["broken"])

        starts: deque[dict[str, Any]] = deque()  # state of the mixture at the start of each chunk under way

        def chunks() -> Iterator[list[Ticket]]:
            while True:
                starts.append(mixture.state_dict())
                yield list(islice(mixture, _CHUNK))

        pixels: list[Tensor] = []
        rows: list[_Row] = []
        for chunk in _decoded(self._decoder, chunks(), self.num_workers, ahead=2 * self.batch_size):
            start = starts.popleft()
            for position, row in enumerate(chunk.rows):
                tried[row.source] += 1
                if row.error is None:
                    pixels.append(chunk.pixels[row.place])
                    rows.append(row)
                else:
                    broken[row.source] += 1
                    self._log(row.error)
                _judge(self.sources[row.source], tried[row.source], broken[row.source])
                if len(rows) == self.batch_size:
                    counts = {"tried": list(tried), "broken": list(broken)}
                    self._state = {"mixture": start, "skip": position + 1, **counts}
                    yield self._collate(pixels, rows)
                    pixels, rows = [], []

    def _collate(self, pixels: list[Tensor], rows: list[_Row]) -> dict[str, Any]:
        batch = {
            "pixel_values": torch.stack(pixels),
            "source": torch.tensor([row.source for row in rows], dtype=torch.int64),
        }
        return batch | {name: [row.values.get(name) for row in rows] for name in self.columns}

    def _log(self, error: str) -> None:
        if error not in self._logged:
            self._logged.add(error)
            logger.warning("skipped an image: %s", error)


class EvalImages:
    """One pass over a source in its own order: see `iterate_eval`."""

    def __init__(self, source: Source, image_size: int, *, num_workers: int = 0, limit: int | None = None):
        self.opened = open_source(source)
        self.image_size, self.num_workers, self.limit = image_size, num_workers, limit
        self.skipped: list[str] = []
        """One line for each image that the last pass could not use."""

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        self.skipped = []
        columns = tuple(self.opened.columns)
        decoder = _Decoder([self.opened], self.image_size, seed=0, augment=False, columns=columns)
        used = 0
        for chunk in _decoded(decoder, self._chunks(), self.num_workers, ahead=4 * _CHUNK):
            for row in chunk.rows:
                if row.error is not None:
                    self.skipped.append(row.error)
                    logger.warning("skipped an image: %s", row.error)
                else:
                    yield chunk.pixels[row.place], row.values
                    used += 1
                _judge(self.opened.source, used + len(self.skipped), len(self.skipped))
        if not used:
            raise UserError(f"{self.opened.source} has no usable image ({len(self.skipped)} were broken)")

    def _chunks(self) -> Iterator[list[Ticket]]:
        dataset = self.opened.dataset
        tickets: Iterator[Ticket]
        if self.opened.source.streaming:
            stream = stream_rows(self.opened.source, dataset)
            tickets = (Ticket(row, 0, row, values) for row, values in enumerate(stream))
        else:
            tickets = (Ticket(row, 0, row, None) for row in range(len(dataset)))
        tickets = islice(tickets, self.limit)
        while chunk := list(islice(tickets, _CHUNK)):
            yield chunk


def iterate_eval(
    source: Source, image_size: int, *, num_workers: int = 0, limit: int | None = None
) -> EvalImages:
    """One deterministic pass for evaluation: centre crops in the order of the source.

        images = iterate_eval(Source("flickr8k", split="val"), 128)
        for pixel_values, row in images:  # uint8 [3, H, W]; a dict of all other columns
            ...
        images.skipped  # what could not be read, a line each

    `limit` uses the first rows only. Raises UserError if the source cannot be opened, has no usable image, or
    is mostly broken.
    """
    return EvalImages(source, image_size, num_workers=num_workers, limit=limit)


class _Row(NamedTuple):
    """The fate of one ticket: either its place among the chunk's pixels or an error."""

    source: int
    place: int
    values: dict[str, Any]
    error: str | None


class _Chunk(NamedTuple):
    pixels: Tensor  # uint8 [n, 3, H, W]: the images that could be read
    rows: list[_Row]  # one for each ticket, in order


class _Decoder:
    """The data set that DataLoader workers hold: tickets in, a chunk of decoded crops out."""

    def __init__(
        self, opened: list[OpenSource], image_size: int, seed: int, augment: bool, columns: tuple[str, ...]
    ):
        self._sources = [source.source for source in opened]
        self._image_columns = [source.image_column for source in opened]
        # Rows of streams come with their tickets, so workers need the random-access data sets only.
        self._datasets: list[Any] = [
            None
            if source.source.streaming
            else source.dataset.select_columns(
                [source.image_column, *(name for name in source.columns if name in columns)]
            )
            for source in opened
        ]
        self._image_size, self._seed, self._augment = image_size, seed, augment

    def __getitems__(self, tickets: list[Ticket]) -> _Chunk:
        pixels = torch.empty((len(tickets), 3, self._image_size, self._image_size), dtype=torch.uint8)
        rows: list[_Row] = []
        good = 0
        for ticket, values in zip(tickets, self._look_up(tickets), strict=True):
            column = self._image_columns[ticket.source]
            try:
                crop = self._crop(ticket, values[column])
            except ImageError as error:
                rows.append(_Row(ticket.source, -1, {}, str(error)))
                continue
            pixels[good] = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
            rest = {name: value for name, value in values.items() if name != column}
            rows.append(_Row(ticket.source, good, rest, None))
            good += 1
        return _Chunk(pixels[:good], rows)

    def _look_up(self, tickets: list[Ticket]) -> list[dict[str, Any]]:
        """The rows of the tickets; one read per data set, since single rows cost several times more."""
        values = [ticket.values or {} for ticket in tickets]
        for source, dataset in enumerate(self._datasets):
            mine = [place for place, ticket in enumerate(tickets) if ticket.source == source]
            if dataset is None or not mine:
                continue
            table = dataset[[tickets[place].row for place in mine]]
            for number, place in enumerate(mine):
                values[place] = {name: column[number] for name, column in table.items()}
        return values

    def _crop(self, ticket: Ticket, value: Any) -> Image.Image:
        name = f"row {ticket.row} of {self._sources[ticket.source]}"
        path = value.get("path") if isinstance(value, dict) else None
        if path:
            name = f"{path}, {name}"
        image = read_image(encoded_image(value, name), name=name)
        rng = random.Random((self._seed << 64) + ticket.draw)
        try:
            if self._augment:
                return random_flip(random_crop(image, self._image_size, rng), rng)
            return center_crop(image, self._image_size)
        except ImageError as error:
            raise ImageError(f"cannot crop image {name}: {error}") from error


def _decoded(
    decoder: _Decoder, chunks: Iterable[list[Ticket]], num_workers: int, ahead: int
) -> Iterator[_Chunk]:
    """Decode chunks of tickets in order, `ahead` images or more in advance if there are workers."""
    per_worker = max(2, -(-ahead // (_CHUNK * num_workers))) if num_workers else None
    return iter(
        DataLoader(
            decoder,  # type: ignore[arg-type]
            batch_sampler=chunks,
            num_workers=num_workers,
            prefetch_factor=per_worker,
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # otherwise making the iterator draws from the global generator
        )
    )


def leave_signals_to_the_parent(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: Ctrl-C and a scheduler's SIGTERM do not end this worker.

    They reach the whole process group; the parent, which hears them too, needs batches to end in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _judge(source: Source, tried: int, broken: int) -> None:
    if tried >= _MIN_TRIED and broken > _MAX_BROKEN_SHARE * tried:
        raise UserError(
            f"{broken} of the first {tried} images of {source} are broken or too large; check that source"
        )
