"""What a training run of the tokenizer is made of, as plain values.

A recipe is a tree of frozen dataclasses. It holds no model object, so that `tokenflow train tokenizer RECIPE
--help` loads neither torch nor transformers, and every leaf is an option of the command line (`--optimizer.lr
3e-4`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from tokenflow.errors import UserError
from tokenflow.training.loss_config import LossConfig

EVERY = ("checkpoint_every", "log_every", "eval_every", "sample_every")
_COUNTS = ("steps", "batch_size", "accumulation", "eval_rows", "max_length", *EVERY)
_AMOUNTS = ("lr", "weight_decay", "max_minutes", "rank", "keep", "num_workers")
# Each condition is false for NaN.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (_COUNTS, lambda value: value >= 1, "at least 1"),
    (_AMOUNTS, lambda value: 0 <= value < inf, "finite and at least 0"),
    (("epochs", "alpha"), lambda value: 0 < value < inf, "finite and above 0"),
    (("clip",), lambda value: value > 0, "above 0"),
    (("warmup",), lambda value: 0 <= value <= 1, "from 0 to 1"),
    (("seed",), lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"),  # NumPy's
)


def check_numbers(recipe: Any) -> None:
    """Raise a UserError where a number in a part of a recipe is one that training would stumble over."""
    for names, fits, must_be in _RANGES:
        for name in names:
            value = getattr(recipe, name, None)
            if value is not None and not fits(value):
                raise UserError(f"{name}={value} must be {must_be}")


@dataclass(frozen=True)
class ModelRecipe:
    """Which tokenizer to build, and from which weights."""

    preset: str = "tokenflow-tiny"
    """a preset of TokenFlowConfig, or a folder with a config.json of your own"""
    codebook_size: int | None = None
    """K, if not the preset's"""
    scales: tuple[int, ...] | None = None
    """grid sides, if not the preset's; one entry is plain single-scale quantization"""
    flows: tuple[str, ...] | None = None
    """keep only these flows of the preset"""
    decoder_flows: tuple[str, ...] | None = None
    """flows that the pixel decoder reads, if not the preset's"""
    scale_drop: float | None = None
    """probability that a step skips one scale, if not the preset's"""
    entropy_weight: float | None = None
    """of the entropy loss, if not the preset's"""
    codebook_init: Literal["uniform", "kmeans"] | None = None
    """where codes start, if not as the preset says; kmeans: centres of the first batch"""
    codebook_update: Literal["gradient", "ema"] | None = None
    """how codes learn, if not as the preset says"""
    restart_dead_codes: bool | None = None
    """move unused codes to where vectors are, if not as the preset says"""
    prefix_decoding: float | None = None
    """share of images decoded from a random prefix of the scales, if not the preset's"""

    teacher: str | None = None
    """transformers folder or hub name of the frozen teacher; needed where the semantic loss has a weight"""
    semantic_init: bool = True
    """start the semantic encoder from the teacher's weights (row 4 of Tab. 5)"""
    init_from: str | None = None
    """start from these weights: a model folder, a bundled name or a hub name"""
    init_except: tuple[str, ...] = ()
    """prefixes of parameters that `init_from` need not give: they start fresh"""
    trainable: Literal["all", "decoder"] = "all"
    """"decoder" trains the pixel decoder's network alone; codes and indices stay as they are"""


@dataclass(frozen=True)
class DataRecipe:
    """Where images come from. Sides come from the model's configuration."""

    sources: tuple[str, ...] = ()
    """folders, parquet or tar files, hub names; PATH@WEIGHT mixes by weight (default 1)"""
    sample_sources: tuple[str, ...] = ()
    """where the pictures of the sample sheets come from; empty: from `sources`"""
    batch_size: int = 256
    """images of one optimizer step, over all processes and accumulated parts"""
    accumulation: int = 1
    """parts that a process splits its share of a batch into, to save memory"""
    num_workers: int = 1
    """processes that decode images, for each training process; 0 decodes in the training process"""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class OptimizerRecipe:
    """Tab. 11 and the released code: Adam, constant rate, no weight decay."""

    lr: float = 1e-4
    """the full learning rate, after warm-up"""
    muon_lr: float | None = None
    """Muon instead of Adam for linear layers and convolutions, at this full rate (in Adam's units)"""
    discriminator_lr: float | None = None
    """None: as `lr`"""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's"""
    weight_decay: float = 0.0
    """AdamW's"""
    clip: float = 1.0
    """largest gradient norm, of the tokenizer and of the discriminator each"""
    schedule: Literal["constant", "cosine", "cosine-minutes"] = "constant"
    """of the learning rate after warm-up; a cosine ends at the last of `steps`, or after `max_minutes`"""
    warmup_steps: int = 0
    """steps over which the rate rises to `lr`"""
    final_lr: float = 0.0
    """where the cosine ends, as a share of `lr`"""
    ema_decay: float = 0.9999
    """of the exported weights; the decay rises to this value over the first steps. 0: no average"""


@dataclass(frozen=True)
class TrainRecipe:
    """A training run of the tokenizer."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    loss: LossConfig = field(default_factory=LossConfig)

    output_dir: str = "runs/tokenizer"
    """checkpoints, logs, samples, exported model; a run goes on from the newest checkpoint here"""
    steps: int = 100_000
    """optimizer steps in all; a finished run goes on if this is raised"""
    max_minutes: float | None = None
    """stop this invocation, with a checkpoint, after so many minutes; start it again to go on, unless
    optimizer.schedule is "cosine-minutes": then the whole run ends here"""
    seed: int = 0
    """of weights, data order, crops and scale drop"""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """encoders and decoders under autocast; quantizer, losses and weights are float32 in any case"""
    channels_last: bool = False
    """memory format of the pixel networks: faster at full resolution, slower with a pixel-unshuffle stem"""
    compile: bool = False
    """torch.compile the pixel networks"""
    checkpoint_every: int = 1000
    """steps; there is one at the end of each invocation, too"""
    keep: int = 2
    """newest checkpoints to keep"""
    log_every: int = 50
    """steps from log line to log line; a line holds their means"""
    sample_every: int = 1000
    """steps from one sheet of reconstructions to the next"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """accelerate's trackers; log.jsonl is written in any case"""
    max_bad_steps: int = 20
    """give up after so many steps in a row with a gradient that is not finite"""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.optimizer.schedule == "cosine-minutes" and not self.max_minutes:
            raise UserError('optimizer.schedule="cosine-minutes" needs max_minutes, where the cosine ends')
