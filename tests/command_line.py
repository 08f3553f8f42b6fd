"""What tests of commands share."""

from __future__ import annotations


def the_error(result: tuple[int, str, str]) -> str:
    """The one line of a command that failed: (exit status, stdout, stderr)."""
    code, _, stderr = result
    line = stderr.strip().splitlines()[-1]
    assert code == 2, stderr
    assert line.startswith("tokenflow: error: ")
    assert "Traceback" not in stderr
    return line
