"""Images to token shards, once for a whole training: the work of `tokenflow tokenize`.

What is notable:
- the unit of work is a shard: a run of rows, or one file of a stream. It is a pure function of its images,
  the tokenizer and the options, so it may be made by any process or machine, in any order;
- a shard is written whole or not at all and finished ones are skipped, so that a killed run started again
  ends with the same bytes;
- `ShardMaker` is the one function that does it: called here, by worker processes, or by Ray Data's actors.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from tokenflow.data.crops import center_crop, random_crop
from tokenflow.data.images import ImageError, read_image
from tokenflow.data.sources import OpenSource, Source, encoded_image, open_source, split_of, stream_rows
from tokenflow.data.token_shards import ShardInfo, captions_of, read_info, shard_path, write_shard
from tokenflow.errors import UserError
from tokenflow.tokenizer.token_file import tokenizer_fingerprint
from tokenflow.training.text_to_image_recipe import TokenizeOptions


class Shard(NamedTuple):
    """One shard to make: piece `number` of `total` of a source, `rows` of them or one file of a stream."""

    source: Source
    path: str
    number: int
    total: int
    rows: int


@dataclass(frozen=True)
class TokenizeResult:
    """What lies in the output folder after a run.

    Attributes:
        images: views tokenized, those of shards that were finished before included.
        new: views tokenized by this run.
        skipped: a line for each image that could not be used.
        folders: one a source.
    """

    images: int
    new: int
    skipped: list[str]
    folders: list[Path]


def tokenize(options: TokenizeOptions) -> TokenizeResult:
    """Make the token shards of the options' data sets; what is finished already stays.

    Raises:
        UserError: a source cannot be opened; the folder holds shards of another tokenizer, other options or
            other images; a place cannot be written to; a worker was killed; a count that makes no sense.
    """
    if not options.data:
        raise UserError("nothing to tokenize; name at least one data set")
    for name, least in (("shard_rows", 1), ("batch_size", 1), ("crops", 0), ("num_workers", 0)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    sources = [Source.parse(text, split=options.split, streaming=options.streaming) for text in options.data]
    shards = [shard for source in sources for shard in _plan(source, sources, options)]
    maker = ShardMaker(options)
    missing = [shard for shard in shards if not _is_finished(shard, maker)]
    for folder in {Path(shard.path).parent for shard in shards}:
        for leftover in folder.glob(f".{split_of(sources[0])}-*.parquet"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    with tqdm(unit="image", desc="tokenize", disable=None, dynamic_ncols=True) as bar:
        if options.ray:
            new = _on_ray(options, missing, bar.update)
        elif options.num_workers > 0 and len(missing) > 1:
            new = _in_processes(options, missing, bar.update)
        else:
            new = sum(maker(shard, bar.update) for shard in missing)
    infos = [read_info(shard.path) for shard in shards]
    return TokenizeResult(
        images=sum(info.made["images"] for info in infos),
        new=new,
        skipped=[line for info in infos for line in info.skipped],
        folders=sorted({Path(shard.path).parent for shard in shards}),
    )


class ShardMaker:
    """Makes shards; holds the tokenizer and the sources opened so far."""

    def __init__(self, options: TokenizeOptions):
        from tokenflow.codec import load

        self.options = options
        self.loaded = load(options.model, device=options.device)
        self.fingerprint = tokenizer_fingerprint(self.loaded.model)
        self._opened: dict[Source, OpenSource] = {}

    def info(self, shard: Shard) -> ShardInfo:
        """The tokenizer and the options that the shard is made with."""
        config, options = self.loaded.model.config, self.options
        made = {"source": str(shard.source), "number": shard.number, "of": shard.total, "rows": shard.rows}
        made |= {"crops": options.crops, "flip": options.flip, "seed": options.seed}
        made |= {"label_templates": list(options.label_templates)}
        return ShardInfo(
            model=options.model,
            fingerprint=self.fingerprint,
            codebook_size=config.codebook_size,
            scales=list(config.scales),
            image_size=config.image_size,
            made=made,
        )

    def content(self, shard: Shard) -> str:
        """Tells the images from others without reading all: how many, and a hash of the first and last.

        Of a stream, whose end is not known before it is read, only the first.
        """
        opened = self._open(shard.source)
        if shard.source.streaming:
            count, ends = "?", list(islice(self._rows(shard), 1))
        else:
            dataset: Any = opened.dataset
            places = self._places(shard)
            count, ends = str(len(places)), [(place, dataset[place]) for place in (places[0], places[-1])]
        digest = hashlib.sha256()
        for place, values in ends:
            digest.update(repr(self._texts(opened, place, values)).encode())
            digest.update(_image_bytes(values[opened.image_column]))
        return f"{count} rows, {digest.hexdigest()[:16]}"

    def __call__(
        self,
        shard: Shard,
        progress: Callable[[int], Any] = lambda images: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> int:
        """Write the shard and return its number of views; nothing is written once `stopped()` says so."""
        info, rows, skipped = self.info(shard), [], []
        values = self._rows(shard)
        views_each = (1 + self.options.crops) * (1 + self.options.flip)
        while batch := list(islice(values, max(1, self.options.batch_size // views_each))):
            if stopped():
                return 0
            made, broken = self.tokens(shard.source, batch)
            rows += made
            skipped += broken
            progress(len(made))
        made_of = {"content": self.content(shard), "images": len(rows)}
        info = replace(info, made=info.made | made_of, skipped=skipped)
        write_shard(shard.path, rows, info)
        return len(rows)

    def tokens(
        self, source: Source, batch: list[tuple[int, dict[str, Any]]]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """A batch of rows, each with its place, to rows of a shard and a line for each broken image."""
        opened = self._open(source)
        pictures: list[Image.Image] = []
        rows: list[dict[str, Any]] = []
        skipped = []
        for place, values in batch:
            name = f"row {place} of {source}"
            try:
                image = read_image(encoded_image(values[opened.image_column], name), name=name)
                views = list(self._views(image, place))
            except ImageError as error:
                skipped.append(str(error))
                continue
            pictures += views
            rows += [self._texts(opened, place, values)] * len(views)
        if not pictures:
            return [], skipped
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        pixels = pixels.permute(0, 3, 1, 2).to(self.loaded.model.device).float() / 127.5 - 1
        with torch.inference_mode():
            codes = self.loaded.model.encode(pixels).indices.cpu().numpy()
        return [{**row, "codes": line} for row, line in zip(rows, codes, strict=True)], skipped

    def _texts(self, opened: OpenSource, place: int, values: dict[str, Any]) -> dict[str, Any]:
        """A row of a shard but for its codes."""
        names, label = opened.label_names(), values.get("label")
        label = label if isinstance(label, int) else None
        if names is not None and label is not None and label >= 0 and not values.get("label_name"):
            values = {**values, "label_name": names[label]}
        return {
            "captions": captions_of(values, self.options.label_templates),
            "label": label,
            "label_name": values.get("label_name"),
            "row": place,
        }

    def _views(self, image: Image.Image, place: int) -> Iterator[Image.Image]:
        """The centre crop and the random crops, each followed by its mirror image if that is wanted."""
        size, options = self.loaded.model.config.image_size, self.options
        for number in range(1 + options.crops):
            rng = random.Random(f"{options.seed} {place} {number}")
            view = center_crop(image, size) if number == 0 else random_crop(image, size, rng)
            yield view
            if options.flip:
                yield ImageOps.mirror(view)

    def _open(self, source: Source) -> OpenSource:
        if source not in self._opened:
            self._opened[source] = open_source(source)
        return self._opened[source]

    def _rows(self, shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
        dataset: Any = self._open(shard.source).dataset
        if shard.source.streaming:
            piece = dataset.shard(shard.total, shard.number)
            yield from enumerate(stream_rows(shard.source, piece))
            return
        for place in self._places(shard):
            yield place, dataset[place]

    def _places(self, shard: Shard) -> range:
        dataset: Any = self._open(shard.source).dataset
        start = shard.number * shard.rows
        return range(start, min(start + shard.rows, len(dataset)))


def _plan(source: Source, sources: list[Source], options: TokenizeOptions) -> Iterator[Shard]:
    """The shards of a source, in its own folder of the output."""
    name = _name(source)
    if sum(_name(other) == name for other in sources) > 1:
        raise UserError(f"two of the data sets are called {name!r}; tokenize them into different folders")
    opened = open_source(source)
    count: int = (
        opened.dataset.num_shards if source.streaming else -(-len(opened.dataset) // options.shard_rows)
    )
    if count == 0:
        raise UserError(f"{source} has no rows")
    rows = 0 if source.streaming else options.shard_rows
    folder, split = Path(options.output) / name, split_of(source)
    paths = [shard_path(folder, split, number, count) for number in range(count)]
    if others := sorted(set(folder.glob(f"{split}-*-of-*.parquet")) - set(paths)):
        raise UserError(
            f"{folder} holds shards that are none of the {count} of this run, such as {others[0].name}; "
            "delete them or choose another --output"
        )
    for number, path in enumerate(paths):
        yield Shard(source, str(path), number, count, rows)


def _name(source: Source) -> str:
    """A folder's or data set's own name; of packs/flickr8k/train.parquet "flickr8k"."""
    path = Path(source.path_or_name.rstrip("/*")).absolute()
    if path.suffix in (".parquet", ".tar") or "*" in path.name:
        stem = path.name.split("-")[0].split(".")[0]
        return path.parent.name if "*" in path.name or stem == split_of(source) else path.stem
    return path.name


def _image_bytes(value: Any) -> bytes:
    """The encoded image of an undecoded column; of one that is elsewhere, its address."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and os.path.isfile(value):
        return Path(value).read_bytes()
    return value if isinstance(value, bytes) else str(value).encode()


