"""What `tokenflow generate` can be asked for: plain values, so that `--help` imports nothing heavy, and the
checks that need no model, so that mistakes are said at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tokenflow.errors import UserError
from tokenflow.generation.limits import check_count

MOST_CHARACTERS = 100_000  # of a prompt: all but the first few hundred are cut off anyway
STEPS = {1: ((1200,), (0.8,)), 2: ((1200, 1), (0.8, 0.0)), 3: ((1200, 100, 1), (0.8, 0.8, 0.0))}  # Tab. 6
LABEL_STEPS = STEPS | {1: ((900,), (0.96,))}  # VAR's
GUIDANCE, LABEL_GUIDANCE = 7.5, 1.5


@dataclass(frozen=True)
class GenerateOptions:
    """What to draw, how, with which model, and where to."""

    output: Annotated[Path, arg(aliases=["-o"])]
    """The folder for the pictures."""
    text: Positional[Annotated[tuple[str, ...], arg(metavar="PROMPT ...")]] = ()
    """What to draw. Only the beginning of a very long prompt is read; a warning says where it was cut."""
    prompts: Path | None = None
    """A UTF-8 text file with further prompts, one a line; empty lines do not count."""
    labels: tuple[int, ...] = ()
    """Class labels in place of prompts, for a class-conditional model (`train text-to-image var-d16`)."""
    model: Annotated[str, arg(aliases=["-m"])] = "tokenflow-tiny-t2i"
    """A bundled name, a folder, or a hub name."""
    num_images: int = 1
    """Pictures for each prompt or label; picture i is made from seed + i."""
    seed: int = 0
    """Same seed, same picture, whatever else is drawn beside it."""
    guidance_scale: float | None = None
    """How closely to follow the prompt, by default 7.5 (labels: 1.5); 0 is twice as fast, and loosest."""
    steps_per_scale: int | None = None
    """Sampling passes at each scale after the first, by default 3 (labels: 1); more than 3 with --top-k
    and --top-p."""
    top_k: tuple[int, ...] | None = None
    """How many codes to choose from, one number a pass, by default 1200 100 1 (labels: 900); 0 is all."""
    top_p: tuple[float, ...] | None = None
    """The probability they must share, one number a pass, by default 0.8 0.8 0 (labels: 0.96); 0 is all."""
    temperature: float = 1.0
    """0 always takes the likeliest code."""
    negative_prompt: str | None = None
    """What to stay away from."""
    init_image: Path | None = None
    """A picture to start from: a variation keeps its first scales, in-painting keeps what MASK says."""
    keep_scales: int | None = None
    """How many scales of INIT_IMAGE a variation keeps, by default half of them."""
    mask: Path | None = None
    """A picture whose white parts are drawn anew in INIT_IMAGE; black parts stay."""
    from_: Annotated[Path | None, arg(name="from")] = None
    """A picture that this command has made; it is made again. Only -o, --model and --device go with it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of language model and decoder."""
    batch_size: int = 8
    """Pictures at a time; changes the speed and the memory needed, not the pictures."""
    compile: bool = False
    """Prepare the language model's passes first: on a GPU they are captured as CUDA graphs, in seconds; on a
    CPU compiled (torch.compile), minutes that pay off in many pictures."""

    def check(self) -> None:
        """Raise UserError for prompts, labels, counts and passes that make no sense."""
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.from_ is None:
            self._check_count(len(subjects(self)))
            sampling(self)

    def _check_count(self, subjects: int) -> None:
        count = self.num_images
        if count < 1:
            raise UserError(f"--num-images must be at least 1, got {count}")
        check_count(subjects * count)
        if not 0 <= self.seed <= 2**63 - count:
            raise UserError(f"--seed must be from 0 to 2^63 - {count}, got {self.seed}")
        if self.init_image is None and (self.mask or self.keep_scales is not None):
            raise UserError("--mask and --keep-scales say what to keep of a picture; give --init-image too")


def subjects(options: GenerateOptions) -> list[str] | list[int]:
    """What to draw: prompts, or class labels.

    Raises:
        UserError: both, a negative label, or what goes with prompts only; see `read_prompts`.
    """
    if not options.labels:
        return read_prompts(options.text, options.prompts)
    if options.text or options.prompts is not None:
        raise UserError("give prompts or --labels, not both: a model draws from one of them")
    if options.negative_prompt is not None:
        raise UserError("--negative-prompt goes with prompts, not with --labels")
    if options.compile:
        raise UserError("--compile goes with prompts, not with --labels")
    if min(options.labels) < 0:
        raise UserError(f"label {min(options.labels)}: labels count from 0")
    return list(options.labels)


def read_prompts(text: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a UTF-8 file, one a line.

    Raises:
        UserError: none at all, an empty or unreadable one, a file that is missing or not UTF-8.
    """
    prompts = list(text)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} is empty; say what to draw")
    if file is not None:
        prompts += _lines(file)
    if not prompts:
        raise UserError('no prompts given; write at least one, such as "a photo of a daisy", or --labels')
    for prompt in prompts:
        if len(prompt) > MOST_CHARACTERS:
            raise UserError(f"a prompt has {len(prompt):,} characters; the most is {MOST_CHARACTERS:,}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {prompt!r:.80} is not valid UTF-8 text") from error
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read prompts {file}: {error.strerror}") from error
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"prompts {file}: line {line} is not UTF-8; save the file as UTF-8") from error
    if not any(lines):
        raise UserError(f"prompts {file}: no prompt in it; write one a line")
    return [line for line in lines if line]


def sampling(options: GenerateOptions) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """`top_k` and `top_p` of each pass, from the three options that decide them.

    Raises:
        UserError: they contradict each other, or one of them has no numbers.
    """
    for name, numbers in (("--top-k", options.top_k), ("--top-p", options.top_p)):
        if numbers == ():
            raise UserError(f"{name} has no numbers; give one a pass, or leave it out")
    given = {
        "--steps-per-scale": options.steps_per_scale,
        "--top-k": None if options.top_k is None else len(options.top_k),
        "--top-p": None if options.top_p is None else len(options.top_p),
    }
    passes = {name: count for name, count in given.items() if count is not None}
    if len(set(passes.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in passes.items())
        raise UserError(f"these say different numbers of passes: {said}; give one number a pass in each")
    known = LABEL_STEPS if options.labels else STEPS
    steps = next(iter(passes.values()), 1 if options.labels else 3)
    if steps < 1:
        raise UserError(f"--steps-per-scale must be at least 1, got {steps}")
    if steps not in known and (options.top_k is None or options.top_p is None):
        raise UserError(f"{steps} passes a scale need both --top-k and --top-p, {steps} numbers each")
    top_k, top_p = known.get(steps, ((), ()))
    return options.top_k or top_k, options.top_p or top_p
