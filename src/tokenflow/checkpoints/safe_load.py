"""Reading weight files from elsewhere without trusting them.

A `.pt` file is a pickle in a zip, and a pickle is a program. So, before anything is built from one:
- the zip's directory must describe what torch writes: stored members only (nothing can inflate), each name
  once, all of them inside the file;
- the pickle is read as a list of instructions, without running it, and may refer to nothing but the few names
  that tensors, dicts and training arguments need (torch's own list is wider: `torch.FloatTensor(10**12)`);
- then `torch.load(weights_only=True)` runs, always, with no fallback. Tensors stay on disk, memory-mapped;
- every tensor must lie inside its storage, so that four bytes cannot pose as a terabyte.

A `.safetensors` header is checked against the size of the file before the library maps it.

Whatever is wrong, the error is one `CheckpointError` of one line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickletools
import re
import stat
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tokenflow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE_BYTES = 64 << 30
"""Larger files are refused; the largest released checkpoint with its optimizer states is about 9 GB."""
MAX_DIRECTORY_BYTES = 16 << 20
"""Bound of a zip file's directory; that of a tokenizer has 50 kB."""
MAX_HEADER_BYTES = 64 << 20
"""Bound of the parts that are read into memory: a pickle without its tensors, a safetensors header."""

WRAPPERS = ("ema", "model", "state_dict")
"""Where released and training checkpoints keep the weights, best first."""

_ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|argparse Namespace|torch Size|torch device"
    r"|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch (float64|float32|float16|bfloat16|int64|int32|int16|int8|uint8|bool)"
)
_FOREIGN_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"}
_SAFETENSORS_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


class CheckpointError(UserError):
    """A weight file that is damaged, hostile, or not what it is said to be."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a `.safetensors` or zip-format `.pt` / `.pth` / `.bin` file; the content decides, not the suffix.

    Args:
        path: the file.

    Returns:
        The dict that was saved. Its tensors are on the CPU and, until touched, on disk (a private memory
        map). Besides tensors it may hold plain values, lists, dicts and an `argparse.Namespace`.

    Raises:
        CheckpointError: for any reason; one line that names the file.
    """
    path = Path(path)
    try:
        info = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if stat.S_ISDIR(info.st_mode):
        raise CheckpointError(f"{path} is a folder; give the checkpoint file itself (.pt or .safetensors)")
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a regular file; give a .pt or .safetensors file")
    if info.st_size == 0:
        raise CheckpointError(f"{path} is empty; download it again")
    if info.st_size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} has {info.st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    try:
        with path.open("rb") as file:
            start = file.read(64)
            if start.startswith(b"PK\x03\x04"):
                _check_zip(file, path, info.st_size)
                read = _load_zip
            elif start[8:9] == b"{":
                _check_safetensors(file, path, info.st_size)
                read = _load_safetensors
            else:
                raise CheckpointError(f"{path} {_what_else(start)}")
        return read(path)
    except CheckpointError:
        raise
    # whatever a hostile file makes a parser raise (MemoryError and RecursionError too) is the file's fault
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {_one_line(error)}") from error


def read_state_dict(
    path: str | os.PathLike[str], wrapper: str | None = None
) -> tuple[dict[str, Tensor], str | None]:
    """Read a checkpoint and take the weights out of it.

    Args:
        path: see `read_checkpoint`.
        wrapper: the entry to take; by default the first of `ema`, `model`, `state_dict` that is there, else
            the whole file if it holds nothing but tensors.

    Returns:
        `{key: tensor}` and the name of the entry they came from (None: the file itself).

    Raises:
        CheckpointError: unreadable, no such entry, or the entry is not a dict of tensors.
    """
    import torch

    content = read_checkpoint(path)
    found = [name for name in WRAPPERS if isinstance(content.get(name), dict)]
    if wrapper is not None and wrapper not in found:
        raise CheckpointError(
            f"{path} has no weights under {wrapper!r}; it has {_names(found or list(content))}"
        )
    taken = wrapper or (found[0] if found else None)
    weights = content if taken is None else content[taken]
    others = [str(key) for key, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others or not weights:
        where = path if taken is None else f"{path}: {taken!r}"
        raise CheckpointError(
            f"{where} is not a dict of tensors"
            + (f": {_names(others)} are not" if others else ", it is empty")
        )
    return weights, taken


# --------------------------------------------------------------------------------------------- zip and pickle
def _check_zip(file: BinaryIO, path: Path, size: int) -> None:
    """Refuse a zip whose directory or pickle is not like torch's, before anything is unpacked or run."""
    directory = _directory_bytes(file)
    if directory is None:
        raise CheckpointError(f"{path} is truncated: a zip file without its directory; download it again")
    if directory > MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{path}: a zip directory of {directory:,} bytes; at most {MAX_DIRECTORY_BYTES:,} are read"
        )
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: {_one_line(error)}; download it again"
        ) from error
    members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{path}: member {member.filename[:80]!r} is compressed ({member.compress_size:,} bytes "
                f"claim to be {member.file_size:,}); torch never writes that, refusing to unpack it"
            )
        if member.header_offset + member.file_size > size:
            raise CheckpointError(
                f"{path}: member {member.filename[:80]!r} ends outside the file; download it again"
            )
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(
            f"{path}: its members claim more bytes than the file has; refusing to unpack it"
        )
    # torch finds members without regard to case: with two of a name, we could check one and load the other
    if len({member.filename.lower() for member in members}) != len(members):
        raise CheckpointError(f"{path}: a member occurs twice; refusing to unpack it")

    pickles = [m for m in members if re.fullmatch(r"[^/]+/data\.pkl", m.filename)]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is a zip file, but not one that torch.save wrote (no data.pkl)")
    root = pickles[0].filename.removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.namelist():
        raise CheckpointError(
            f"{path} is a TorchScript archive, which holds code; save its state_dict() instead"
        )
    if pickles[0].file_size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: data.pkl has {pickles[0].file_size:,} bytes; at most {MAX_HEADER_BYTES:,} are read"
        )
    _check_pickle(archive.read(pickles[0]), path)


