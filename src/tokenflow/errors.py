"""The exception that the command line turns into a one-line message."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message is one line that names the thing, the value and the fix."""


class NotInstalledError(UserError):
    """A package is missing that only some need: the message says what to install."""
