"""Hostile and damaged files, made for real; each must give one line, run no code and take no memory."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenflow.checkpoints.safe_load import CheckpointError, read_checkpoint, read_state_dict
from tokenflow.errors import UserError

WEIGHTS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}


def refusal(path) -> str:
    """The message of the one-line error that reading `path` must give, at less than 64 MB of new memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"memory grew by {grown >> 10} MB"
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 400 + len(str(path))
    return message


def rewrite(source: Path, target: Path, change) -> Path:
    """Copy a zip member by member: `change(name, data)` gives the new data, or (data, compression)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data = change(member.filename, old.read(member))
            data, compression = data if isinstance(data, tuple) else (data, zipfile.ZIP_STORED)
            new.writestr(member.filename, data, compression)
    return target


@pytest.fixture
def good(tmp_path) -> Path:
    torch.save({"model": dict(WEIGHTS)}, tmp_path / "good.pt")
    return tmp_path / "good.pt"


class Storage:
    """Pickles as a reference to the first storage of the archive, claiming `numel` floats."""

    def __init__(self, numel: int):
        self.numel = numel


class Call:
    """Pickles as `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class TorchPickler(pickle._Pickler):  # type: ignore[name-defined]
    def persistent_id(self, obj):
        return ("storage", torch.FloatStorage, "0", "cpu", obj.numel) if isinstance(obj, Storage) else None


def forged(tmp_path, content, protocol: int = 2) -> Path:
    """An archive of one 16-byte storage whose pickle is `content`."""
    buffer = io.BytesIO()
    TorchPickler(buffer, protocol).dump(content)
    torch.save({"x": torch.ones(4)}, tmp_path / "base.pt")
    swap = lambda name, data: buffer.getvalue() if name.endswith("/data.pkl") else data  # noqa: E731
    return rewrite(tmp_path / "base.pt", tmp_path / "forged.pt", swap)


def tensor(storage_numel: int, size: tuple, stride: tuple) -> Call:
    hooks: collections.OrderedDict = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, Storage(storage_numel), 0, size, stride, False, hooks)


# ------------------------------------------------------------------------------------------------- good files
def test_training_checkpoint_with_its_arguments(tmp_path):
    content = {
        "ema": {"a.weight": torch.nn.Parameter(WEIGHTS["a.weight"])},
        "model": WEIGHTS,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.95)}]},
        "args": argparse.Namespace(lr=1e-4, dtype=torch.float16, size=torch.Size([2, 3]), name=None),
        "steps": 7,
    }
    torch.save(content, tmp_path / "last.pt")
    read = read_checkpoint(tmp_path / "last.pt")
    assert read["args"] == content["args"]
    assert read["steps"] == 7
    assert read["optimizer"]["param_groups"] == [{"betas": (0.9, 0.95)}]
    assert torch.equal(read["model"]["b"], WEIGHTS["b"])
    assert argparse.Namespace not in torch.serialization.get_safe_globals()

    weights, wrapper = read_state_dict(tmp_path / "last.pt")
    assert (wrapper, list(weights)) == ("ema", ["a.weight"])
    weights, wrapper = read_state_dict(tmp_path / "last.pt", wrapper="model")
    assert (wrapper, list(weights)) == ("model", ["a.weight", "b"])


def test_bare_state_dict_and_shared_storage(tmp_path):
    base = torch.arange(10.0)
    torch.save({"left": base[:5], "right": base[5:], "columns": base.view(2, 5).T}, tmp_path / "bare.bin")
    weights, wrapper = read_state_dict(tmp_path / "bare.bin")
    assert wrapper is None
    assert torch.equal(weights["right"], base[5:])
    assert torch.equal(weights["columns"], base.view(2, 5).T)


def test_safetensors_whatever_the_suffix(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    os.rename(tmp_path / "model.safetensors", tmp_path / "model.bin")
    weights, wrapper = read_state_dict(tmp_path / "model.bin")
    assert wrapper is None
    assert all(torch.equal(weights[key], WEIGHTS[key]) for key in WEIGHTS)


def test_reading_leaves_the_weights_on_disk(tmp_path):
    torch.save({"model": {"big": torch.zeros(64 << 20)}}, tmp_path / "big.pt")  # 256 MB
    code = (
        "import resource, sys, torch\n"
        "from tokenflow.checkpoints.safe_load import read_state_dict\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak(); weights, _ = read_state_dict(sys.argv[1])\n"
        "print(peak() - before, weights['big'].numel())"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "big.pt"], capture_output=True, text=True, check=True
    )
    grown, numel = map(int, done.stdout.split())
    assert numel == 64 << 20
    assert grown < 64


def test_files_are_only_read(good):
    content = good.read_bytes()
    weights, _ = read_state_dict(good)
    weights["a.weight"].zero_()
    assert good.read_bytes() == content


# ------------------------------------------------------------------------------------------- not a checkpoint
def test_missing_folder_empty_fifo_and_other_files(tmp_path, good):
    assert "No such file" in refusal(tmp_path / "nothing.pt")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refusal(tmp_path / "empty.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    assert "not a regular file" in refusal(tmp_path / "pipe.pt")
    (tmp_path / "photo.pt").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    assert "is not a checkpoint" in refusal(tmp_path / "photo.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "git lfs pull" in refusal(tmp_path / "lfs.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not one that torch.save wrote" in refusal(tmp_path / "other.pt")


def test_no_dict_of_weights(tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert "holds a Tensor, not a dict of weights" in refusal(tmp_path / "tensor.pt")
    torch.save({"steps": 3, "loss": 0.5}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="is not a dict of tensors: 'steps', 'loss' are not"):
        read_state_dict(tmp_path / "numbers.pt")
    torch.save({"model": WEIGHTS}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no weights under 'ema'; it has 'model'"):
        read_state_dict(tmp_path / "model.pt", wrapper="ema")
    torch.save({"model": {}}, tmp_path / "hollow.pt")
    with pytest.raises(CheckpointError, match="it is empty"):
        read_state_dict(tmp_path / "hollow.pt")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_truncated_archive(tmp_path, share):
    torch.save({"model": {"w": torch.randn(1000)}}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
    refusal(tmp_path / "cut.pt")


def test_flipped_bytes_never_give_anything_but_our_error(good):
    data = bytearray(good.read_bytes())
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(4, len(data), (150,), generator=generator).tolist():
        broken = bytearray(data)
        broken[position] ^= 0xFF
        good.write_bytes(broken)
        try:
            read_checkpoint(good)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 (most flips fall into weights and are read)


# -------------------------------------------------------------------------------------------- code in pickles
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_with_code_is_not_run(tmp_path, protocol):
    trace = tmp_path / "trace"
    forged_file = forged(
        tmp_path, {"model": WEIGHTS["b"].tolist(), "x": Call(os.system, f"touch {trace}")}, protocol
    )
    assert ("'posix.system'" if protocol == 2 else "STACK_GLOBAL") in refusal(forged_file)
    assert not trace.exists()


def test_code_hidden_behind_builtins_and_torch_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    for hostile in (
        Call(eval, f"open({str(trace)!r}, 'w')"),
        Call(torch.load, str(trace)),
        Call(getattr, 1, "real"),
    ):
        assert "refers to" in refusal(forged(tmp_path, {"x": hostile}))
    assert not trace.exists()


def test_legacy_pickle_with_code_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "legacy.pt").write_bytes(pickle.dumps(Call(os.system, f"touch {trace}"), 2))
    assert "bare pickle" in refusal(tmp_path / "legacy.pt")
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "bare pickle" in refusal(tmp_path / "old.pt")
    assert not trace.exists()


def test_torchscript_archive(tmp_path, good):
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr("good/constants.pkl", b"\x80\x02).")
    assert "TorchScript" in refusal(good)


# ------------------------------------------------------------------------------------------------------ bombs
def test_allocations_that_torch_itself_would_allow(tmp_path):
    for bomb in (
        Call(bytearray, 10**11),
        Call(torch.FloatTensor, 10**11),
        Call(torch.UntypedStorage, 10**11),
    ):
        assert "refers to" in refusal(forged(tmp_path, {"x": bomb}))


@pytest.mark.parametrize(
    "bomb",
    [
        tensor(4, (10**11,), (1,)),
        tensor(4, (10**12,), (0,)),
        tensor(10**12, (10**12,), (1,)),
        tensor(4, (10**6, 10**6), (0, 1)),
        tensor(-4, (4,), (1,)),
    ],
    ids=["larger than its storage", "stride 0", "storage larger than the file", "both", "negative"],
)
def test_tensors_larger_than_their_data(tmp_path, bomb):
    refusal(forged(tmp_path, {"model": {"w": bomb}}))


def test_compressed_members(tmp_path, good):
    bomb = lambda name, data: (bytes(256 << 20), zipfile.ZIP_DEFLATED) if "data/0" in name else data  # noqa: E731
    path = rewrite(good, tmp_path / "bomb.pt", bomb)
    assert path.stat().st_size < 1 << 20
    message = refusal(path)
    assert "is compressed" in message
    assert "268,435,456" in message


def test_compressed_pickle(tmp_path, good):
    bomb = lambda name, data: (data + bytes(256 << 20), zipfile.ZIP_DEFLATED) if "pkl" in name else data  # noqa: E731
    assert "is compressed" in refusal(rewrite(good, tmp_path / "bomb.pt", bomb))


def test_directory_that_claims_more_than_the_file_has(tmp_path, good):
    data = bytearray(good.read_bytes())
    entry = data.rindex(b"good/data/0") - 46
    assert data[entry : entry + 4] == b"PK\x01\x02"
    struct.pack_into("<II", data, entry + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    (tmp_path / "lying.pt").write_bytes(data)
    assert "ends outside the file" in refusal(tmp_path / "lying.pt")


def test_directory_with_very_many_entries(tmp_path, good):
    data = bytearray(good.read_bytes())
    entry = data[data.rindex(b"good/version") - 46 : data.rindex(b"good/version") + len(b"good/version")]
    directory = data.index(b"PK\x01\x02")
    many = entry * (20_000_000 // len(entry))
    count = len(many) // len(entry)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(many), directory, 0)
    (tmp_path / "many.pt").write_bytes(data[:directory] + many + end)
    assert count > 300_000
    assert "zip directory of" in refusal(tmp_path / "many.pt")


def test_members_that_overlap_or_occur_twice(tmp_path, good):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(good, "a") as archive:
        archive.writestr("good/data.pkl", b"\x80\x02}.")
    assert "occurs twice" in refusal(good)

    data = bytearray((tmp_path / "good.pt").read_bytes())
    torch.save({"a": torch.ones(50_000), "b": torch.ones(50_000)}, tmp_path / "two.pt")
    data = bytearray((tmp_path / "two.pt").read_bytes())
    first, second = (data.rindex(b"two/data/" + digit) - 46 for digit in (b"0", b"1"))
    struct.pack_into("<II", data, first + 20, *[len(data) - 10_000] * 2)
    struct.pack_into("<I", data, second + 42, struct.unpack_from("<I", data, first + 42)[0])
    (tmp_path / "overlap.pt").write_bytes(data)
    assert "more bytes than the file" in refusal(tmp_path / "overlap.pt")


# ------------------------------------------------------------------------------------------------ safetensors
def safetensors_file(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 10**12]}, "truncated or lies"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [8, 0]}, "truncated or lies"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}, "truncated or lies"),
        ({"dtype": "F32", "shape": [10**12], "data_offsets": [0, 16]}, "cannot have 16 bytes"),
        ({"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, "cannot have 16 bytes"),
        ({"dtype": "F16", "shape": [4], "data_offsets": [0, 16]}, "cannot have 16 bytes"),
        ({"dtype": "OBJECT", "shape": [4], "data_offsets": [0, 16]}, "unknown type 'OBJECT'"),
        ({"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}, "damaged"),
        ({"shape": [4]}, "damaged"),
        (3, "damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "damaged"),
    ],
)
def test_lying_safetensors_entries(tmp_path, entry, expected):
    assert expected in refusal(safetensors_file(tmp_path / "x.safetensors", {"w": entry}, bytes(16)))


def test_lying_safetensors_length_and_broken_json(tmp_path):
    entry = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    path = tmp_path / "x.safetensors"
    assert "header of 1,099,511,627,776 bytes" in refusal(
        safetensors_file(path, entry, bytes(16), length=1 << 40)
    )
    assert "truncated or lies" in refusal(safetensors_file(path, entry, bytes(8)))
    assert "damaged" in refusal(safetensors_file(path, b'{"w": [[[', bytes(16)))
    assert "damaged" in refusal(safetensors_file(path, b'{"w":' + b"[" * 100_000, bytes(16)))
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-3])
    assert "truncated" in refusal(path)
