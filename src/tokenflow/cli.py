"""The command line: which commands there are, how they are found and read, and how mistakes are told.

The commands themselves are in `tokenflow.commands`. Mistakes of the user end as one line,
`tokenflow: error: ...`, with exit code 2; Ctrl-C ends with 130 and leaves no half file.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from tokenflow import __version__
from tokenflow.commands import evaluate, generation, tokenizer, train, understanding
from tokenflow.commands.options import print_table
from tokenflow.errors import UserError
from tokenflow.names import unknown_name
from tokenflow.recipes import RECIPES
from tokenflow.recipes.teacher import TEACHER_RECIPES
from tokenflow.recipes.text_to_image import GENERATION_RECIPES
from tokenflow.recipes.understanding import UNDERSTANDING_RECIPES

# A command, or a dict of commands by the next word.
COMMANDS: dict[str, Any] = {
    "demo": tokenizer.demo,
    "encode": tokenizer.encode,
    "decode": tokenizer.decode,
    "reconstruct": tokenizer.reconstruct,
    "generate": generation.generate,
    "ask": understanding.ask,
    "chat": understanding.chat,
    "info": tokenizer.info,
    "convert": tokenizer.convert,
    "tokenize": generation.tokenize,
    "questions": understanding.questions,
    "train": {
        "tokenizer": train.by_recipe(RECIPES, train.tokenizer),
        "text-to-image": train.by_recipe(GENERATION_RECIPES, train.text_to_image),
        "understanding": train.by_recipe(UNDERSTANDING_RECIPES, train.understanding),
        "teacher": train.by_recipe(TEACHER_RECIPES, train.teacher),
    },
    "eval": {
        "reconstruction": evaluate.reconstruction,
        "semantics": evaluate.semantics,
        "generation": evaluate.generation,
        "vlm": evaluate.vlm,
        "features": evaluate.features,
        "compare": evaluate.compare,
    },
}

# Packages that only some commands need, and the extra that brings each.
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "tensorboard": "train",
    "faiss": "faiss",
    "gguf": "chat",
    "peft": "chat",
    "ray": "ray",
    "sklearn": "eval",
    "torchmetrics": "eval",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    # Read by transformers when it is imported: its bars and notes would drown ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"tokenflow: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f"tokenflow: error: this needs {error.name}: pip install 'tokenflow-vision[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # `tokenflow ... | head`: nobody reads on, and that is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # out of a library that writes for itself, such as a tracker
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"tokenflow: error: {error.strerror}: {error.filename or 'the disk is full'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenflow: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    commands: Any = COMMANDS
    words = ["tokenflow"]
    while isinstance(commands, dict):
        if not arguments or arguments[0] in ("-h", "--help"):
            _overview(words, commands)
            return 0
        name = arguments.pop(0)
        if len(words) == 1 and name == "--version":
            print(f"tokenflow {__version__}")
            return 0
        if name not in commands:
            what = "option" if name.startswith("-") else _next_word(words)
            raise unknown_name(what, name, commands)
        commands = commands[name]
        words.append(name)
    return _parse(commands, " ".join(words), arguments)() or 0


def _next_word(words: Sequence[str]) -> str:
    return "recipe" if words[1:2] == ["train"] and len(words) == 3 else "command"


def _parse(command: Callable[..., Any], program: str, arguments: Sequence[str]) -> Callable[[], Any]:
    """Read a command's arguments by `tyro`; mistakes become one-line UserErrors in place of boxes."""

    @functools.wraps(command)
    def later(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(command, *args, **kwargs)

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(later, prog=program, args=arguments, config=(FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            return lambda: None  # it was --help
        words = " ".join(line.strip("╭╮╰╯│─ ") for line in errors.getvalue().splitlines()[1:]).split()
        message = re.split(" (?:For full helptext|Argument helptext)", " ".join(words))[0]
        raise UserError(f"{message}; see {program} --help") from None


def _overview(words: list[str], commands: dict[str, Any]) -> None:
    word = _next_word(words).upper()
    print(f"usage: {' '.join(words)} {word} ...\n")
    if len(words) == 1:
        print("TokenFlow: images to tokens and back; one tokenizer for understanding and generation.\n")
    rows = []
    for name, command in commands.items():
        if isinstance(command, dict) and len(words) == 1:
            rows += [[f"{name} {sub}", _summary(name, inner)] for sub, inner in command.items()]
        else:
            rows.append([name, _summary(words[-1], command)])
    print_table([], rows)
    print(f"\n{' '.join(words)} {word} --help says more.")


def _summary(group: str, command: Callable[..., Any] | dict[str, Any]) -> str:
    if isinstance(command, dict):
        return (
            f"{group.capitalize()} by a recipe: {', '.join(list(command)[:3])}{' ...' * (len(command) > 3)}"
        )
    return (command.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
