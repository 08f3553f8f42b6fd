"""The order in which images are drawn from weighted sources: endless, shuffled, sharded, exactly resumable.

There is one global sequence of draws. Draw t takes the next image of a source that depends on the seed and t
alone, and rank r of W processes owns the draws with t % W == r. So the order does not depend on the number of
workers or on how fast anyone is, and the whole state is a few counters.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from tokenflow.data.sources import OpenSource, stream_rows
from tokenflow.errors import UserError

_BLOCK = 1024  # source choices are drawn in blocks of this many
_MAX_SHARD_GROUPS = 1024  # a stream of more shards is cut into this many groups of neighbours
# Tags keep the random streams of the purposes apart.
_CHOICE, _ROWS, _SHARDS, _BUFFER = range(4)


class Ticket(NamedTuple):
    """A claim on one image, not read yet."""

    draw: int
    """Position in the global sequence of draws; seeds the augmentation."""
    source: int
    """Which source."""
    row: int
    """Row of a random-access data set; position in the shard of a stream."""
    values: dict[str, Any] | None
    """The row itself, if it comes from a stream; a random-access row is looked up later, in a worker."""


class Mixture:
    """Endless iterator over the tickets of one rank.

    Args:
        sources: opened sources; `source.weight` is each one's share of the draws.
        columns: columns to keep in the rows of streams, beside the image.
        buffer: a stream is shuffled within runs of this many rows (and by the order of its shards).
    """

    def __init__(
        self,
        sources: list[OpenSource],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        columns: tuple[str, ...] = (),
        buffer: int = 1000,
    ):
        self.seed, self.rank, self.world_size = seed, rank, world_size
        weights = np.array([opened.source.weight for opened in sources])
        self._shares = weights / weights.sum()
        self._cursors: list[_RowCursor | _StreamCursor] = []
        for index, opened in enumerate(sources):
            key = (seed, index)
            if opened.source.streaming:
                self._cursors.append(_StreamCursor(opened, key, rank, world_size, columns, buffer))
            else:
                self._cursors.append(_RowCursor(opened, key))
        self._draw = 0
        self._choices: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __iter__(self) -> Iterator[Ticket]:
        return self

    def __next__(self) -> Ticket:
        while True:
            draw = self._draw
            self._draw += 1
            source = self._source_of(draw)
            cursor = self._cursors[source]
            ours = draw % self.world_size == self.rank
            if isinstance(cursor, _RowCursor):
                row = cursor.next_row()  # also for draws of other ranks: all ranks walk the same permutation
                if ours:
                    return Ticket(draw, source, row, None)
            elif ours:
                return Ticket(draw, source, *cursor.next_row())

    def state_dict(self) -> dict[str, Any]:
        """Counters of plain values (ints, strings, None, dicts, lists); do not modify."""
        return {"draw": self._draw, "cursors": [cursor.state_dict() for cursor in self._cursors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draw = state["draw"]
        for cursor, cursor_state in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(cursor_state)

    def _source_of(self, draw: int) -> int:
        block, position = divmod(draw, _BLOCK)
        if self._choices[0] != block:
            rng = np.random.default_rng([self.seed, _CHOICE, block])
            self._choices = (block, rng.choice(len(self._shares), size=_BLOCK, p=self._shares))
        return int(self._choices[1][position])


class _RowCursor:
    """Rows of a random-access data set: every row once per epoch, in an order that (seed, epoch) fixes."""

    def __init__(self, opened: OpenSource, key: tuple[int, int]):
        self._rows = len(opened.dataset)
        if self._rows == 0:
            raise UserError(f"{opened.source} has no rows")
        self._key = key
        self._epoch = self._position = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def next_row(self) -> int:
        if self._position == self._rows:
            self._epoch += 1
            self._position = 0
        if self._order[0] != self._epoch:
            rng = np.random.default_rng([*self._key, _ROWS, self._epoch])
            self._order = (self._epoch, rng.permutation(self._rows))
        self._position += 1
        return int(self._order[1][self._position - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]


class _StreamCursor:
    """Rows of a stream, over and over: shards in a random order, rows shuffled within runs of `buffer`.

    The shuffle buffer of `datasets` loses its content on resume. Here a run of rows is read whole and
    shuffled by (seed, epoch, shard, run), so its start and the number of rows used suffice to read it again.
    With several ranks each reads its own shards, or, if there are too few, every world_size-th row.
    """

    def __init__(
        self,
        opened: OpenSource,
        key: tuple[int, int],
        rank: int,
        world_size: int,
        columns: tuple[str, ...],
        buffer: int,
    ):
        kept = [opened.image_column, *(name for name in opened.columns if name in columns)]
        self._dataset: Any = opened.dataset.select_columns(kept)
        self._source, self._key, self._buffer = opened.source, key, buffer
        self._rank, self._world_size = rank, world_size
        self._groups = min(self._dataset.num_shards, _MAX_SHARD_GROUPS)
        self._by_shard = self._groups >= world_size
        self._next_run: dict[str, Any] = {"epoch": 0, "shard": 0, "run": 0, "row": 0, "stream": None}
        self._run = self._next_run  # where the rows at hand came from
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._used = 0
        self._shard: tuple[Any, Iterator[dict[str, Any]]] | None = None
        self._epoch_is_empty = True

    def next_row(self) -> tuple[int, dict[str, Any]]:
        while self._used == len(self._rows):
            self._read_run()
        self._used += 1
        return self._rows[self._used - 1]

    def state_dict(self) -> dict[str, Any]:
        return {**self._run, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next_run = {name: value for name, value in state.items() if name != "used"}
        self._shard = None
        self._epoch_is_empty = False  # not known; an empty source shows in the next epoch
        self._read_run()
        self._used = state["used"]

    def _read_run(self) -> None:
        """Read the next run into memory. A shard's last run is empty, and the next shard follows it."""
        self._run = run = self._next_run
        epoch, shard = run["epoch"], run["shard"]
        shards = np.random.default_rng([*self._key, _SHARDS, epoch]).permutation(self._groups)
        if self._by_shard:
            shards = shards[self._rank :: self._world_size]
        if self._shard is None:
            dataset = self._dataset.shard(self._groups, int(shards[shard]))
            if run["stream"] is not None:
                dataset.load_state_dict(run["stream"])
            self._shard = (dataset, stream_rows(self._source, dataset))
        dataset, stream = self._shard
        values = list(islice(stream, self._buffer))
        rows = list(enumerate(values, start=run["row"]))
        if not self._by_shard:
            rows = [(row, value) for row, value in rows if row % self._world_size == self._rank]
        rng = np.random.default_rng([*self._key, _BUFFER, epoch, shard, run["run"]])
        self._rows = [rows[i] for i in rng.permutation(len(rows))]
        self._used = 0
        self._epoch_is_empty = self._epoch_is_empty and not rows
        if values:
            position = {
                "run": run["run"] + 1,
                "row": run["row"] + len(values),
                "stream": dataset.state_dict(),
            }
            self._next_run = {**run, **position}
            return
        self._shard = None
        shard += 1
        if shard == len(shards):
            if self._epoch_is_empty:
                raise UserError(f"{self._source} has no rows")
            epoch, shard, self._epoch_is_empty = epoch + 1, 0, True
        self._next_run = {"epoch": epoch, "shard": shard, "run": 0, "row": 0, "stream": None}
