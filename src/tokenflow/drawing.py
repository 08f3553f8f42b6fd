"""Prompts or class labels to picture files: the work of `tokenflow generate`.

A picture carries in its PNG metadata how it was made, as JSON under "tokenflow": it can be made again.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from safetensors import SafetensorError
from tqdm import tqdm

from tokenflow import __version__
from tokenflow.codec import check_writable, first_line, place, spare_inputs
from tokenflow.data.contact_sheet import contact_sheet
from tokenflow.data.images import read_image, save_image
from tokenflow.errors import UserError
from tokenflow.generation.options import GUIDANCE, LABEL_GUIDANCE, GenerateOptions, sampling, subjects
from tokenflow.generation.sampler import KnownTokens, SamplingSettings

if TYPE_CHECKING:
    from tokenflow.generation.class_pipeline import ClassToImagePipeline
    from tokenflow.generation.pipeline import TextToImagePipeline

METADATA = "tokenflow"
MOST_SHEET_PIXELS = 50_000_000


@dataclass(frozen=True)
class Drawing:
    """How one picture is made: all that its metadata hold.

    Attributes:
        prompt: empty for a picture from a class label.
        label: the class; None for a picture from a prompt.
        known_codes, known_mask: the codes that were given (variation, in-painting), row-major, scales in
            order; the mask is 1 where a code was given. Both empty for a picture from text alone.
    """

    prompt: str
    seed: int
    model: str
    guidance_scale: float
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]
    temperature: float
    negative_prompt: str | None
    dtype: str
    known_codes: tuple[int, ...] = ()
    known_mask: tuple[int, ...] = ()
    label: int | None = None

    @property
    def subject(self) -> str:
        """What is drawn, in words."""
        return self.prompt if self.label is None else f"label {self.label}"


# metadata
def write_picture(picture: Image.Image, path: Path, drawing: Drawing) -> None:
    """Save a PNG that says how it was made. Raises UserError where it cannot be written."""
    info = PngInfo()
    info.add_itxt("Description", drawing.subject)
    info.add_itxt(METADATA, json.dumps({"version": __version__, **asdict(drawing)}, ensure_ascii=False))
    save_image(picture, path, pnginfo=info, optimize=True)


def read_drawing(path: Path) -> Drawing:
    """How a picture of this command was made; nothing in the file is trusted.

    Raises:
        UserError: no PNG, or one without (sound) metadata.
    """
    read_image(path)  # says what is wrong with a picture that cannot be read
    with Image.open(path) as image:
        image.load()  # text may follow the pixels
        text = image.text.get(METADATA) if isinstance(image, PngImageFile) else None
    if text is None:
        raise UserError(f"{path} does not say how it was made; only PNGs of `tokenflow generate` do")
    try:
        found = json.loads(text)
        numbers = {name: float(found[name]) for name in ("guidance_scale", "temperature")}
        drawing = Drawing(
            prompt=str(found["prompt"]),
            seed=int(found["seed"]),
            model=str(found["model"]),
            top_k=tuple(int(k) for k in found["top_k"]),
            top_p=tuple(float(p) for p in found["top_p"]),
            negative_prompt=None if found["negative_prompt"] is None else str(found["negative_prompt"]),
            dtype=str(found["dtype"]),
            known_codes=tuple(int(code) for code in found["known_codes"]),
            known_mask=tuple(int(bit) for bit in found["known_mask"]),
            label=None if found.get("label") is None else int(found["label"]),
            **numbers,
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: what it says about how it was made is damaged ({error!r:.80})") from error
    if drawing.dtype not in ("float32", "bfloat16") or len(drawing.known_codes) != len(drawing.known_mask):
        raise UserError(f"{path}: what it says about how it was made is damaged")
    return drawing


# drawing
def generate(options: GenerateOptions) -> tuple[list[Path], list[str]]:
    """What `tokenflow generate` does: a PNG each, and grid.png with all of them.

    Returns:
        the paths of the pictures, and what else there is to say, a line each.

    Raises:
        UserError: options that make no sense together, a model or picture that cannot be read, a place that
            cannot be written to, too little memory.
    """
    drawings = wanted(options) if options.from_ is None else [again(options)]
    targets = _targets(options.output, drawings)
    grid = options.output / "grid.png"
    given = (options.from_, options.init_image, options.mask, options.prompts)
    spare_inputs([*targets, grid], [path for path in given if path is not None])
    check_writable(targets[0])
    pipe: Any = _pipeline_for(drawings, options.device)
    if options.compile:
        if pipe.device.type == "cuda":
            pipe.model.capture_passes()
        else:
            pipe.model.compile_passes()
    if options.init_image is not None:
        kept = known_tokens(pipe, options.init_image, options.mask, options.keep_scales)
        drawings = [replace(drawing, known_codes=kept[0], known_mask=kept[1]) for drawing in drawings]
    fits = len(drawings) * pipe.tokenizer.config.image_size**2 <= MOST_SHEET_PIXELS
    pictures: list[Image.Image] = []
    for drawing, target, picture in zip(
        drawings, targets, draw(pipe, drawings, options.batch_size), strict=True
    ):
        write_picture(picture, target, drawing)
        pictures += [picture] if fits else []
    if options.from_ is not None:
        return targets, [_compare(pictures[0], options.from_)]
    if len(drawings) == 1:
        return targets, []
    if not fits:
        return targets, [f"no {grid}: {len(drawings):,} pictures are too many for one sheet"]
    columns = options.num_images
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    captions = [drawing.subject for drawing in drawings[::columns]]
    titles = [f"seed {drawing.seed}" for drawing in drawings[:columns]]
    save_image(contact_sheet(rows, captions, titles), grid, optimize=True)
    return targets, [f"all of them: {grid}"]


@torch.inference_mode()
def draw(
    pipe: TextToImagePipeline | ClassToImagePipeline, drawings: Sequence[Drawing], batch_size: int
) -> Iterator[Image.Image]:
    """The pictures of `drawings`, which share all settings, behind a progress bar.

    Raises:
        UserError: settings that the sampler refuses, or too little memory for a batch.
    """
    scales = len(pipe.model.config.scales)
    first = drawings[0]
    known = None
    if first.known_codes:
        mask = torch.tensor([first.known_mask]).bool()
        known = KnownTokens(torch.tensor([first.known_codes]).to(pipe.device), mask.to(pipe.device))
    with tqdm(total=scales * len(drawings), desc="generate", unit="scale", disable=None) as bar:
        for start in range(0, len(drawings), batch_size):
            batch = drawings[start : start + batch_size]
            what: Any = [drawing.label for drawing in batch]
            how: dict[str, Any] = {}
            if first.label is None:
                what = [drawing.prompt for drawing in batch]
                how["negative_prompt"] = first.negative_prompt
            with cuts_were_said():
                found = pipe(
                    what,
                    seed=[drawing.seed for drawing in batch],
                    guidance_scale=first.guidance_scale,
                    top_k=first.top_k,
                    top_p=first.top_p,
                    temperature=first.temperature,
                    known=known,
                    callback=lambda preview: bar.update(len(preview.rows)),
                    **how,
                )
            yield from found.images


def _pipeline_for(drawings: Sequence[Drawing], device: str) -> TextToImagePipeline | ClassToImagePipeline:
    """The pipeline of `drawings`, which share a model, after a look at all prompts or labels."""
    first = drawings[0]
    if first.label is not None:
        classes = load_class_pipeline(first.model, device=device, dtype=first.dtype)
        classes.check_labels([drawing.label for drawing in drawings if drawing.label is not None])
        return classes
    pipe = load_pipeline(first.model, device=device, dtype=first.dtype)
    negative = [first.negative_prompt] if first.negative_prompt else []
    warn_of_cuts(pipe, [*(drawing.prompt for drawing in drawings), *negative])
    return pipe


def load_pipeline(name: str, *, device: str = "auto", dtype: str = "float32") -> TextToImagePipeline:
    """Load a text-to-image model by bundled name, folder or hub name.

    Raises:
        UserError: no such model, another kind of model, damaged files, or no such device.
    """
    from tokenflow.generation.pipeline import TextToImagePipeline

    return _load(TextToImagePipeline, name, device, dtype)


def load_class_pipeline(name: str, *, device: str = "auto", dtype: str = "float32") -> ClassToImagePipeline:
    """The same for a class-conditional model."""
    from tokenflow.generation.class_pipeline import ClassToImagePipeline

    return _load(ClassToImagePipeline, name, device, dtype)


def _load(kind: Any, name: str, device: str, dtype: str) -> Any:
    try:
        pipe = kind.from_pretrained(name, dtype=getattr(torch, dtype))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load model {name}: {first_line(error)}") from error
    place(pipe.model, device, dtype)
    place(pipe.tokenizer, device, dtype)
    return pipe


def known_tokens(
    pipe: TextToImagePipeline | ClassToImagePipeline, image: Path, mask: Path | None, scales: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Codes to keep of a picture and where: outside a mask, or its first scales (by default half of them).

    Raises:
        UserError: both a mask and a number of scales, an unreadable picture, see `generation.editing`.
    """
    if mask is not None and scales is not None:
        raise UserError("--mask and --keep-scales are two ways to start from a picture; give one of them")
    picture = read_image(image)
    if mask is not None:
        known = pipe.keep(picture, repaint=read_image(mask))
    else:
        half = max(1, len(pipe.model.config.scales) // 2)
        known = pipe.keep(picture, scales=half if scales is None else scales)
    given = torch.ones_like(known.codes, dtype=torch.bool) if known.mask is None else known.mask
    return tuple((known.codes * given)[0].tolist()), tuple(given[0].int().tolist())


def warn_of_cuts(pipe: TextToImagePipeline, prompts: Sequence[str]) -> None:
    """Say on stderr, in one line, how many prompts are too long to be read whole."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.encode(list(dict.fromkeys(prompts)))
    for warning in caught:
        print(f"tokenflow: warning: {warning.message}", file=sys.stderr)


@contextmanager
def cuts_were_said() -> Iterator[None]:
    """No more warnings of long prompts inside the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* are cut to ")
        yield


def _compare(picture: Image.Image, path: Path) -> str:
    """Whether a picture is the one in a file."""
    before = read_image(path)
    if before.size == picture.size and before.tobytes() == picture.tobytes():
        return f"the same picture as {path}, pixel by pixel"
    return f"not the same picture as {path}: that one was changed, or drawn by another model or machine"


def wanted(options: GenerateOptions) -> list[Drawing]:
    """The pictures that the options ask for, subject by subject, each from all its seeds.

    Raises:
        UserError: a number out of range, options that contradict each other.
    """
    top_k, top_p = sampling(options)
    shared: dict[str, Any] = {
        "model": options.model,
        "guidance_scale": _guidance(options),
        "top_k": top_k,
        "top_p": top_p,
        "temperature": options.temperature,
        "negative_prompt": options.negative_prompt,
        "dtype": options.dtype,
    }
    # Wrong numbers are said now, not after loading the model.
    SamplingSettings(shared["guidance_scale"], top_k, top_p, shared["temperature"])
    each: list[dict[str, Any]] = [
        {"prompt": "", "label": subject} if isinstance(subject, int) else {"prompt": subject}
        for subject in subjects(options)
    ]
    count = options.num_images
    return [Drawing(**subject, seed=options.seed + i, **shared) for subject in each for i in range(count)]


def _guidance(options: GenerateOptions) -> float:
    if options.guidance_scale is not None:
        return options.guidance_scale
    return LABEL_GUIDANCE if options.labels else GUIDANCE


def again(options: GenerateOptions) -> Drawing:
    """The drawing that `options.from_` holds.

    Raises:
        UserError: no such metadata, or options beside it that it decides itself.
    """
    free = ("output", "from_", "model", "device", "batch_size")
    for field in fields(options):
        if field.name not in free and getattr(options, field.name) != field.default:
            name = "the PROMPT" if field.name == "text" else "--" + field.name.replace("_", "-")
            raise UserError(f"--from takes everything from the picture; leave out {name}")
    assert options.from_ is not None
    drawing = read_drawing(options.from_)
    default = next(field.default for field in fields(options) if field.name == "model")
    return drawing if options.model == default else replace(drawing, model=options.model)


def _targets(folder: Path, drawings: Sequence[Drawing]) -> list[Path]:
    """A PNG path a picture: the subject's words and the seed; equal ones get a number."""
    taken: set[str] = set()
    targets = []
    for drawing in drawings:
        words = re.sub(r"\W+", "-", drawing.subject[:200].lower()).strip("-")
        while len(words.encode()) > 60:  # file systems count bytes
            words = words[:-1]
        stem = name = f"{words.strip('-') or 'picture'}-{drawing.seed}"
        number = 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        targets.append(folder / f"{name}.png")
    return targets
