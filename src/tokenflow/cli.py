"""The command line: a command is a few lines that call one function of a room.

Heavy imports stay inside the functions, so that every `--help` answers at once. Mistakes of the user end as
one line, `tokenflow: error: ...`, with exit code 2; Ctrl-C ends with 130 and leaves no half file. A command
that returns a number chooses its exit code.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from tokenflow import __version__
from tokenflow.errors import UserError
from tokenflow.evaluation.options import GenerationEval, ReconstructionEval, SemanticsEval, VlmEval
from tokenflow.generation.options import GenerateOptions
from tokenflow.names import unknown_name
from tokenflow.recipes import RECIPES
from tokenflow.recipes.teacher import TEACHER_RECIPES
from tokenflow.recipes.text_to_image import GENERATION_RECIPES
from tokenflow.training.text_to_image_recipe import TokenizeOptions

# Packages that only some commands need, and the extra that brings each.
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "tensorboard": "train",
    "ray": "ray",
    "torchmetrics": "eval",
    "sklearn": "eval",
}

Dtype = Literal["float32", "bfloat16"]
Output = Annotated[Path, arg(aliases=["-o"])]
Model = Annotated[str, arg(aliases=["-m"])]
Images = Positional[Annotated[tuple[Path, ...], arg(metavar="IMG ...")]]


def encode(
    images: Images,
    /,
    *,
    output: Output,
    model: Model = "tokenflow-tiny",
    resize_mode: Literal["crop", "pad", "squash"] = "crop",
    device: str = "auto",
    batch_size: int = 16,
) -> None:
    """Turn images into tokens, all in one safetensors file.

    Args:
        images: Image files, or folders of them.
        output: The token file to write.
        model: A bundled name, a folder, or a hub name.
        resize_mode: How a picture becomes square: cut out its middle, pad it, or squash it.
        device: auto, cpu, cuda, cuda:1 ...
        batch_size: Pictures at a time.
    """
    from tokenflow import codec

    tokens = codec.encode_files(
        images, output, model=model, resize_mode=resize_mode, device=device, batch_size=batch_size
    )
    count, length = tokens.indices.shape
    size = output.stat().st_size
    print(f"{count} {'image' if count == 1 else 'images'}, {length} tokens each: {output} ({size:,} bytes)")


def decode(
    tokens: Positional[Path],
    /,
    *,
    output: Output,
    model: Annotated[str | None, arg(aliases=["-m"])] = None,
    num_scales: int | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_size: int = 16,
) -> None:
    """Turn a token file back into PNG pictures.

    Args:
        tokens: The token file.
        output: The folder for the pictures.
        model: The model named in the token file, unless given; it must have the same codebook.
        num_scales: Decode only the first so many scales: coarse, but full-size.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: Of the decoder; bfloat16 is faster, and nearly the same.
        batch_size: Pictures at a time.
    """
    from tokenflow import codec

    options = {"device": device, "dtype": dtype, "batch_size": batch_size}
    pictures = codec.decode_file(tokens, output, model=model, num_scales=num_scales, **options)  # type: ignore[arg-type]
    print(f"{len(pictures)} {'picture' if len(pictures) == 1 else 'pictures'} in {output}")


def reconstruct(
    images: Images,
    /,
    *,
    output: Output = Path("reconstructions"),
    model: Model = "tokenflow-tiny",
    metrics: bool = False,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_size: int = 16,
) -> None:
    """Send images through tokens and back; writes a comparison sheet.

    Args:
        images: Image files, or folders of them.
        output: The folder for the pictures and comparison.png.
        model: A bundled name, a folder, or a hub name.
        metrics: Also print PSNR and SSIM, and write metrics.json.
        device: auto, cpu, cuda, cuda:1 ...
        dtype: Of the decoder; bfloat16 is faster, and nearly the same.
        batch_size: Pictures at a time.
    """
    from tokenflow import codec

    options = {"device": device, "dtype": dtype, "batch_size": batch_size}
    rows = codec.reconstruct_files(images, output, model=model, metrics=metrics, **options)  # type: ignore[arg-type]
    if metrics:
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("psnr", "ssim")}
        lines = [*rows, {"file": "mean", **mean}] if len(rows) > 1 else rows
        _print_table(["image", "PSNR (dB)", "SSIM"], [_metrics_row(row) for row in lines])
    print(f"originals beside reconstructions: {output / 'comparison.png'}")


def info(model: Positional[str] = "tokenflow-tiny", /) -> None:
    """Say what a model or a token file is.

    Args:
        model: A bundled name, a model's folder, or a token file.
    """
    from tokenflow import codec

    _print_table([], [list(row) for row in codec.describe(model).items()])


def convert(
    file: Positional[Path],
    out: Positional[Path],
    /,
    *,
    image_size: int | None = None,
    wrapper: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Turn a released TokenFlow checkpoint into a loadable folder.

    Args:
        file: The released .pt (or .safetensors) file, or the folder of a text-to-image or understanding
            model; pickled code in it is refused, never run.
        out: The folder to make.
        image_size: 224 or 256 for the CLIP layouts, which the file cannot tell apart.
        wrapper: The entry of the file with the weights: ema, model or state_dict, whichever comes first.
        tokenizer: For a folder without an image tokenizer: the released file (or its converted folder).
    """
    from rich.console import Console

    from tokenflow.checkpoints.tokenizer import convert_tokenizer

    if file.is_dir():
        from tokenflow.checkpoints.text_to_image import convert_text_to_image, is_text_to_image_folder
        from tokenflow.checkpoints.understanding import convert_understanding

        if is_text_to_image_folder(file):
            Console().print(convert_text_to_image(file, out, tokenizer, image_size))
        else:
            Console().print(convert_understanding(file, out, tokenizer))
        return
    Console().print(convert_tokenizer(file, out, image_size, wrapper))


