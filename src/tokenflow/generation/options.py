"""What `tokenflow generate` can be asked for: plain values, so that `--help` imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class GenerateOptions:
    """Draw pictures from text: one PNG each and grid.png in a folder.

    Each PNG says in its metadata how it was made; `--from IMAGE.png` makes it again.

    Example: `tokenflow generate "a photo of a daisy" "two dogs on a beach" -o pictures --num-images 4`
    """

    output: Annotated[Path, arg(aliases=["-o"])]
    """The folder for the pictures."""
    text: Positional[Annotated[tuple[str, ...], arg(metavar="PROMPT ...")]] = ()
    """What to draw. Only the beginning of a very long prompt is read; a warning says where it was cut."""
    prompts: Path | None = None
    """A UTF-8 text file with further prompts, one a line; empty lines do not count."""
    model: Annotated[str, arg(aliases=["-m"])] = "tokenflow-tiny-t2i"
    """A bundled name, a folder, or a hub name."""
    num_images: int = 1
    """Pictures for each prompt; picture i is made from seed + i."""
    seed: int = 0
    """Same seed, same picture, whatever else is drawn beside it."""
    guidance_scale: float = 7.5
    """How closely to follow the prompt; 0 is twice as fast and follows it least."""
    steps_per_scale: int | None = None
    """Sampling passes at each scale after the first, by default 3 (1 to 3; more with --top-k and --top-p)."""
    top_k: tuple[int, ...] | None = None
    """How many codes to choose from, one number a pass, by default 1200 100 1; 0 is all."""
    top_p: tuple[float, ...] | None = None
    """The probability they must share, one number a pass, by default 0.8 0.8 0; 0 is all."""
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
