"""The demo's pictures from text: several prompts, several seeds, and one picture growing scale by scale."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from tqdm import tqdm

from tokenflow.bundled import bundled_names
from tokenflow.drawing import load_pipeline

if TYPE_CHECKING:
    from tokenflow.generation.pictures import ImagePipelineOutput
    from tokenflow.generation.pipeline import TextToImagePipeline

BUNDLED = "tokenflow-tiny-t2i"
# From what the bundled model was trained on: flowers first, the narrowest domain.
PROMPTS = (
    "a photo of a sunflower",
    "a rose",
    "a photo of a passion flower",
    "a photo of a goldfish",
    "a photo of a lakeside",
    "two dogs play in the snow",
)
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Gallery:
    """Attributes:
    pictures: a list of pictures a prompt, one for each seed.
    stages: the first picture of the first prompt, decoded after 1, 2, ... of the `scales`.
    seconds: to draw one picture, on average.
    """

    model: str
    prompts: list[str]
    seeds: list[int]
    pictures: list[list[Image.Image]]
    stages: list[Image.Image]
    scales: list[int]
    seconds: float


def bundled_gallery(device: str = "auto") -> Gallery | None:
    """The gallery of the bundled text-to-image model; None while the package has none."""
    return draw_gallery(BUNDLED, device=device) if BUNDLED in bundled_names() else None


def draw_gallery(
    model: str, prompts: Sequence[str] = PROMPTS, seeds: Sequence[int] = SEEDS, device: str = "auto"
) -> Gallery:
    """Draw every prompt from every seed.

    Raises:
        UserError: the model cannot be loaded.
    """
    pipe = load_pipeline(model, device=device)
    pictures: list[list[Image.Image]] = []
    stages: list[Image.Image] = []
    started = time.perf_counter()
    for prompt in tqdm(prompts, desc="gallery", unit="prompt", disable=None):
        drawn = pipe([prompt] * len(seeds), seed=list(seeds))
        pictures.append(drawn.images)
        stages = stages or growing(pipe, drawn)
    seconds = (time.perf_counter() - started) / (len(prompts) * len(seeds))
    scales = list(pipe.model.config.scales)
    return Gallery(model, list(prompts), list(seeds), pictures, stages, scales, seconds)


def growing(pipe: TextToImagePipeline, drawn: ImagePipelineOutput) -> list[Image.Image]:
    """The first of some pictures, decoded from its first 1, 2, ... scales."""
    codes, stages = drawn.codes[:1], []
    for k in range(1, len(pipe.model.config.scales)):
        stages += pipe.decode(codes[:, : sum(side * side for side in pipe.model.config.scales[:k])])
    return [*stages, drawn.images[0]]