def generate(options: OmitArgPrefixes[GenerateOptions]) -> None:
    """Draw pictures from text."""
    options.check()  # before the seconds that loading takes
    from tokenflow import drawing

    pictures, notes = drawing.generate(options)
    print(*pictures[:10], *(["..."] if len(pictures) > 10 else []), *notes, sep="\n")


def ask(
    words: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ... QUESTION")]],
    /,
    *,
    model: Model = "tokenflow-tiny-chat",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    json: bool = False,
    device: str = "auto",
) -> None:
    """Answer a question about pictures.

    Args:
        words: Image files, and last the question, in quotes.
        model: A bundled name, a folder, or a hub name.
        max_new_tokens: The answer is cut off there.
        temperature: 0 gives the likeliest answer; 1 samples as the model believes.
        seed: Of the sampling.
        json: Print one JSON object.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from tokenflow.understanding import console

    options = {"model": model, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    console.ask_files(words, **options, as_json=json, device=device)  # type: ignore[arg-type]


def chat(
    images: Images = (),
    /,
    *,
    model: Model = "tokenflow-tiny-chat",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Talk about pictures, question by question.

    Args:
        images: Image files to begin with; `/image FILE` shows more, `/new` starts over, `/quit` ends.
        model: A bundled name, a folder, or a hub name.
        max_new_tokens: Each answer is cut off there.
        temperature: 0 gives the likeliest answer; 1 samples as the model believes.
        seed: Of the sampling.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from tokenflow.understanding import console

    options = {"model": model, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    console.chat(images, **options, device=device)  # type: ignore[arg-type]


def eval_reconstruction(options: OmitArgPrefixes[ReconstructionEval]) -> None:
    """Measure what reconstruction loses: PSNR, SSIM, usage, perceptual distances."""
    from tokenflow.evaluation.reconstruction import run

    _print_result(run(options))


def eval_semantics(options: OmitArgPrefixes[SemanticsEval]) -> None:
    """Measure what tokens know: k-NN, linear probe and zero-shot accuracy."""
    from tokenflow.evaluation.semantics import run

    _print_result(run(options))


def eval_generation(options: OmitArgPrefixes[GenerationEval]) -> None:
    """Measure whether drawn pictures show what was asked for."""
    from tokenflow.evaluation.generation import run

    _print_result(run(options))


def eval_vlm(options: OmitArgPrefixes[VlmEval]) -> None:
    """Measure the answers to questions about pictures: yes/no accuracy and F1, exact match."""
    from tokenflow.evaluation.vlm import run

    _print_result(run(options))


def eval_compare(results: Positional[Annotated[tuple[Path, ...], arg(metavar="RESULT.json ...")]], /) -> None:
    """Show results side by side; those that were measured differently are refused.

    Args:
        results: Files that `eval ... --out` wrote.
    """
    from rich.console import Console

    from tokenflow.evaluation.report import compare, read

    Console(soft_wrap=True).print(compare([read(path) for path in results]))


def _training(make: Callable[[], Any], start: Callable[[Any], int | None]) -> Callable[..., int | None]:
    """A command that trains by the recipe of `make`, with every value of it as an option."""
    recipe = make()

    def train(recipe: Any = recipe) -> int | None:
        return start(recipe)

    train.__doc__ = (make.func if isinstance(make, functools.partial) else make).__doc__
    train.__annotations__["recipe"] = Annotated[type(recipe), arg(name="")]
    return train


def _train_tokenizer(recipe: Any) -> int:
    from tokenflow.training.loop import train_tokenizer

    return _report_training(train_tokenizer(recipe))


def _report_training(done: Any) -> int:
    _say_once(f"step {done.step} (stopped by {done.stopped_by}); the model: {done.export}")
    # A stopped run must not look done to `train && eval`; the shell's codes are 130 and 143.
    return 128 + signal.Signals[done.stopped_by] if done.stopped_by in ("SIGINT", "SIGTERM") else 0


def _train_text_to_image(recipe: Any) -> int:
    from tokenflow.training.text_to_image import train_text_to_image

    return _report_training(train_text_to_image(recipe))


def _train_teacher(recipe: Any) -> None:
    from tokenflow.training.teacher import train_teacher

    _say_once(f"the teacher: {train_teacher(recipe)}")


def tokenize(options: OmitArgPrefixes[TokenizeOptions]) -> None:
    """Turn data sets of images and captions into token shards to train on."""
    from tokenflow.training.tokenization import tokenize as run

    done = run(options)
    for line in done.skipped[:10]:
        print(f"skipped: {line}")
    if len(done.skipped) > 10:
        print(f"skipped: ... and {len(done.skipped) - 10} more")
    print(f"{done.images:,} views of images ({done.new:,} of them new), {len(done.skipped):,} images skipped")
    print(f"token shards: {' '.join(map(str, done.folders))}")


def _say_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this once a process
        print(text)


def demo(
    images: Images = (),
    /,
    *,
    output: Output = Path("demo-output"),
    model: Model = "tokenflow-tiny",
    text_to_image: str | None = None,
    device: str = "auto",
) -> None:
    """Show the tokenizer at work on a few photographs: an HTML page and a PNG.

    Args:
        images: Your own photographs, or folders of them; a few come with the package.
        output: The folder for page and picture.
        model: A bundled name, a folder, or a hub name.
        text_to_image: The model that draws the gallery; by default the bundled one, if there is one.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from tokenflow.demo import run_demo

    page, picture = run_demo(output, images=images, model=model, text_to_image=text_to_image, device=device)
    print(f"page:    {page.resolve()}\npicture: {picture.resolve()}")


