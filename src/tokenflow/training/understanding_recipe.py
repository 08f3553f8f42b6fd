"""What teaching a language model to look at images is made of, as plain values.

Reading these imports neither torch nor transformers, so that every `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenflow.errors import UserError
from tokenflow.names import unknown_name
from tokenflow.training.recipe import check_numbers

TRACKERS = (
    *("all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow"),
    *("mlflow", "neptune", "none", "swanlab", "tensorboard", "trackio", "wandb"),
)
"""what the Trainer's `report_to` can name"""


@dataclass(frozen=True)
class ChatModelRecipe:
    """What the model is put together from."""

    tower: str = "tokenflow-tiny"
    """the tokenizer, frozen: a bundled name, a folder or a hub name; or an ordinary vision model (Tab. 9)"""
    feature_strategy: Literal["last", "last-semantic", "last-pixel", "all", "all-residual"] = "last"
    """which features of a tokenizer the language model sees (Tab. 8)"""
    language_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """folder or hub name; with `package`, a GGUF file in it"""
    template: Literal["plain", "qwen_2_5", "smollm2", "vicuna_v1"] = "smollm2"
    """the conversation template that the language model knows"""
    package: str | None = None
    """Python package that holds the GGUF file"""
    requirement: str | None = None
    """how pip calls that package"""


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank updates of the language model in stage instruct, by peft, in place of its own weights."""

    rank: int = 0
    """0: none, the language model itself learns"""
    alpha: float = 32.0
    """the update is alpha / rank times the product of its two matrices"""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """linear layers that get one"""
    lr: float = 2e-4
    """their full learning rate"""
    keep: float = 0.0
    """conversations without a picture: times this, the divergence from the language model's own words before
    training (KL) is their loss, so that it keeps what it knows; 0: their answers are learned like others"""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class WordAlignmentRecipe:
    """Before stage align, without the language model: pictures are pulled to the words of their answers."""

    steps: int = 0
    """optimizer steps; 0: none, the projector starts random as in the paper"""
    lr: float = 3e-3
    """the full learning rate"""
    batch_size: int = 256
    """pictures of a step, which are told apart"""

    def __post_init__(self) -> None:
        if self.steps:
            check_numbers(self)


@dataclass(frozen=True)
class StageRecipe:
    """One of the two stages: what is read, how it is written out, how fast is learned."""

    sources: tuple[str, ...] = ()
    """conversations: LLaVA's .json or .jsonl, parquet, hub names; PATH@2 reads each row twice an epoch"""
    eval_sources: tuple[str, ...] = ()
    """conversations that the loss is measured on; none: no evaluation"""
    image_folder: str | None = None
    """where file names of images start; by default the folder of each source"""
    template: Literal["plain", "qwen_2_5", "smollm2", "vicuna_v1"] | None = None
    """the conversation template while training; by default the model's"""
    labels: Literal["answers", "released"] = "answers"
    """"answers": each answer and its end token. "released": as the released code, role marks too (ChatML)"""
    resize_mode: Literal["pad", "squash", "crop"] = "pad"
    """how a picture becomes square"""
    patch_dropout: float = 0.0
    """share of each picture's features, drawn anew every time, that training leaves out: steps are shorter,
    so more pictures are seen in the same time; set it to 0 for the last steps"""
    lr: float = 1e-3
    """the full learning rate of projector and, without LoRA, language model"""
    batch_size: int = 256
    """conversations of one optimizer step, over all processes and accumulated parts"""
    accumulation: int = 1
    """parts that a process splits its share of a batch into, to save memory"""
    epochs: float = 1.0
    """how often all sources are read"""
    steps: int | None = None
    """optimizer steps in all, instead of `epochs`"""

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"patch_dropout={self.patch_dropout} must be at least 0 and below 1")

    def features_kept(self, count: int) -> int:
        """How many of a picture's `count` features training shows: at least one."""
        return max(1, round(count * (1 - self.patch_dropout)))


@dataclass(frozen=True)
class UnderstandingRecipe:
    """Two stages of training (Sec. 3.4): the projector alone, then projector and language model."""

    stage: Literal["align", "instruct"] = "align"
    """align: the projector alone. instruct: projector and language model, from what align exported"""
    model: ChatModelRecipe = field(default_factory=ChatModelRecipe)
    align: StageRecipe = field(default_factory=lambda: StageRecipe(template="plain", resize_mode="squash"))
    instruct: StageRecipe = field(default_factory=lambda: StageRecipe(lr=2e-5, batch_size=128))
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    words: WordAlignmentRecipe = field(default_factory=WordAlignmentRecipe)

    output_dir: str = "runs/understanding"
    """OUTPUT/STAGE gets checkpoints, log and export; a stage goes on from its newest checkpoint there"""
    init_from: str | None = None
    """folder to start from, projector and LoRA or a whole model; by default a new projector in align,
    OUTPUT/align/export in instruct"""
    export: Literal["parts", "whole"] = "whole"
    """of stage instruct. "whole": for LlavaForConditionalGeneration. "parts": projector and LoRA alone"""
    cache: str | None = None
    """folder to keep the frozen tower's output in, so that each image is encoded once; none: every time"""
    max_length: int = 2048
    """tokens of a conversation, image features included; longer ones are cut"""
    max_minutes: float | None = None
    """stop this invocation, with a checkpoint, after so many minutes; start it again to go on"""
    seed: int = 0
    """of projector, LoRA and data order"""
    warmup: float = 0.03
    """share of the steps over which the rate rises; then it falls as a cosine"""
    weight_decay: float = 0.0
    """of matrices"""
    clip: float = 1.0
    """largest gradient norm"""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """bf16: autocast, what learns stays float32, what does not learn is kept in bfloat16"""
    gradient_checkpointing: bool = False
    """compute the layers again in the backward pass, to save memory"""
    compile: bool = False
    """torch.compile"""
    num_workers: int = 0
    """processes that read conversations, for each training process"""
    fsdp_config: str | None = None
    """JSON file for the Trainer's `fsdp_config`: shard the model over processes (FSDP2)"""
    deepspeed: str | None = None
    """JSON file for the Trainer's `deepspeed`"""
    checkpoint_every: int = 500
    """steps; there is one at the end of each invocation, too"""
    keep: int = 2
    """newest checkpoints to keep, at least 2"""
    log_every: int = 10
    """steps from log line to log line; a line holds their means"""
    eval_every: int = 500
    """steps from one measurement of the loss on `eval_sources` to the next"""
    eval_rows: int = 512
    """conversations of `eval_sources` that are measured"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """the Trainer's `report_to`; log.jsonl is written in any case"""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in self.trackers:
            if name not in TRACKERS:
                raise unknown_name("tracker", name, TRACKERS)

    @property
    def of_stage(self) -> StageRecipe:
        """The values of the stage at hand."""
        return self.align if self.stage == "align" else self.instruct

    @property
    def folder(self) -> str:
        """Where the stage at hand writes to."""
        return f"{self.output_dir}/{self.stage}"
