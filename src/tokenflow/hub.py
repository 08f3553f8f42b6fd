"""The Hugging Face hub, where it may not be reached.

Its libraries ask for each file six times, half a minute in all, and a misspelt path looks like a name on the
hub. So it is asked once, shortly, before they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenflow.errors import UserError

SECONDS = 5.0  # to wait for an answer


def silence() -> str | None:
    """Why the hub cannot be asked for anything, in a few words; None if it answers."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the HTTP library below, which has changed before
        return f"{constants.ENDPOINT} does not answer ({error})"
    return None


def check_model(name: str, what: str = "model") -> None:
    """See that what looks like a hub name can mean something: a folder, a copy of a download, or the hub.

    Raises:
        UserError: it is neither folder nor copy, and the hub does not answer.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return
    copy = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    if not copy.is_dir() and (reason := silence()):
        raise UserError(f"cannot load {what} {name}: there is no such folder, and as a hub name: {reason}")


@contextmanager
def copies_if_silent() -> Iterator[str | None]:
    """Inside the block `datasets` takes its copies of earlier downloads at once if the hub is silent.

    Gives what `silence` says.
    """
    import datasets

    reason, before = silence(), datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield reason
    finally:
        datasets.config.HF_HUB_OFFLINE = before
