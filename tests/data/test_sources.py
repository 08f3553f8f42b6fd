from __future__ import annotations

import io
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
from PIL import Image

from tokenflow.data.images import ImageError, read_image
from tokenflow.data.sources import Source, default_split, encoded_image, open_source
from tokenflow.errors import UserError

both_ways = pytest.mark.parametrize("streaming", [False, True])


def ids_of(source):
    opened = open_source(source)
    values = [row[opened.image_column] for row in opened.dataset]
    return [np.asarray(read_image(encoded_image(value, "x")))[0, 0, 0] for value in values]


def refused(source, *words):
    with pytest.raises(UserError) as caught:
        open_source(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- the dataclass


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("photos", "photos", 1.0),
        ("photos@2", "photos", 2.0),
        ("a/b@0.5", "a/b", 0.5),
        ("odd@name", "odd@name", 1.0),
        ("odd@name@3", "odd@name", 3.0),
    ],
)
def test_short_form(text, path, weight):
    source = Source.parse(text, split="val")
    assert (source.path_or_name, source.weight, source.split) == (path, weight, "val")


@pytest.mark.parametrize(
    "fields", [{"weight": 0.0}, {"weight": -1.0}, {"weight": float("nan")}, {"only": "x"}]
)
def test_bad_fields(fields):
    with pytest.raises(UserError, match="photos"):
        Source("photos", **fields)


def test_empty_name():
    with pytest.raises(UserError, match="empty"):
        Source("")


# --- kinds of sources


@both_ways
def test_parquet_file(packs, tmp_path, streaming):
    path = packs.parquet(tmp_path / "some.parquet", range(5))
    assert ids_of(Source(path, streaming=streaming)) == [0, 1, 2, 3, 4]


def test_labels_and_columns(packs, tmp_path):
    opened = open_source(Source(packs.parquet(tmp_path / "a.parquet", range(3))))
    assert opened.image_column == "image"
    assert opened.columns == ["label", "caption"]
    assert opened.label_names() == ["ant", "bee", "cat"]
    assert opened.label_names("caption") is None


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "val.parquet"),
        ("train-00000-of-00001.parquet", "val-00000-of-00001.parquet"),
        ("data/train-0.parquet", "data/val-0.parquet"),
        ("train/0.parquet", "val/0.parquet"),
    ],
)
def test_parquet_folder_reads_only_the_split(packs, tmp_path, names):
    packs.parquet(tmp_path / names[0], [1, 2])
    packs.parquet(tmp_path / names[1], [3])
    assert ids_of(Source(str(tmp_path))) == [1, 2]
    assert ids_of(Source(str(tmp_path), split="val")) == [3]
    refused(Source(str(tmp_path), split="test"), "no split 'test'", "train, val")


def test_parquet_folder_without_splits_is_train(packs, tmp_path):
    packs.parquet(tmp_path / "0.parquet", [1])
    packs.parquet(tmp_path / "1.parquet", [2])
    assert ids_of(Source(str(tmp_path))) == [1, 2]
    refused(Source(str(tmp_path), split="val"), "no splits", "'train'")


@both_ways
def test_tar_shards(packs, tmp_path, streaming):
    packs.tar(tmp_path / "s-0.tar", [0, 1])
    packs.tar(tmp_path / "s-1.tar", [2])
    assert ids_of(Source(str(tmp_path), streaming=streaming)) == [0, 1, 2]
    assert ids_of(Source(str(tmp_path / "s-?.tar"), streaming=streaming)) == [0, 1, 2]
    assert ids_of(Source(str(tmp_path / "s-1.tar"), streaming=streaming)) == [2]
    assert open_source(Source(str(tmp_path), streaming=streaming)).image_column == "png"


@both_ways
def test_image_folder_with_classes(packs, tmp_path, streaming):
    packs.folder(tmp_path / "ant", [0, 1])
    packs.folder(tmp_path / "bee", [2])
    source = Source(str(tmp_path), streaming=streaming)
    assert ids_of(source) == [0, 1, 2]
    assert [row["label"] for row in open_source(source).dataset] == [0, 0, 1]
    assert open_source(source).label_names() == ["ant", "bee"]


def test_image_folder_with_splits(packs, tmp_path):
    packs.folder(tmp_path / "train", [0, 1])
    packs.folder(tmp_path / "val", [2])
    assert ids_of(Source(str(tmp_path), split="val")) == [2]
    refused(Source(str(tmp_path), split="dev"), "no split 'dev'", "train, val")


@pytest.mark.parametrize(
    ("folders", "split"),
    [((), "train"), (("train", "val"), "val"), (("test",), "test"), (("train", "test"), "val")],
)
def test_the_default_split(packs, tmp_path, folders, split):
    for name in folders:
        (tmp_path / name).mkdir()
    assert default_split(str(tmp_path)) == split
    for name in folders:
        packs.parquet(tmp_path / f"{name}.parquet", [0])
    assert default_split(str(tmp_path)) == split
    assert default_split("someone/photos") == "val"


