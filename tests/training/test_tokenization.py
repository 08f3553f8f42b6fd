"""tokenize: what is in the shards, and that neither kill, workers nor Ray change a byte of them."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tokenflow import TokenFlowModel
from tokenflow.data.crops import center_crop
from tokenflow.data.images import read_image
from tokenflow.data.sources import Source
from tokenflow.data.token_shards import holds_tokens, open_tokens, read_info, write_shard
from tokenflow.errors import UserError
from tokenflow.tokenizer.token_file import tokenizer_fingerprint
from tokenflow.training.text_to_image_recipe import TokenizeOptions
from tokenflow.training.tokenization import tokenize

BROKEN = 4


def png(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((44, 40), Image.Resampling.BICUBIC).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """pack/train.parquet: ten pictures, the fifth broken; even ones have captions, odd ones a class name."""
    folder = tmp_path_factory.mktemp("data") / "pack"
    folder.mkdir()
    rows = [{"bytes": b"no picture" if i == BROKEN else png(i), "path": f"{i}.png"} for i in range(10)]
    columns = {
        "image": rows,
        "captions": [[f"one {i}", f"two  {i}"] if i % 2 == 0 else None for i in range(10)],
        "label_name": [None if i % 2 == 0 else "oak" if i == 1 else "pine" for i in range(10)],
        "label": [None if i % 2 == 0 else i for i in range(10)],
    }
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


@pytest.fixture
def options(pack, small_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return TokenizeOptions(
        data=(str(pack),),
        output=tmp_path / "tokens",
        model=str(small_model_folder),
        shard_rows=4,
        batch_size=3,
    )


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def rows_of(options) -> list[dict]:
    return [
        row for file in sorted(options.output.rglob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def test_a_shard_holds_the_codes_captions_and_origin_of_each_image(options, pack, small_model_folder):
    done = tokenize(options)
    model = TokenFlowModel.from_pretrained(small_model_folder).eval()
    rows = rows_of(options)
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert rows[0]["captions"] == ["one 0", "two 0"]
    assert (rows[1]["captions"], rows[1]["label"]) == (["a photo of an oak"], 1)
    assert (rows[3]["captions"], rows[3]["label_name"]) == (["a photo of a pine"], "pine")
    for row in rows[:3]:
        picture = np.asarray(center_crop(read_image(png(row["row"])), 32))
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        assert model.encode(pixels).indices[0].tolist() == row["codes"]
    (folder,) = done.folders
    assert folder == options.output / "pack"
    assert (done.images, done.new, len(done.skipped)) == (9, 9, 1)
    assert f"row {BROKEN} of {pack}" in done.skipped[0]
    opened, info = open_tokens(Source(str(folder)))
    assert len(opened.dataset) == 9
    assert info.fingerprint == tokenizer_fingerprint(model)
    assert (info.scales, info.num_tokens, info.codebook_size) == ([1, 2, 4], 21, 64)
    assert pq.read_schema(folder / "train-00000-of-00003.parquet").field("codes").type == pa.list_(
        pa.uint16()
    )
    assert holds_tokens(Source(str(folder)))
    assert not holds_tokens(Source(str(pack)))


def test_crops_and_flips_are_rows_of_their_own_and_depend_on_the_seed(options, tmp_path):
    first = replace(options, crops=2, flip=True)
    assert tokenize(first).images == 9 * 6
    rows = rows_of(first)
    assert len({tuple(row["codes"]) for row in rows[:6]}) > 3
    assert [row["row"] for row in rows[:7]] == [0] * 6 + [1]
    again, other = (
        replace(first, output=tmp_path / "again"),
        replace(first, output=tmp_path / "other", seed=1),
    )
    tokenize(again)
    tokenize(other)
    assert digests(again.output) == digests(first.output)
    assert [r["codes"] for r in rows_of(other)][::6] == [r["codes"] for r in rows][::6]  # the centre crops
    assert [r["codes"] for r in rows_of(other)] != [r["codes"] for r in rows]


def test_finished_shards_are_kept_and_missing_ones_made_again(options):
    tokenize(options)
    before = digests(options.output)
    files = sorted(options.output.rglob("*.parquet"))
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    (files[1].parent / ".train-00001-of-00003.abc.parquet").write_bytes(b"half")
    done = tokenize(options)
    assert (done.images, done.new, len(done.skipped)) == (9, 3, 1)
    assert digests(options.output) == before
    assert files[0].stat().st_mtime_ns == kept


def test_shards_of_another_tokenizer_or_other_options_are_refused(options, other_model_folder):
    tokenize(options)
    with pytest.raises(UserError, match=r"train-00000.*made by tokenizer .*small.* choose another --output"):
        tokenize(replace(options, model=str(other_model_folder)))
    with pytest.raises(UserError, match="made with crops 0, not 1"):
        tokenize(replace(options, crops=1))
    with pytest.raises(UserError, match="at least one data set"):
        tokenize(replace(options, data=()))
    for option in ({"shard_rows": 0}, {"batch_size": 0}, {"crops": -1}, {"num_workers": -1}):
        with pytest.raises(UserError, match=r"must be at least [01], got"):
            tokenize(replace(options, **option))


def test_sources_with_mixed_tokenizers_are_refused(options, other_model_folder):
    tokenize(options)
    info = read_info(options.output / "pack" / "train-00000-of-00003.parquet")
    with pytest.raises(UserError, match=f"{info.fingerprint[:12]}.* not by 'x' .fingerprint 0123"):
        info.check_tokenizer("0123", "x")
    (options.output / "pack" / "train-00002-of-00003.parquet").unlink()
    tokenize(replace(options, model=str(other_model_folder), output=options.output.parent / "b"))
    os.replace(
        options.output.parent / "b" / "pack" / "train-00002-of-00003.parquet",
        options.output / "pack" / "train-00002-of-00003.parquet",
    )
    with pytest.raises(UserError, match="mixes tokenizers"):
        open_tokens(Source(str(options.output / "pack")))


def test_shards_of_a_run_of_another_count_are_refused(options, pack, other_model_folder, tmp_path):
    tokenize(options)
    before = digests(options.output)
    for change in ({"shard_rows": 5}, {"shard_rows": 5, "model": str(other_model_folder)}):
        with pytest.raises(
            UserError, match=r"none of the 2 of this run, such as train-00000-of-00003.*delete"
        ):
            tokenize(replace(options, **change))
    assert digests(options.output) == before
    other = replace(options, output=tmp_path / "other", shard_rows=5)
    tokenize(other)
    for file in (other.output / "pack").iterdir():
        file.rename(options.output / "pack" / file.name)
    with pytest.raises(UserError, match=r"train shards of 2 runs, such as train-00000-of-00002.*of-00003"):
        open_tokens(Source(str(options.output)))


def test_a_set_that_lacks_shards_is_refused(options, pack):
    tokenize(options)
    folder = options.output / "pack"
    (folder / "train-00001-of-00003.parquet").unlink()
    again = f"lacks 1 of 3 train shards; .*`tokenflow tokenize {pack} --split train -o {options.output}`"
    with pytest.raises(UserError, match=again):
        open_tokens(Source(str(folder)))
    one, _ = open_tokens(Source(str(folder / "train-00000-of-00003.parquet")))  # on purpose
    assert len(one.dataset) == 4


def test_shards_of_changed_images_are_refused(options, pack, tmp_path):
    copy = tmp_path / "copy" / "pack"
    copy.mkdir(parents=True)
    table = pq.read_table(pack / "train.parquet")
    pq.write_table(table, copy / "train.parquet")
    options = replace(options, data=(str(copy),))
    tokenize(options)
    pq.write_table(table.slice(0, 9), copy / "train.parquet")  # the last shard is one image shorter
    with pytest.raises(UserError, match=r"train-00002.* made of other images \(2 rows, .* has now \(1 rows"):
        tokenize(options)
    pq.write_table(table.take([9, *range(1, 10)]), copy / "train.parquet")
    with pytest.raises(UserError, match=r"train-00000.* made of other images"):
        tokenize(options)
    file = options.output / "pack" / "train-00000-of-00003.parquet"
    info = read_info(file)
    older = {key: value for key, value in info.made.items() if key != "content"}
    write_shard(file, pq.read_table(file).to_pylist(), replace(info, made=older))
    assert tokenize(options).new == 0
    assert len(open_tokens(Source(str(options.output)))[0].dataset) == 9


def test_streams_give_a_shard_a_file(options, tmp_path):
    folder = tmp_path / "stream"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for i in range(3):
                for suffix, data in (("png", png(3 * shard + i)), ("txt", f"picture {i}".encode())):
                    member = tarfile.TarInfo(f"{i}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    streamed = replace(options, data=(str(folder),), streaming=True)
    assert tokenize(streamed).images == 6
    assert [row["captions"] for row in rows_of(streamed)] == [[f"picture {i}"] for i in (0, 1, 2)] * 2
    assert tokenize(streamed).new == 0
    os.replace(folder / "train-0.tar", folder / "train-1.tar")
    (folder / "train-0.tar").write_bytes((folder / "train-1.tar").read_bytes())
    with pytest.raises(UserError, match=r"train-00001.* made of other images"):
        tokenize(streamed)


START = "import sys; from tokenflow.cli import main; sys.exit(main())"


@pytest.mark.slow
def test_many_processes_and_a_kill_in_the_middle_change_no_byte(options, pack, small_model_folder, tmp_path):
    tokenize(options)
    output = tmp_path / "parallel"
    command = [sys.executable, "-c", START, "tokenize", str(pack), "-o", str(output), "-m"]
    command += [str(small_model_folder), "--shard-rows", "4", "--batch-size", "3", "--num-workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        not list(output.rglob("train-*.parquet")) and running.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)  # somewhere after the first shard
    running.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "9 views of images" in done.stdout
    assert "row 4 of" in done.stdout
    assert digests(output) == digests(options.output)


@pytest.mark.slow
def test_ray_makes_the_same_shards(options, tmp_path):
    pytest.importorskip("ray")
    tokenize(options)
    on_ray = replace(options, output=tmp_path / "ray", ray=True, num_workers=1)
    done = tokenize(on_ray)
    assert (done.images, done.new) == (9, 9)
    assert digests(on_ray.output) == digests(options.output)
    assert tokenize(on_ray).new == 0
