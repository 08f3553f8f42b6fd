"""The hub is asked once, shortly."""

from __future__ import annotations

import socket

import pytest

from tokenflow import hub


@pytest.fixture(params=["closed", "mute"])
def silent_hub(request, monkeypatch):
    """An address where nobody listens, or somebody who never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if request.param == "closed":
        listener.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    yield f"http://127.0.0.1:{port}"
    listener.close()


def test_a_hub_that_does_not_answer(silent_hub):
    assert str(hub.silence()).startswith(f"{silent_hub} does not answer (")


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.silence() == "HF_HUB_OFFLINE is set"
