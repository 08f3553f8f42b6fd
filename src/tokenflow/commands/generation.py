"""Text to pictures."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from tokenflow.generation.options import GenerateOptions
from tokenflow.training.text_to_image_recipe import TokenizeOptions


def generate(options: Annotated[GenerateOptions, arg(name="")]) -> None:
    """Draw pictures from text.

    One PNG each and grid.png in a folder. Each PNG says in its metadata how it was made; `--from IMAGE.png`
    makes it again.

    Example: `tokenflow generate "a photo of a daisy" "two dogs on a beach" -o pictures --num-images 4`
    """
    options.check()  # before the seconds that loading takes
    from tokenflow import drawing

    pictures, notes = drawing.generate(options)
    print(*pictures[:10], *(["..."] if len(pictures) > 10 else []), *notes, sep="\n")


def tokenize(options: Annotated[TokenizeOptions, arg(name="")]) -> None:
    """Turn data sets of images and captions into token shards to train on.

    Started again, it goes on where it stopped.

    Example: `tokenflow tokenize PACKS/flickr8k PACKS/flowers102 -o tokens`, then `... --split val -o tokens`
    """
    from tokenflow.training.tokenization import tokenize as run

    done = run(options)
    for line in done.skipped[:10]:
        print(f"skipped: {line}")
    if len(done.skipped) > 10:
        print(f"skipped: ... and {len(done.skipped) - 10} more")
    print(f"{done.images:,} views of images ({done.new:,} of them new), {len(done.skipped):,} images skipped")
    print(f"token shards: {' '.join(map(str, done.folders))}")
