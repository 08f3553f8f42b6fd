from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.data.mixing import Mixture
from tokenflow.data.sources import Source, open_source
from tokenflow.errors import UserError


@pytest.fixture(scope="module")
def opened(packs, tmp_path_factory):
    """Sources of 7 and 5 rows by random access, and of 11 rows in 3 shards as a stream."""
    root = tmp_path_factory.mktemp("mixing")
    for shard, ids in enumerate([range(4), range(4, 8), range(8, 11)]):
        packs.tar(root / "tars" / f"{shard}.tar", ids)
    sources = {
        "seven": Source(packs.parquet(root / "a.parquet", range(7))),
        "five": Source(packs.parquet(root / "b.parquet", range(5)), weight=3),
        "stream": Source(str(root / "tars"), streaming=True),
        "one shard": Source(packs.parquet(root / "c.parquet", range(10)), streaming=True),
    }
    return {name: open_source(source) for name, source in sources.items()}


def mixture(opened, *names, seed=0, **options):
    return Mixture([opened[name] for name in names], seed=seed, **options)


def names_of(tickets):
    """What each ticket stands for: source, and the file name for streams or the row."""
    names = []
    for ticket in tickets:
        name = ticket.row
        if ticket.values is not None:
            image = ticket.values.get("png") or ticket.values["image"]
            name = image["path"]
        names.append((ticket.source, name))
    return names


def test_every_row_once_per_epoch_in_a_new_order(opened):
    rows = [ticket.row for ticket in islice(mixture(opened, "seven"), 21)]
    epochs = [rows[:7], rows[7:14], rows[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_decides(opened):
    def order(seed):
        return names_of(islice(mixture(opened, "seven", "five", "stream", seed=seed), 30))

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_weights_are_shares_of_the_draws(opened):
    counts = Counter(ticket.source for ticket in islice(mixture(opened, "seven", "five"), 4000))
    assert 0.72 < counts[1] / 4000 < 0.78


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_sequence(opened, world_size):
    alone = list(islice(mixture(opened, "seven", "five"), 30 * world_size))
    for rank in range(world_size):
        shared = islice(mixture(opened, "seven", "five", rank=rank, world_size=world_size), 30)
        assert list(shared) == alone[rank::world_size]


@pytest.mark.parametrize(("name", "rows"), [("stream", 11), ("one shard", 10)])
@pytest.mark.parametrize("buffer", [3, 1000])
def test_a_stream_gives_every_row_once_per_epoch(opened, name, rows, buffer):
    names = names_of(islice(mixture(opened, name, buffer=buffer), 3 * rows))
    epochs = [names[:rows], names[rows : 2 * rows], names[2 * rows :]]
    assert all(len(set(epoch)) == rows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("name", "rows", "world_size"), [("stream", 11, 2), ("stream", 11, 4), ("one shard", 10, 3)]
)
def test_ranks_split_a_stream(opened, name, rows, world_size):
    """By shards where there are enough, else row by row; together an epoch, without overlap."""
    per_rank = []
    for rank in range(world_size):
        one = mixture(opened, name, rank=rank, world_size=world_size, buffer=4)
        seen = []
        while True:
            (new,) = names_of([next(one)])
            if one.state_dict()["cursors"][0]["epoch"] > 0:
                break
            seen.append(new)
        per_rank.append(seen)
    union = [name for seen in per_rank for name in seen]
    assert len(union) == len(set(union)) == rows


@settings(max_examples=25, deadline=None)
@given(
    before=st.integers(0, 60),
    world_size=st.integers(1, 3),
    buffer=st.sampled_from([2, 5, 100]),
    data=st.data(),
)
def test_resume_is_exact_anywhere(opened, before, world_size, buffer, data):
    options = {
        "rank": data.draw(st.integers(0, world_size - 1)),
        "world_size": world_size,
        "buffer": buffer,
        "columns": ("caption", "txt"),
    }
    names = ["seven", "stream", "five", "one shard"]
    first = mixture(opened, *names, **options)
    list(islice(first, before))
    state = json.loads(json.dumps(first.state_dict()))
    second = mixture(opened, *names, **options)
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    assert list(islice(second, 15)) == list(islice(first, 15))


def test_streams_keep_only_wanted_columns(opened):
    (ticket,) = islice(mixture(opened, "one shard", columns=("label", "not there")), 1)
    assert set(ticket.values) == {"image", "label"}


def test_a_rank_that_gets_no_rows_of_a_stream_is_an_error(opened):
    with pytest.raises(UserError, match="no rows"):
        next(mixture(opened, "one shard", rank=11, world_size=12))


def test_empty_sources_are_errors(packs, tmp_path):
    path = packs.parquet(tmp_path / "a.parquet", range(3))
    with pytest.raises(UserError, match="no rows"):
        next(Mixture([open_source(Source(path, streaming=True, only="label=x"))], seed=0))


def test_a_tar_that_breaks_off_is_an_error(packs, tmp_path):
    path = packs.tar(tmp_path / "a.tar", range(40))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(UserError, match=r"cannot read on in .*a\.tar"):
        list(islice(Mixture([open_source(Source(path, streaming=True))], seed=0), 100))
