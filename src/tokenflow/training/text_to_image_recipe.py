"""What tokenizing a data set and training a generator are made of, as plain values.

Reading these imports neither torch nor transformers, so that every `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class TokenizeOptions:
    """Turn data sets of images into token shards to train on. Started again, it goes on where it stopped.

    Example: `tokenflow tokenize PACKS/flickr8k PACKS/flowers102 -o tokens`, then `... --split val -o tokens`
    """

    data: Positional[Annotated[tuple[str, ...], arg(metavar="DATASET ...")]]
    """Folders of images, parquet files, webdataset shards or hub names, as for training a tokenizer."""
    output: Annotated[Path, arg(aliases=["-o"])]
    """The folder for the shards: OUTPUT/DATASET/SPLIT-00000-of-00006.parquet ..."""
    model: Annotated[str, arg(aliases=["-m"])] = "tokenflow-tiny"
    """The tokenizer: a bundled name, a folder, or a hub name."""
    split: str = "train"
    """Which split of folders and hub names."""
    streaming: bool = False
    """Read in order, one shard a file, instead of by random access (which needs a local copy)."""
    crops: int = 0
    """Random crops of each image beside its centre crop, each a row of its own: more data from few images."""
    flip: bool = False
    """Also the mirror image of each crop."""
    seed: int = 0
    """Of the random crops."""
    label_templates: tuple[str, ...] = ("a photo of {a} {name}",)
    """Captions of images that have a class name only; none: leave those without captions."""
    shard_rows: int = 1000
    """Images a shard, unless streaming."""
    batch_size: int = 32
    """Crops at a time."""
    num_workers: int = 0
    """Processes, each with a tokenizer of its own; 0 works in this one. Changes no result."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    ray: bool = False
    """Spread the shards over a Ray cluster (or this machine) by Ray Data, --num-workers actors."""