def _directory_bytes(file: BinaryIO) -> int | None:
    """Length of the zip's directory according to its end records; None if there are none.

    Python's zipfile makes an object of every entry, so an enormous directory must be refused before.
    """
    file.seek(-min(98, file.seek(0, os.SEEK_END)), os.SEEK_END)
    tail = file.read()
    end, locator, end64 = tail[-22:], tail[-42:-22], tail[-98:-42]
    if not end.startswith(b"PK\x05\x06"):
        return None
    if locator.startswith(b"PK\x06\x07") and end64.startswith(b"PK\x06\x06"):
        return int.from_bytes(end64[40:48], "little")
    return int.from_bytes(end[12:16], "little")


def _check_pickle(data: bytes, path: Path) -> None:
    """Refuse a pickle that names anything outside `_ALLOWED_GLOBALS`. Nothing is executed."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and not _ALLOWED_GLOBALS.fullmatch(str(argument)):
            name = str(argument).replace(" ", ".")[:80]
            raise CheckpointError(
                f"{path} refers to {name!r}, which no weights need: it may hold code, not loading it"
            )
        if opcode.name in _FOREIGN_OPCODES:
            raise CheckpointError(
                f"{path}: its pickle uses {opcode.name}, which torch.save does not write; not loading it"
            )


def _load_zip(path: Path) -> dict[str, Any]:
    import torch

    # training checkpoints keep their command line under "args"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    _check_tensors(content, path)
    return content


def _check_tensors(content: Any, path: Path) -> None:
    """Refuse tensors that pretend to be larger than their storage (stride 0, say)."""
    import torch

    stack, seen = [content], set()
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            if item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{path}: a tensor of shape {list(item.shape)} has only "
                    f"{item.untyped_storage().nbytes():,} bytes of data; refusing to load it"
                )
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, dict) else item)


# ------------------------------------------------------------------------------------------------ safetensors
def _check_safetensors(file: BinaryIO, path: Path, size: int) -> None:
    """Refuse a header that does not fit the file: its own length, data types, shapes and offsets."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise CheckpointError(
            f"{path} is truncated or lies: a header of {length:,} bytes in a file of {size:,}"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    header = json.loads(file.read(length))
    available = size - 8 - length
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= available:
            raise CheckpointError(
                f"{path} is truncated or lies: tensor {key[:80]!r} at bytes {begin:,} to {end:,} "
                f"of {available:,}"
            )
        if entry["dtype"] not in _SAFETENSORS_BYTES:
            raise CheckpointError(
                f"{path}: tensor {key[:80]!r} has the unknown type {str(entry['dtype'])[:40]!r}"
            )
        shape = entry["shape"]
        if min(shape, default=0) < 0 or math.prod(shape) * _SAFETENSORS_BYTES[entry["dtype"]] != end - begin:
            raise CheckpointError(
                f"{path}: tensor {key[:80]!r} of shape {shape} and type {entry['dtype']} "
                f"cannot have {end - begin:,} bytes"
            )


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


# --------------------------------------------------------------------------------------------------- messages
def _what_else(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if start[:1] == b"\x80":
        return "is a bare pickle, as torch wrote before 1.6; not loading it, save it again with a newer torch"
    return "is not a checkpoint: neither a zip file that torch.save wrote nor a safetensors file"


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _names(names: list[str]) -> str:
    shown = ", ".join(repr(str(name)[:80]) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
