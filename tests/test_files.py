from __future__ import annotations

import errno
import os
import stat

import pytest

from tokenflow.errors import UserError
from tokenflow.files import atomic_write


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
