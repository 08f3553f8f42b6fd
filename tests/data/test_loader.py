from __future__ import annotations

import io
import json
import logging
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow.data.crops import center_crop
from tokenflow.data.images import read_image
from tokenflow.data.loader import ImageLoader, iterate_eval
from tokenflow.data.sources import Source
from tokenflow.errors import UserError


@pytest.fixture(scope="module")
def paths(packs, tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    for shard in range(3):
        packs.tar(
            root / "tars" / f"{shard}.tar", range(100 + 10 * shard, 110 + 10 * shard), broken=[105, 120]
        )
    return {
        "clean": packs.parquet(root / "clean.parquet", range(23)),
        "broken": packs.parquet(root / "broken.parquet", range(50, 67), broken=[51, 60, 61, 66]),
        "tars": str(root / "tars"),
        "rubbish": packs.folder(root / "rubbish", range(5), broken=range(5)),
    }


def mixed(paths):
    return [Source(paths["clean"]), Source(paths["broken"], weight=2), Source(paths["tars"], streaming=True)]


def loader_of(sources, **options):
    options = {"image_size": 16, "batch_size": 8, "num_workers": 0, **options}
    return ImageLoader(sources, options.pop("image_size"), options.pop("batch_size"), **options)


def take(loader, count):
    batches = list(islice(loader, count))
    loader.close()
    return batches


def ids(batches):
    return [int(value) for batch in batches for value in batch["pixel_values"][:, 0, 0, 0]]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        torch.testing.assert_close(a["pixel_values"], b["pixel_values"], rtol=0, atol=0)
        assert a["source"].tolist() == b["source"].tolist()


# --- what a batch is


def test_batch(paths):
    loader = loader_of([Source(paths["clean"])], columns=["label", "caption"])
    (batch,) = take(loader, 1)
    assert batch["pixel_values"].shape == (8, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["source"].dtype == torch.int64
    seen = ids([batch])
    assert batch["label"] == [i % 3 for i in seen]
    assert batch["caption"] == [f"picture {i}" for i in seen]


def test_columns_that_a_source_lacks_are_none(paths):
    batches = take(loader_of(mixed(paths), columns=["label", "txt"]), 4)
    for batch in batches:
        for i, source, label, text in zip(
            ids([batch]), batch["source"], batch["label"], batch["txt"], strict=True
        ):
            assert label == (i % 3 if source < 2 else None)
            assert text == (f"picture {i}" if source == 2 else None)


def test_sources_are_told_apart(paths):
    for batch in take(loader_of(mixed(paths)), 4):
        for i, source in zip(ids([batch]), batch["source"].tolist(), strict=True):
            assert source == (0 if i < 23 else 1 if i < 70 else 2)


def test_augmentation(paths, packs):
    plain = take(loader_of([Source(paths["clean"])], augment=False), 6)
    for i, pixels in zip(ids(plain), (p for batch in plain for p in batch["pixel_values"]), strict=True):
        expected = np.asarray(center_crop(read_image(packs.picture(i)), 16))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    augmented = take(loader_of([Source(paths["clean"])]), 6)
    assert ids(augmented) == ids(plain)
    crops = {}
    for i, pixels in zip(
        ids(augmented), (p for batch in augmented for p in batch["pixel_values"]), strict=True
    ):
        crops.setdefault(i, []).append(pixels)
    twice = [seen[:2] for seen in crops.values() if len(seen) > 1]
    assert len(twice) > 20
    assert not any(torch.equal(first, second) for first, second in twice)


# --- the same whatever the workers


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(paths, num_workers):
    expected = take(loader_of(mixed(paths), seed=5), 7)
    assert_same(take(loader_of(mixed(paths), seed=5, num_workers=num_workers), 7), expected)


def test_seed_changes_the_batches(paths):
    first, second = (take(loader_of(mixed(paths), seed=seed), 2) for seed in (1, 2))
    assert ids(first) != ids(second)


def test_global_random_state_is_neither_used_nor_changed(paths):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = take(loader_of(mixed(paths), num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(take(loader_of(mixed(paths)), 2), first)


def test_batch_size_does_not_change_the_order(paths):
    assert ids(take(loader_of(mixed(paths), batch_size=5), 8)) == ids(take(loader_of(mixed(paths)), 5))


# --- resuming


@pytest.mark.parametrize(
    ("done", "workers_before", "workers_after"),
    [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (9, 0, 0), (1, 2, 0), (5, 1, 0), (1, 0, 1), (5, 0, 2)],
)
def test_resume_gives_the_next_batches(paths, done, workers_before, workers_after):
    """Across epoch boundaries (23, 17 and 30 rows), with broken images and a stream in the mixture."""
    expected = take(loader_of(mixed(paths)), done + 4)
    first = loader_of(mixed(paths), num_workers=workers_before)
    assert_same(list(islice(first, done)), expected[:done])
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = loader_of(mixed(paths), num_workers=workers_after)
    second.load_state_dict(state)
    assert second.skipped == first.skipped
    assert_same(take(second, 4), expected[done:])


def test_a_state_is_a_snapshot(paths):
    loader = loader_of(mixed(paths))
    next(loader)
    state = loader.state_dict()
    expected = take(loader, 3)
    loader.load_state_dict(state)
    assert_same(take(loader, 3), expected)


def test_close_only_stops_the_workers(paths):
    expected = take(loader_of(mixed(paths)), 4)
    loader = loader_of(mixed(paths), num_workers=1)
    assert_same(take(loader, 2) + take(loader, 2), expected)


def test_resume_with_another_batch_size(paths):
    expected = ids(take(loader_of(mixed(paths), batch_size=4), 10))
    first = loader_of(mixed(paths), batch_size=8)
    next(first)
    second = loader_of(mixed(paths), batch_size=4)
    second.load_state_dict(first.state_dict())
    assert ids(take(second, 8)) == expected[8:]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"seed": 9}, "seed"), ({"rank": 0, "world_size": 1}, "rank"), ({"world_size": 3}, "world_size")],
)
def test_resume_of_something_else_is_refused(paths, change, word):
    options = {"rank": 1, "world_size": 2}
    state = loader_of(mixed(paths), **options).state_dict()
    with pytest.raises(UserError, match=f"cannot resume the data order: {word} was"):
        loader_of(mixed(paths), **{**options, **change}).load_state_dict(state)
    with pytest.raises(UserError, match="sources"):
        loader_of(mixed(paths)[:2], **options).load_state_dict(state)


