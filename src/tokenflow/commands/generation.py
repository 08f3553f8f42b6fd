"""Text to pictures."""

from __future__ import annotations

from tyro.conf import OmitArgPrefixes

from tokenflow.generation.options import GenerateOptions
from tokenflow.training.text_to_image_recipe import TokenizeOptions


def generate(options: OmitArgPrefixes[GenerateOptions]) -> None:
    """Draw pictures from text."""
    options.check()  # before the seconds that loading takes
    from tokenflow import drawing

    pictures, notes = drawing.generate(options)
    print(*pictures[:10], *(["..."] if len(pictures) > 10 else []), *notes, sep="\n")


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
