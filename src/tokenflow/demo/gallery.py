"""The demo's pictures from text: several prompts, several seeds, and one picture growing scale by scale."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


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
