"""The demo's questions about the photographs, with every answer as the model gives it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tokenflow.bundled import bundled_names
from tokenflow.data.images import read_image
from tokenflow.errors import NotInstalledError

BUNDLED = "tokenflow-tiny-chat"
QUESTIONS = (
    "Describe the picture.",
    "What is in the picture?",
    "Is there a person in the picture?",
    "Is there an animal in the picture?",
)
MAX_NEW_TOKENS = 40
_SIDE = 256  # pixels of the photographs on the page


@dataclass(frozen=True)
class Answers:
    """Attributes:
    pictures: the photographs, made small.
    answers: a list of answers a photograph, one to each question.
    seconds: to encode a photograph and answer one question, on average.
    """

    model: str
    names: list[str]
    pictures: list[Image.Image]
    questions: list[str]
    answers: list[list[str]]
    seconds: float


def bundled_answers(paths: Sequence[Path], device: str = "auto") -> Answers | str | None:
    """What the bundled chat model says; a line on what to install where its language model is missing; None
    while the package has no chat model."""
    if BUNDLED not in bundled_names():
        return None
    try:
        return answer_questions(BUNDLED, paths, device=device)
    except NotInstalledError as error:
        return str(error)


def answer_questions(
    model: str, paths: Sequence[Path], questions: Sequence[str] = QUESTIONS, device: str = "auto"
) -> Answers:
    """Ask every question about every picture, each by itself: what `tokenflow ask PICTURE QUESTION` prints.

    Raises:
        UserError: a picture cannot be read, or the model cannot be loaded.
    """
    from tokenflow.understanding import ask, load

    chat, processor = load(model, device=device)
    pictures, answers = [], []
    started = time.perf_counter()
    for path in tqdm(paths, desc="answers", unit="photo", disable=None):
        picture = read_image(path)
        answers.append([ask(chat, processor, picture, q, max_new_tokens=MAX_NEW_TOKENS) for q in questions])
        picture.thumbnail((_SIDE, _SIDE))
        pictures.append(picture)
    seconds = (time.perf_counter() - started) / (len(paths) * len(questions))
    names = [path.stem for path in paths]
    return Answers(model, names, pictures, list(questions), answers, seconds)
