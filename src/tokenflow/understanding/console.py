"""The work of `tokenflow ask` and `tokenflow chat`."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaProcessor, TextStreamer

from tokenflow.data.images import read_image
from tokenflow.errors import UserError
from tokenflow.understanding.ask import Conversation
from tokenflow.understanding.llava import load

HELP = "/image FILE shows another picture, /new starts over, /quit ends."


def ask_files(
    words: Sequence[str],
    *,
    model: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
    device: str,
) -> None:
    """Print the answer to the last of `words`, a question about the image files before it, as it is written.

    Args:
        as_json: print one JSON object instead: `model`, `images`, `question`, `answer`, `seconds` (without
            loading the model).

    Raises:
        UserError: no question, no image, or one that cannot be read; options out of range; as `ask`.
    """
    images, question = split_words(words)
    pictures = [read_image(path) for path in images]
    options = generate_options(max_new_tokens, temperature, seed)
    talk = Conversation(*load(model, device=device))
    torch.manual_seed(seed)
    if not as_json:
        talk.ask(question, pictures, **options, streamer=streamer(talk.processor))
        return
    started = time.perf_counter()
    answer = talk.ask(question, pictures, **options)
    seconds = round(time.perf_counter() - started, 3)
    found = {"model": model, "images": [str(path) for path in images], "question": question}
    print(json.dumps({**found, "answer": answer, "seconds": seconds}, ensure_ascii=False))


def chat(
    images: Sequence[Path], *, model: str, max_new_tokens: int, temperature: float, seed: int, device: str
) -> None:
    """Answer the lines of standard input in turn, streaming, until it ends; see `HELP` for its commands.

    A line that cannot be answered is said on standard error, and the conversation goes on as if it had not
    been asked.

    Raises:
        UserError: an image that cannot be read; options out of range; no such model.
    """
    shown: list[Image.Image] = [read_image(path) for path in images]
    options = generate_options(max_new_tokens, temperature, seed)
    parts = load(model, device=device)
    torch.manual_seed(seed)
    talk, waiting = Conversation(*parts), list(shown)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `Conversation.ask` refuses the line, not the rest
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                talk, waiting = Conversation(*parts), list(shown)
            elif command == "/image":
                if not (file := rest.strip().strip("'\"")):
                    raise UserError("/image needs a file: /image FILE")
                waiting.append(read_image(Path(file).expanduser()))
            elif command.startswith("/"):
                raise UserError(f"unknown command {command}: {HELP}")
            elif line:
                talk.ask(line, waiting, **options, streamer=streamer(talk.processor))
                waiting = []
        except UserError as error:
            print(f"tokenflow: error: {error}", file=sys.stderr)


def split_words(words: Sequence[str]) -> tuple[list[Path], str]:
    """Image files and question out of `IMAGE ... QUESTION`. Raises UserError where either is missing."""
    *files, question = words or [""]  # any text, so no `Path`: a long question is too long for one
    if not question.strip() or os.path.isfile(question):
        raise UserError('there is no question; write: tokenflow ask IMAGE ... "QUESTION"')
    if not files:
        raise UserError('there is no image; write: tokenflow ask IMAGE ... "QUESTION"')
    for file in files:
        if not os.path.exists(file):
            raise UserError(f"cannot read image {file}: no such file (quote a question of several words)")
    return [Path(file) for file in files], question


def generate_options(max_new_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
    """What `generate` takes: sampling at a temperature above 0, else the likeliest answer.

    Raises:
        UserError: a number out of range; of the seed, too, which torch is given.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed must be from 0 to 2^64 - 1, got {seed}")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature must be a number of at least 0, got {temperature}")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    return {"max_new_tokens": max_new_tokens, **sampling}


def streamer(processor: LlavaProcessor) -> TextStreamer:
    """Prints an answer word by word."""
    return TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