def _is_finished(shard: Shard, maker: ShardMaker) -> bool:
    """Whether the shard is there already; a UserError if what is there is something else."""
    if not os.path.exists(shard.path):
        return False
    there, info = read_info(shard.path), maker.info(shard)
    if there.fingerprint != info.fingerprint:
        raise UserError(
            f"{shard.path} was made by tokenizer {there.model!r} (fingerprint {there.fingerprint[:12]}), not "
            f"by {info.model!r} (fingerprint {info.fingerprint[:12]}); choose another --output or delete it"
        )
    for key, value in info.made.items():
        if there.made.get(key) != value:
            raise UserError(
                f"{shard.path} was made with {key} {there.made.get(key)}, not {value}; "
                "choose another --output or delete it"
            )
    content = there.made.get("content")  # older shards do not state it
    if content is not None and content != (now := maker.content(shard)):
        raise UserError(
            f"{shard.path} was made of other images ({content}) than {shard.source} has now ({now}); "
            "choose another --output or delete it"
        )
    return True


# ---------------------------------------------------------------------------------------- several processes
_worker: Any = None  # a worker's maker, counter of views and stop event


def _start_worker(options: TokenizeOptions, counter: Any, stop: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells us when to stop ...
    threading.Thread(target=_leave_with_parent, daemon=True).start()  # ... unless it was killed
    torch.set_num_threads(max(1, torch.get_num_threads() // options.num_workers))
    _worker = (ShardMaker(options), counter, stop)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_worker(shard: Shard) -> int:
    maker, counter, stop = _worker

    def count(views: int) -> None:
        with counter.get_lock():
            counter.value += views

    return maker(shard, count, stop.is_set)


def _in_processes(options: TokenizeOptions, shards: list[Shard], progress: Callable[[int], Any]) -> int:
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in an unknown state
    counter, stop = context.Value("q", 0), context.Event()
    workers, total, shown = min(options.num_workers, len(shards)), 0, 0
    with ProcessPoolExecutor(workers, context, _start_worker, (options, counter, stop)) as pool:
        try:
            pending = {pool.submit(_make_in_worker, shard) for shard in shards}
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                progress(counter.value - shown)
                shown = counter.value
                total += sum(future.result() for future in done)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; finished shards are kept: "
                "start again, with fewer --num-workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return total


# ---------------------------------------------------------------------------------------- several machines
class _RayWorker:
    """A Ray Data actor: a batch of one shard in, its number of views out."""

    def __init__(self, options: TokenizeOptions, shards: list[Shard]):
        self.maker, self.shards = ShardMaker(options), shards

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"images": np.array([self.maker(self.shards[i]) for i in batch["shard"]])}


def _on_ray(options: TokenizeOptions, shards: list[Shard], progress: Callable[[int], Any]) -> int:
    """The same shards by Ray Data: sources and output must be reachable by the same paths everywhere."""
    import ray

    if not shards:
        return 0
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        tasks = ray.data.from_items(
            [{"shard": i} for i in range(len(shards))], override_num_blocks=len(shards)
        )
        made = tasks.map_batches(
            _RayWorker,
            fn_constructor_args=(options, shards),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=max(1, min(options.num_workers, len(shards)))),
            num_gpus=1 if options.device.startswith("cuda") else 0,
        )
        total = 0
        for row in made.iter_rows():
            progress(int(row["images"]))
            total += int(row["images"])
        return total
    finally:
        if started_here:
            with contextlib.suppress(Exception):
                ray.shutdown()
