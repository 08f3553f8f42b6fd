"""Writing files so that a kill, a full disk or Ctrl-C never leaves half of one behind."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenflow.errors import UserError

_REASONS = {
    errno.ENOSPC: "no space left on the disk; free some or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file is larger than this disk or account allows; choose another place",
    errno.EACCES: "permission denied; choose a place you may write to",
    errno.EPERM: "permission denied; choose a place you may write to",
    errno.EROFS: "the file system is read-only; choose a place you may write to",
    errno.EISDIR: "it is a folder; give a file name",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}


def write_error(path: str | os.PathLike[str], error: Exception) -> Exception:
    """The one-line UserError that says why `path` cannot be written; `error` itself if it is no OS error.

    Libraries that write for themselves (safetensors) give the number of an OSError only in their text.
    """
    number = error.errno if isinstance(error, OSError) else _os_error_number(error)
    if number is None and not isinstance(error, OSError):
        return error
    reason = _REASONS.get(number or 0) or getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot write {os.fspath(path)}: {reason}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well it becomes `path`, else it is removed.

    The temporary file exists already (empty, private to this call) and keeps the suffix of `path`, for
    writers that look at it. Missing parent folders are made. The file and its folder entry are flushed to
    disk, so that after a power cut `path` is either the old or the new file. Any exception, KeyboardInterrupt
    too, leaves `path` as it was and passes on.

        with atomic_write("out.safetensors") as temporary:
            save_file(tensors, temporary)

    Raises UserError, one line, if the disk is full or the place cannot be written to: also for an OSError out
    of the block that says so (unless it names another file). Other exceptions of the block are not touched.
    """
    target = Path(os.path.realpath(path) if os.path.islink(path) else path)  # a link stays one
    temporary = target.with_name(f".{target.stem[:64]}.{secrets.token_hex(6)}{target.suffix}")
    created = False
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(target))
        if target.exists() and not target.is_file():  # the superuser would replace /dev/null for everyone
            raise UserError(f"cannot write {target}: it is a device or a pipe; give a file name")
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else None
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        created = True
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)
    except OSError as error:
        ours = error.filename is None or Path(os.fsdecode(error.filename)) in (
            temporary,
            target,
            target.parent,
        )
        if not created or (ours and error.errno in _REASONS):  # before the block runs, any error is ours
            raise write_error(target, error) from error
        raise
    finally:
        if created:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`; when the block ends well it becomes `path`, else it is removed.

    `path` may be an empty folder already, but nothing else, unless it is to `replace` an older one. After a
    kill `path` is the old folder, the new one or (for an instant, when replacing) missing, never half of one.

    Raises UserError, one line, if `path` is taken, the disk is full, or the place cannot be written to: also
    for an error of a library that gives only the number of an OSError (safetensors does).
    """
    target = Path(path)
    if not replace and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another name or remove it")
    temporary = target.with_name(f".{target.name[:64]}.{secrets.token_hex(6)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        plain = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(plain)  # safetensors keeps its files from everyone but their owner
            flush(file)
        flush(temporary)
        if replace and target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        flush(target.parent)
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _os_error_number(error)
        names = Path(os.fsdecode(error.filename)) if isinstance(error, OSError) and error.filename else target
        ours = names.is_relative_to(temporary) or names in (target, *target.parents)
        if ours and number in _REASONS:
            raise write_error(target, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _os_error_number(error: Exception) -> int | None:
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def flush(path: Path) -> None:
    """Have the disk keep what was written to a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
