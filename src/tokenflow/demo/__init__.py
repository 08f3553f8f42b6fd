"""What `tokenflow demo` shows: a few photographs as tokens, rebuilt scale by scale, what the tokens know,
answers to questions about the photographs, and pictures drawn from text.

`run_demo` computes; `page.py` writes the HTML page and `sheet.py` the picture.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokenflow.bundled import resolve
from tokenflow.codec import Loaded, check_writable, image_paths, load
from tokenflow.data.images import read_image
from tokenflow.demo.answers import Answers, answer_questions, bundled_answers
from tokenflow.demo.gallery import Gallery, bundled_gallery, draw_gallery
from tokenflow.evaluation.reconstruction import psnr, to_uint8
from tokenflow.evaluation.semantics import read_class_embeddings

if TYPE_CHECKING:
    from os import PathLike

SAMPLES = Path(__file__).parent / "samples"
CLASS_EMBEDDINGS = "class_embeddings.safetensors"


@dataclass(frozen=True)
class Shown:
    """One photograph and what became of it.

    Attributes:
        name: of the file.
        original: the square that the model sees.
        stages: decoded from the first 1, 2, ... scales; the last is the reconstruction.
        tokens: the indices of each scale, row-major.
        psnr: of the reconstruction, dB.
        nearest: class names with the cosine of the picture's semantic features and the name's text embedding,
            best first; empty where the model has no class embeddings.
    """

    name: str
    original: Image.Image
    stages: list[Image.Image]
    tokens: list[list[int]]
    psnr: float
    nearest: list[tuple[str, float]]


@dataclass(frozen=True)
class Demonstration:
    """All that page and sheet show.

    Attributes:
        colours: an RGB colour for each code, `[K, 3]` uint8.
        class_count: how many class names the nearest ones were chosen from.
        two_meanings: the model has semantic and pixel flows.
        seconds: to encode and decode one picture, the median.
        answers: to questions about the photographs; what to install for them; None where there is no model.
        gallery: pictures from text; None where there is no model for that.
    """

    shown: list[Shown]
    model: str
    image_size: int
    codebook_size: int
    scales: list[int]
    colours: Tensor
    class_count: int
    two_meanings: bool
    seconds: float
    answers: Answers | str | None = None
    gallery: Gallery | None = None

    @property
    def token_count(self) -> int:
        """Tokens of one picture."""
        return sum(side * side for side in self.scales)


def run_demo(
    output: str | PathLike[str] = "demo-output",
    *,
    images: Sequence[str | PathLike[str]] = (),
    model: str = "tokenflow-tiny",
    chat: str | None = None,
    text_to_image: str | None = None,
    device: str = "auto",
) -> tuple[Path, Path]:
    """Write `index.html` (self-contained) and `demo.png` into the folder `output`; return their paths.

    Args:
        images: files or folders; by default the sample photographs that ship with the package.
        chat: the model that answers questions; by default the bundled one, if there is one.
        text_to_image: the model of the gallery; by default the bundled one, if there is one.

    Raises:
        UserError: a picture or the model cannot be read, or the output cannot be written.
    """
    from tokenflow.demo.page import write_page
    from tokenflow.demo.sheet import write_sheet

    page, sheet = Path(output) / "index.html", Path(output) / "demo.png"
    check_writable(page)
    paths = image_paths(images or sorted(SAMPLES.glob("*.jpg")))
    found = demonstrate(paths, load(model, device=device))
    said = bundled_answers(paths, device) if chat is None else answer_questions(chat, paths, device=device)
    drawn = bundled_gallery(device) if text_to_image is None else draw_gallery(text_to_image, device=device)
    found = replace(found, answers=said, gallery=drawn)
    write_sheet(found, sheet)
    write_page(found, page)
    return page, sheet


@torch.inference_mode()
def demonstrate(paths: Sequence[Path], loaded: Loaded, best: int = 5) -> Demonstration:
    """Encode and decode each picture at every number of scales, and name the `best` nearest classes."""
    model, config = loaded.model, loaded.model.config
    classes, names = _class_embeddings(loaded)
    shown, seconds = [], []
    for path in tqdm(paths, desc="demo", unit="photo", disable=None):
        pixels = loaded.pixels([read_image(path)])
        started = time.perf_counter()
        indices = model.encode(pixels).indices
        decoded = model.decode_indices(indices)
        seconds.append(time.perf_counter() - started)
        prefixes = [model.quantized_from_indices(indices, k) for k in range(1, len(config.scales))]
        stages = [model.decode_pixels(prefix) for prefix in prefixes] + [cast(Tensor, decoded.pixel_values)]
        nearest = []
        if names and decoded.semantic is not None:
            feature = F.normalize(decoded.semantic.float().mean(1), dim=-1)
            cosines, order = (feature @ classes.T).squeeze(0).topk(min(best, len(names)))
            nearest = [(names[i], float(c)) for i, c in zip(order.tolist(), cosines.tolist(), strict=True)]
        parts = indices[0].cpu().split([side * side for side in config.scales])
        shown.append(
            Shown(
                name=path.stem,
                original=loaded.processor.postprocess(pixels)[0],
                stages=loaded.processor.postprocess(torch.cat(stages)),
                tokens=[part.tolist() for part in parts],
                psnr=float(psnr(to_uint8(pixels), to_uint8(stages[-1]))),
                nearest=nearest,
            )
        )
    return Demonstration(
        shown=shown,
        model=loaded.name,
        image_size=config.image_size,
        codebook_size=config.codebook_size,
        scales=list(config.scales),
        colours=code_colours(model.quantizer.quantizer.codes()),
        class_count=len(names),
        two_meanings={flow.kind for flow in config.flow_specs} == {"semantic", "pixel"},
        seconds=median(seconds),  # the first picture also warms up
    )


def code_colours(codes: Tensor) -> Tensor:
    """A colour for each code, `[K, D]` to `[K, 3]` uint8: codes that are alike get colours that are alike.

    The three directions in which the codes vary most are red, green and blue; each is spread evenly by rank.
    """
    centred = codes.double().cpu() - codes.double().cpu().mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    main = directions[:, -3:].flip(1)
    main = main * main.sum(0).sign()  # eigenvectors have no sign of their own
    ranks = (centred @ main).argsort(0).argsort(0)
    return (40 + 200 * ranks.double() / max(len(codes) - 1, 1)).to(torch.uint8)


def _class_embeddings(loaded: Loaded) -> tuple[Tensor, list[str]]:
    file = Path(resolve(loaded.name)) / CLASS_EMBEDDINGS
    if not file.exists():
        return torch.empty(0), []
    embeddings, names = read_class_embeddings(file)
    return F.normalize(embeddings, dim=-1).to(loaded.model.device), names
