from __future__ import annotations

import errno
import os
import stat

import pytest

from tokenflow.errors import UserError
from tokenflow.files import atomic_folder, atomic_write


def test_writes_new_file_and_makes_folders(tmp_path):
    target = tmp_path / "a" / "b" / "out.txt"
    with atomic_write(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".txt"
        assert not target.exists()
        temporary.write_text("hello")
    assert target.read_text() == "hello"
    assert os.listdir(target.parent) == ["out.txt"]


def test_permissions_are_those_of_a_plain_file(tmp_path):
    plain, target = tmp_path / "plain", tmp_path / "target"
    plain.write_text("x")
    with atomic_write(target) as temporary:
        temporary.write_text("x")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    target.chmod(0o640)
    with atomic_write(target) as temporary:
        temporary.write_text("y")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_devices_and_pipes_are_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="device or a pipe"), atomic_write(pipe):
        pass
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "link.txt", tmp_path / "real" / "out.txt"
    link.symlink_to(target)
    for words in ("new", "newer"):  # the first time it leads nowhere
        with atomic_write(link) as temporary:
            temporary.write_text(words)
        assert link.is_symlink()
        assert target.read_text() == words


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, UserError])
def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")

    def interrupted():
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"half of the ne")
            raise error

    with pytest.raises(error):
        interrupted()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.bin"]


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EACCES, "permission denied"), (errno.EROFS, "read-only")],
)
def test_disk_errors_become_one_line(tmp_path, code, words):
    target = tmp_path / "out.bin"
    with pytest.raises(UserError, match=words) as caught, atomic_write(target):
        raise OSError(code, os.strerror(code))
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_disk_full_at_flush_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"), atomic_write(tmp_path / "out.bin") as temporary:
        temporary.write_bytes(b"data")
    assert os.listdir(tmp_path) == []


def test_other_os_errors_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "out.bin"):
        (tmp_path / "missing").read_bytes()
    assert os.listdir(tmp_path) == []


def test_an_error_that_names_another_file_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(PermissionError), atomic_write(tmp_path / "out.bin"):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/input")
    assert os.listdir(tmp_path) == []


def test_target_that_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="it is a folder"), atomic_write(tmp_path):
        pass


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "file" / "out.bin"):
        pass


# ---------------------------------------------------------------------------------------------- whole folders
def test_folder_appears_whole(tmp_path):
    target = tmp_path / "models" / "out"
    with atomic_folder(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("x")
        (temporary / "inner" / "file").chmod(0o600)
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "x"
    (tmp_path / "plain").touch()
    assert (target / "inner" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert os.listdir(target.parent) == ["out"]


def test_empty_folder_may_be_there_but_nothing_else(tmp_path):
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as temporary:
        (temporary / "file").touch()
    assert os.listdir(tmp_path / "empty") == ["file"]
    (tmp_path / "a file").touch()
    for taken in ("empty", "a file"):
        with (
            pytest.raises(UserError, match="exists and is not an empty folder"),
            atomic_folder(tmp_path / taken),
        ):
            pass
    assert sorted(os.listdir(tmp_path)) == ["a file", "empty"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("wrong"), OSError(errno.EIO, "broken disk")]
)
def test_folder_is_removed_after_any_error(tmp_path, error):
    def fail() -> None:
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "file").touch()
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_folder_on_a_full_disk_is_one_line(tmp_path):
    errors = [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ]
    for error in errors:
        with (
            pytest.raises(UserError, match="out: no space left on the disk"),
            atomic_folder(tmp_path / "out"),
        ):
            raise error
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="a part of the path is a file"),
        atomic_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_an_older_folder_is_replaced_only_where_asked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with atomic_folder(tmp_path / "out", replace=True) as temporary:
        (temporary / "new").touch()
    assert os.listdir(tmp_path / "out") == ["new"]