# A command, or a dict of commands by the next word.
COMMANDS: dict[str, Any] = {
    "demo": demo,
    "encode": encode,
    "decode": decode,
    "reconstruct": reconstruct,
    "generate": generate,
    "ask": ask,
    "chat": chat,
    "info": info,
    "convert": convert,
    "tokenize": tokenize,
    "train": {
        "tokenizer": {name: _training(make, _train_tokenizer) for name, make in RECIPES.items()},
        "text-to-image": {
            name: _training(make, _train_text_to_image) for name, make in GENERATION_RECIPES.items()
        },
        "teacher": {name: _training(make, _train_teacher) for name, make in TEACHER_RECIPES.items()},
    },
    "eval": {
        "reconstruction": eval_reconstruction,
        "semantics": eval_semantics,
        "generation": eval_generation,
        "vlm": eval_vlm,
        "compare": eval_compare,
    },
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
    _print_table([], rows)
    print(f"\n{' '.join(words)} {word} --help says more.")


def _summary(group: str, command: Callable[..., Any] | dict[str, Any]) -> str:
    if isinstance(command, dict):
        return (
            f"{group.capitalize()} by a recipe: {', '.join(list(command)[:3])}{' ...' * (len(command) > 3)}"
        )
    return (command.__doc__ or "").strip().splitlines()[0]


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console

    from tokenflow.evaluation.report import table

    Console(soft_wrap=True).print(table(result))


def _metrics_row(row: dict[str, Any]) -> list[str]:
    return [row["file"], f"{row['psnr']:.2f}", f"{row['ssim']:.3f}"]


def _print_table(header: list[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, show_header=bool(header), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    sys.exit(main())