# --- several processes


def test_ranks_do_not_overlap(paths):
    """Two ranks together give each usable row of a source exactly once per epoch."""
    sources = [Source(paths["clean"])]
    halves = [take(loader_of(sources, rank=rank, world_size=2, batch_size=1), 12) for rank in (0, 1)]
    interleaved = [i for pair in zip(ids(halves[0]), ids(halves[1]), strict=True) for i in pair]
    assert sorted(interleaved[:23]) == list(range(23))


def test_wrong_rank(paths):
    with pytest.raises(ValueError, match="rank 2"):
        loader_of([Source(paths["clean"])], rank=2, world_size=2)


# --- broken images


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_images_are_skipped_counted_and_named(paths, caplog, num_workers):
    source = Source(paths["broken"])
    loader = loader_of([source], batch_size=13, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 3)
    good = [i for i in range(50, 67) if i not in (51, 60, 61, 66)]
    seen = ids(batches)
    assert all(sorted(seen[start : start + 13]) == good for start in (0, 13, 26))
    assert 8 <= loader.skipped[str(source)] <= 12
    messages = sorted(
        record.getMessage() for record in caplog.records if record.name == "tokenflow.data.loader"
    )
    assert len(messages) == 4  # once each, not once an epoch
    for message, i in zip(messages, (51, 60, 61, 66), strict=True):
        assert f"{i}.png, row {i - 50} of {source}" in message
        assert "not an image" in message


def test_every_kind_of_unusable_image_is_skipped(packs, tmp_path, caplog):
    """A header bomb, an absurd shape, a cut JPEG and a missing file, beside one good picture."""
    packs.folder(tmp_path, [7])
    (tmp_path / "bomb.png").write_bytes(packs.png_of_claimed_size(50_000, 50_000))
    Image.new("RGB", (60_000, 1)).save(tmp_path / "line.png")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(packs.picture(3))).save(buffer, format="JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:-200])
    loader = loader_of([Source(str(tmp_path))], image_size=64, batch_size=2)
    with caplog.at_level(logging.WARNING):
        assert ids([next(loader)]) == [7, 7]
    text = caplog.text
    assert all(name in text for name in ("bomb.png", "line.png", "cut.jpg"))


@pytest.mark.parametrize("others", [[], ["clean"]])
def test_a_source_of_rubbish_is_an_error(paths, others):
    sources = [Source(paths[name]) for name in (*others, "rubbish")]
    loader = loader_of(sources)
    with pytest.raises(UserError, match=r"100 of the first 100 images of .*rubbish"):
        take(loader, 1000)


def test_no_sources():
    with pytest.raises(UserError, match="at least one source"):
        ImageLoader([], 16, 8)


# --- evaluation


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_pass(paths, packs, num_workers):
    images = iterate_eval(Source(paths["broken"]), 16, num_workers=num_workers)
    good = [i for i in range(50, 67) if i not in (51, 60, 61, 66)]
    for _ in range(2):
        result = list(images)
        assert [row["caption"] for _, row in result] == [f"picture {i}" for i in good]
        assert [row["label"] for _, row in result] == [i % 3 for i in good]
        for i, (pixels, _) in zip(good, result, strict=True):
            expected = np.asarray(center_crop(read_image(packs.picture(i)), 16))
            np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        assert len(images.skipped) == 4
        assert "51.png, row 1 of" in images.skipped[0]


def test_evaluation_of_a_stream(paths):
    images = iterate_eval(Source(paths["tars"], streaming=True), 16)
    rows = [(int(pixels[0, 0, 0]), row["txt"]) for pixels, row in images]
    assert rows == [(i, f"picture {i}") for i in range(100, 130) if i not in (105, 120)]
    assert len(images.skipped) == 2


def test_evaluation_of_a_shard_that_breaks_off(packs, tmp_path):
    path = packs.tar(tmp_path / "a.tar", range(40))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(UserError, match=r"cannot read on in .*a\.tar"):
        list(iterate_eval(Source(path, streaming=True), 16))


def test_evaluation_of_the_first_rows(paths):
    assert len(list(iterate_eval(Source(paths["clean"]), 16, limit=3))) == 3
    assert len(list(iterate_eval(Source(paths["clean"]), 16, limit=1000))) == 23


def test_evaluation_of_rubbish(paths):
    with pytest.raises(UserError, match=r"no usable image \(5 were broken\)"):
        list(iterate_eval(Source(paths["rubbish"]), 16))
