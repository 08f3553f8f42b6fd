"""What tokenizing a data set and training a generator are made of, as plain values.

Reading these imports neither torch nor transformers, so that every `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from tokenflow.errors import UserError
from tokenflow.training.recipe import check_numbers


def check_shares(recipe: Any, *names: str) -> None:
    """Raise a UserError where a field of a recipe that is a share is not from 0 to 1."""
    for name in names:
        value = getattr(recipe, name)
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value} is a share; it must be from 0 to 1")


@dataclass(frozen=True)
class TokenizeOptions:
    """Which sets become token shards, by which tokenizer, in which crops, and where to."""

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


@dataclass(frozen=True)
class LanguageModelRecipe:
    """Which language model to train, and on whose tokens."""

    tokenizer: str = "tokenflow-tiny"
    """the image tokenizer, frozen: a bundled name, a folder or a hub name"""
    language_model: str | None = None
    """folder or hub name of a language model of Llama's layout to start from; None: a new one, sizes below"""
    init_from: str | None = None
    """go on from a text-to-image model (an export, say) instead"""
    max_text_tokens: int = 128
    """length of the text block; longer captions are cut"""
    text_vocabulary: int = 3072
    """of a new model: entries of its own text tokenizer, learned from the captions"""
    hidden_size: int = 384
    """of a new model"""
    intermediate_size: int = 1024
    """of a new model"""
    layers: int = 6
    """of a new model"""
    heads: int = 6
    """of a new model"""


@dataclass(frozen=True)
class ClassModelRecipe:
    """Which class-conditional model to train, and on whose tokens."""

    tokenizer: str = "tokenflow-tiny"
    """the image tokenizer, frozen: a bundled name, a folder or a hub name"""
    init_from: str | None = None
    """go on from such a model"""
    depth: int = 16
    """layers; the width is 64 times as many"""
    num_classes: int = 1000
    """labels run from 0 to this"""
    class_dropout: float = 0.1
    """share of the labels that are hidden, for classifier-free guidance"""

    def __post_init__(self) -> None:
        check_shares(self, "class_dropout")


@dataclass(frozen=True)
class GenerationData:
    """What to learn from. All sources are token shards, or all are images (then tokenized on the fly)."""

    sources: tuple[str, ...] = ()
    """token shards of `tokenflow tokenize`, or images; PATH@WEIGHT mixes by weight (default 1)"""
    eval_sources: tuple[str, ...] = ()
    """what the bits per token are measured on; none: no evaluation"""
    split: str = "train"
    """of `sources`"""
    eval_split: str = "val"
    """of `eval_sources`"""
    eval_rows: int = 512
    """rows of each of `eval_sources`"""
    batch_size: int = 256
    """images of one optimizer step, over all processes and accumulated parts"""
    accumulation: int = 1
    """parts that a process splits its share of a batch into, to save memory"""
    num_workers: int = 0
    """processes that read rows, for each training process"""
    caption_dropout: float = 0.1
    """share of the captions that become empty, for classifier-free guidance"""
    first_sentence: float = 0.2
    """share of the captions that are cut after their first sentence"""
    label_templates: tuple[str, ...] = ("a photo of {a} {name}",)
    """captions of images (not of token shards) that have a class name only"""
    extra_templates: tuple[str, ...] = ()
    """captions that images and token shards with a class name have beside their own"""
    token_noise: float = 0.0
    """replace up to this share (less than 1) of the codes that the model sees, not of those it learns, by
    random ones"""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_shares(self, "caption_dropout", "first_sentence", "token_noise")
        if self.token_noise == 1:
            raise UserError("token_noise=1 must be less than 1, or the model may see no true code")


@dataclass(frozen=True)
class GenerationOptimizer:
    """The released code: AdamW, constant rate after warm-up."""

    kind: Literal["adamw", "muon"] = "adamw"
    """"muon": Muon for the matrices of the layers, AdamW for the rest"""
    lr: float = 5e-4
    """the full learning rate of AdamW, after warm-up"""
    muon_lr: float = 3e-3
    """the full learning rate of Muon"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's"""
    weight_decay: float = 0.1
    """of matrices and embeddings, not of norms and biases"""
    clip: float = 0.5
    """largest gradient norm"""
    schedule: Literal["constant_with_warmup", "cosine", "linear", "cosine-minutes"] = "constant_with_warmup"
    """of the learning rate after warm-up; all but the constant one end at 0, at the last of `steps` or after
    `max_minutes`"""
    warmup_steps: int = 5000
    """steps over which the rate rises"""
    ema_decay: float = 0.0
    """of the exported weights; the decay rises to this value over the first steps. 0: no average"""


@dataclass(frozen=True)
class GenerationRun:
    """How a generator is trained, whatever it is."""

    data: GenerationData = field(default_factory=GenerationData)
    optimizer: GenerationOptimizer = field(default_factory=GenerationOptimizer)

    output_dir: str = "runs/generator"
    """checkpoints, logs, samples, exported model; a run goes on from the newest checkpoint here"""
    steps: int = 100_000
    """optimizer steps in all; a finished run goes on if this is raised"""
    max_minutes: float | None = None
    """stop this invocation, with a checkpoint, after so many minutes; start it again to go on, unless
    optimizer.schedule is "cosine-minutes": then the whole run ends here"""
    seed: int = 0
    """of weights, data order and captions"""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """autocast; weights are float32 in any case"""
    gradient_checkpointing: bool = False
    """compute the layers again in the backward pass, to save memory"""
    compile: bool = False
    """torch.compile the layers, all by one graph: half a minute first, then fewer passes over memory"""
    fsdp_config: str | None = None
    """JSON file for the Trainer's `fsdp_config`: shard the model over processes (FSDP2)"""
    deepspeed: str | None = None
    """JSON file for the Trainer's `deepspeed`"""
    checkpoint_every: int = 1000
    """steps; there is one at the end of each invocation, too"""
    keep: int = 2
    """newest checkpoints to keep, at least 2"""
    log_every: int = 50
    """steps from log line to log line; a line holds their means"""
    eval_every: int = 1000
    """steps from one measurement of the bits per token to the next"""
    sample_every: int = 1000
    """steps from one sheet of generated pictures to the next"""
    sample_prompts: tuple[str, ...] = ()
    """what the sheets show; none: a few captions of `eval_sources` or `sources` (the first labels)"""
    sample_guidance: float = 7.5
    """guidance scale of the sheets"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """the Trainer's `report_to`; log.jsonl is written in any case"""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.optimizer.schedule == "cosine-minutes" and not self.max_minutes:
            raise UserError('optimizer.schedule="cosine-minutes" needs max_minutes, where the cosine ends')


@dataclass(frozen=True)
class TextToImageRecipe(GenerationRun):
    """A training run of the text-to-image language model (Sec. 3.3)."""

    model: LanguageModelRecipe = field(default_factory=LanguageModelRecipe)
    text_loss: bool = False
    """learn the captions' text, too; the paper learns image tokens only"""
    attention: Literal["auto", "sdpa", "flex_attention"] = "auto"
    """auto: FlexAttention on CUDA where it pays, from 512 positions on; shorter sequences fill a few of its
    blocks of 128, so that it has nothing to skip, and take PyTorch's fused kernel with a mask, as CPUs do"""


@dataclass(frozen=True)
class ClassToImageRecipe(GenerationRun):
    """A training run of the class-conditional transformer (Fig. 6)."""

    model: ClassModelRecipe = field(default_factory=ClassModelRecipe)