def test_image_names_are_not_taken_for_splits(packs, tmp_path):
    packs.folder(tmp_path, [0, 1], name="test_{i}.png")
    packs.folder(tmp_path, [2], name="train_{i}.png")
    assert sorted(ids_of(Source(str(tmp_path)))) == [0, 1, 2]


def test_broken_images_do_not_stop_the_opening(packs, tmp_path):
    opened = open_source(Source(packs.folder(tmp_path, range(4), broken=[0, 1])))
    assert len(opened.dataset) == 4


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_parquet_of_other_tools(packs, tmp_path, kind):
    """Without the metadata of `datasets` the image is a plain binary or struct column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [packs.picture(i) for i in range(3)]
    column = images if kind == "binary" else [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"jpg": column, "text": ["a", "b", "c"]}), tmp_path / "x.parquet")
    assert ids_of(Source(str(tmp_path / "x.parquet"))) == [0, 1, 2]


@both_ways
@pytest.mark.parametrize(
    ("only", "ids"), [("label=bee", [1, 4]), ("label=1", [1, 4]), ("caption=picture 3", [3])]
)
def test_only_some_rows(packs, tmp_path, only, ids, streaming):
    path = packs.parquet(tmp_path / "a.parquet", range(6))
    assert ids_of(Source(path, only=only, streaming=streaming)) == ids


def test_pil_images_in_memory_are_read(packs):
    image = Image.open(io.BytesIO(packs.picture(7)))
    assert np.asarray(read_image(encoded_image(image, "x")))[0, 0, 0] == 7


# --- what must be refused


@pytest.mark.parametrize(
    "name", ["./nothing", "/no/such/folder", "no/such/deep/folder", "missing.parquet", "a b"]
)
def test_no_such_path(name):
    refused(Source(name), name, "no such file or folder")


def test_no_file_matches(tmp_path):
    refused(Source(f"{tmp_path}/*.tar"), "no file matches")


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n")
    refused(Source(str(tmp_path / "x.csv")), ".csv", ".parquet")


def test_empty_folder(tmp_path):
    refused(Source(str(tmp_path)), str(tmp_path))


@both_ways
def test_damaged_parquet(packs, tmp_path, streaming):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 this is no parquet file")
    refused(Source(str(path), streaming=streaming), str(path))


def test_damaged_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    refused(Source(str(tmp_path / "x.tar")), "x.tar")


def test_columns_are_named_in_errors(packs, tmp_path):
    path = packs.parquet(tmp_path / "a.parquet", range(2))
    refused(Source(path, image_column="photo"), "no column 'photo'", "image, label, caption")
    refused(Source(path, only="kind=x"), "no column 'kind'", "image, label, caption")
    refused(Source(path, only="label=dog"), "no row where label=dog")


def test_image_column_must_be_clear(tmp_path):
    two = datasets.Features({"a": datasets.Image(decode=False), "b": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"a": [None], "b": [None]}, features=two).to_parquet(tmp_path / "two.parquet")
    refused(Source(str(tmp_path / "two.parquet")), "several image columns", "a, b")
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "none.parquet")
    refused(Source(str(tmp_path / "none.parquet")), "no image column", "text")


@pytest.fixture
def answering_hub(monkeypatch):
    monkeypatch.setattr("tokenflow.hub.silence", lambda: None)


def test_hub_failure_is_one_line(monkeypatch, answering_hub):
    def offline(path, **arguments):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    refused(Source("someone/photos"), "someone/photos", "no such path here", "Couldn't reach the hub")


def test_a_silent_hub_is_not_asked_again_and_again(monkeypatch):
    monkeypatch.setattr("tokenflow.hub.silence", lambda: "no network")
    refused(Source("nowhere"), "cannot open nowhere (train): there is no such path here", "no network")
    assert not datasets.config.HF_HUB_OFFLINE


def test_hub_arguments(monkeypatch, answering_hub, packs, tmp_path):
    seen = {}
    local = datasets.load_dataset(
        "parquet", data_files=packs.parquet(tmp_path / "a.parquet", [0]), split="train"
    )

    def fake(**arguments):
        seen.update(arguments)
        return local

    monkeypatch.setattr(datasets, "load_dataset", fake)
    open_source(Source("someone/photos", split="validation", config="small"))
    assert seen == {"path": "someone/photos", "name": "small", "split": "validation", "streaming": False}


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_row_without_image(value):
    with pytest.raises(ImageError, match="row 5: the row has none"):
        encoded_image(value, "row 5")


def test_remote_image(monkeypatch):
    import fsspec

    monkeypatch.setattr(fsspec, "open", lambda url, mode: nullcontext(io.BytesIO(b"remote bytes")))
    assert encoded_image({"bytes": None, "path": "https://host/a.png"}, "x") == b"remote bytes"

    def lost(url, mode):
        raise RuntimeError("connection lost")

    monkeypatch.setattr(fsspec, "open", lost)
    with pytest.raises(ImageError, match="connection lost"):
        encoded_image("https://host/a.png", "x")
