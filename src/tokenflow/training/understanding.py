"""Teaching a language model to look at images (Sec. 3.4): the work of `tokenflow train understanding`.

What is notable:
- the model is transformers' own LLaVA and the loop its Trainer; ours are what learns in which stage, the data
  (`understanding_data`), and the callbacks that all our runs share;
- the head reads only the positions before a label: the logits of all others are never made;
- the loss is the mean over all labels of an optimizer step, whatever the parts that a step is made in;
- conversations without a picture can hold the language model to what it knew: to its words without LoRA;
- with a cache the vision tower runs once a picture, not once a step, and for no picture that the steps leave
  out; what does not learn is in bfloat16;
- a step leaves out what it need not compute (`shorter_steps`); measurements show all of each picture;
- a run started again goes on from its newest complete checkpoint and sees the batches that would have come.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tokenflow.errors import UserError
from tokenflow.files import write_error
from tokenflow.training import checkpointing
from tokenflow.training.callbacks import (
    Checkpoints,
    Reports,
    Stopping,
    latest_checkpoint,
    signals_left_to_the_parent,
)
from tokenflow.training.progress import StopRequest, recipe_changes
from tokenflow.training.sharding import (
    check_deepspeed,
    check_sharding,
    name_layers,
    recomputing_options,
    sharding_options,
    whole_weights,
)
from tokenflow.training.shorter_steps import can_share, drop_patches, learned_logits, shared_beginning
from tokenflow.training.tower_cache import CachedTower, TowerBeside, TowerCache
from tokenflow.training.understanding_data import (
    IGNORE,
    ConversationCollator,
    ConversationEncoder,
    ConversationRows,
    GroupedOrder,
    PicturePixels,
    open_conversations,
)
from tokenflow.training.understanding_models import Chat, build_chat, without_lora
from tokenflow.training.understanding_recipe import UnderstandingRecipe
from tokenflow.training.word_alignment import align_to_words, word_rows

logger = logging.getLogger(__name__)

_SHOWN = {"loss": "loss", "conversations_per_second": "conv/s", "eval_loss": "eval"}  # beside the bar
_WEIGHTS = "learned.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """Attributes:
    step: optimizer steps done, over all invocations.
    stopped_by: "steps", "max_minutes", "SIGINT" or "SIGTERM".
    export: a folder for `tokenflow.understanding.load`.
    skipped: conversations found unusable so far; `skipped.txt` in the run's folder names them.
    """

    step: int
    stopped_by: str
    export: Path
    skipped: int


class Skipped:
    """The file that names unusable conversations, one line each; all processes write to it."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def lines(self) -> set[str]:
        return set(self.path.read_text(encoding="utf-8").splitlines()) if self.path.exists() else set()

    def add(self, lines: list[str]) -> None:
        if lines:
            before = self.lines
            new = [line for line in dict.fromkeys(lines) if line not in before]
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in new))


def train_understanding(recipe: UnderstandingRecipe) -> TrainResult:
    """Train one stage by a recipe; goes on from the newest checkpoint in the stage's folder.

    Raises:
        UserError: no sources, nothing to start from, a model that cannot be loaded, no usable conversation, a
            place that cannot be written to.
    """
    folder, stage = Path(recipe.folder), recipe.of_stage
    if not stage.sources:
        raise UserError(f"training needs conversations: give --{recipe.stage}.sources")
    arguments = training_arguments(recipe)  # joins the other processes, if there are any
    chat = build_chat(recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    skipped = Skipped(folder / "skipped.txt")
    with arguments.main_process_first():  # it fills the cache that the others read
        rows, times = open_rows(recipe, chat, stage.sources, "train")
        an_epoch = GroupedOrder.rows_an_epoch(rows, times, stage.batch_size) // stage.batch_size
        steps = stage.steps or max(1, round(stage.epochs * an_epoch))
        order = GroupedOrder(rows, times, stage.batch_size, steps * stage.batch_size, recipe.seed)
        for_words = word_rows(rows, recipe)
        draw(rows, [*order, *for_words], skipped)
        last = latest_checkpoint(folder)
        if last is not None:
            check_goes_on(recipe)
        if len(for_words) and last is None:
            align_to_words(chat, rows, for_words, recipe, arguments.device)
        eval_rows = None
        if stage.eval_sources:
            eval_rows, _ = open_rows(recipe, chat, stage.eval_sources, "val")
            draw(eval_rows, range(min(recipe.eval_rows, len(eval_rows))), skipped)
    beside = TowerBeside if recipe.cache is None else CachedTower
    chat.model.model.vision_tower = beside(chat.model.model.vision_tower, chat.model.config)
    name_layers(chat.model)
    arguments.max_steps = steps
    arguments.warmup_steps = math.ceil(recipe.warmup * steps)
    trainer = UnderstandingTrainer(recipe, arguments, chat, order, eval_rows, skipped)
    if last is not None and int(last.name.split("-")[1]) >= steps:
        return TrainResult(steps, "steps", folder / "export", len(skipped.lines))
    with StopRequest(recipe.max_minutes) as trainer.stop:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    done = trainer.state.global_step
    return TrainResult(done, trainer.stop.reason or "steps", folder / "export", len(skipped.lines))


def check_goes_on(recipe: UnderstandingRecipe) -> None:
    """Raise a UserError if the stage's folder holds checkpoints of another model or another LoRA."""
    before = checkpointing.load_json(Path(recipe.folder) / "recipe.json")
    other = ("model.", "lora.rank", "lora.alpha", "lora.targets")
    changes = [text for text in recipe_changes(before, asdict(recipe)) if text.startswith(other)]
    if changes:
        raise UserError(
            f"{recipe.folder} was begun otherwise ({', '.join(changes)}); another --output-dir starts anew"
        )


def open_rows(
    recipe: UnderstandingRecipe, chat: Chat, texts: tuple[str, ...], split: str
) -> tuple[ConversationRows, list[float]]:
    """The conversations of sources, and how often each source is read in an epoch."""
    stage, config = recipe.of_stage, chat.model.config
    data, times = open_conversations(texts, split, stage.image_folder)
    features: int = config.image_seq_length
    encoder = ConversationEncoder(
        chat.processor,
        stage.template or recipe.model.template,
        stage.features_kept(features) if split == "train" else features,
        min(recipe.max_length, config.text_config.max_position_embeddings),  # type: ignore[union-attr]
        stage.labels,
    )
    if recipe.cache is None:
        return ConversationRows(data, PicturePixels(data, chat.processor), encoder), times
    return ConversationRows(data, TowerCache(recipe.cache, chat.model, chat.processor), encoder), times


def draw(rows: ConversationRows, order: Iterable[int], skipped: Skipped) -> None:
    """Have the tower look at the rows that will be read, and name those without a usable picture.

    Raises:
        UserError: there is no other.
    """
    rows.drawn = np.unique(list(order))
    if not isinstance(rows.pictures, TowerCache):
        return
    cache, count = rows.pictures, len(rows.drawn)
    cache.encode(rows.data, [(int(rows.sources[place]), int(rows.rows[place])) for place in rows.drawn])
    skipped.add(list(cache.broken.values()))
    if len(cache.broken) == count:
        raise UserError(f"no conversation can be used: see what is wrong with them in {skipped.path}")
    if cache.broken:
        logger.warning(
            "%d of %d conversations have no usable picture: %s", len(cache.broken), count, skipped.path
        )


class UnderstandingTrainer(Trainer):
    """The Trainer for a LLaVA: order of the data, loss, groups of parameters, and what a checkpoint holds."""

    def __init__(
        self,
        recipe: UnderstandingRecipe,
        arguments: TrainingArguments,
        chat: Chat,
        order: GroupedOrder,
        eval_rows: ConversationRows | None,
        skipped: Skipped,
    ):
        self.recipe, self.chat, self.order = recipe, chat, order
        self.eval_rows, self.skipped = eval_rows, skipped
        self.stop = StopRequest(None)
        # Several processes call the model equally often, and layers computed again keep no keys and values.
        alone = arguments.world_size == 1 and not recipe.gradient_checkpointing
        self.shares_beginnings = alone and can_share(chat.model.model.language_model.config)
        pad = chat.processor.tokenizer.pad_token_id
        super().__init__(
            model=chat.model,
            args=arguments,
            data_collator=ConversationCollator(pad),
            train_dataset=order.rows,
            eval_dataset=eval_rows,
            callbacks=[Stopping(self), Checkpoints(self, recipe.folder)],
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided by the labels of the whole step
        check_sharding(self)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if self.is_world_process_zero():
            size, rate = recipe.of_stage.batch_size, "conversations_per_second"
            self.add_callback(Reports(recipe, recipe.folder, size, rate, _SHOWN))  # hears of all others' logs

    def get_train_dataloader(self) -> DataLoader:
        return signals_left_to_the_parent(super().get_train_dataloader())

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedOrder:
        return self.order

    # ---------------------------------------------------------------------------------------------- the loss
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, _ = self._summed_loss(model, inputs)
        # DDP averages over processes what is a sum over all of them here.
        return total / num_items_in_batch * self.accelerator.num_processes

    def _summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """The loss of all labels, added up, and their number: cross entropy, or what `lora.keep` says."""
        inputs = dict(inputs)
        self.skipped.add(inputs.pop("skipped"))
        labels = inputs.pop("labels")
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        seen, pixels, ids = self.chat.model.model, inputs["pixel_values"], inputs["input_ids"]
        pictured = ids == self.chat.model.config.image_token_id
        if pixels is None:
            # No features of a picture: so the projector has gradients, and FSDP's processes keep step.
            width = seen.multi_modal_projector.linear_1.in_features
            inputs["pixel_values"] = torch.zeros(1, 0, width, device=labels.device)
        else:
            features = seen.vision_tower.look(pixels)
            kept = self.recipe.of_stage.features_kept(features.shape[1])
            inputs["pixel_values"] = features
            if model.training and kept < features.shape[1]:
                inputs |= drop_patches(features, kept, pictured)
        inputs |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}  # all that was seen
        learned = targets != IGNORE
        shared = shared_beginning(ids, learned | pictured) if self.shares_beginnings else 0
        logits = learned_logits(model, inputs, learned, shared)
        if pixels is None and self.chat.lora is not None and self.recipe.lora.keep:
            # The KL of the language model's words from those of the untouched one.
            with torch.no_grad(), without_lora(self.chat.model):
                before = learned_logits(model, inputs, learned, shared).log_softmax(-1)
            divergence = F.kl_div(logits.log_softmax(-1), before, reduction="sum", log_target=True)
            return self.recipe.lora.keep * divergence, len(logits)
        total = F.cross_entropy(logits, targets[learned], reduction="sum")
        return total, len(logits)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss of a label, as in training, of the first `eval_rows` conversations."""
        if self.eval_rows is None:
            return {}
        world, rank = self.args.world_size, self.args.process_index
        count = min(self.recipe.eval_rows, len(self.eval_rows)) // world * world
        order = sorted(range(count), key=lambda row: int(self.eval_rows.lengths[row]))[rank::world]  # type: ignore[union-attr]
        batches = DataLoader(
            self.eval_rows,
            batch_size=self.args.per_device_train_batch_size,
            sampler=order,
            collate_fn=self.data_collator,
        )
        summed = torch.zeros(2, dtype=torch.float64)
        model: Any = self.model_wrapped
        model.eval()
        for batch in batches:
            with self.compute_loss_context_manager():
                loss, labels = self._summed_loss(model, self._prepare_inputs(batch))
            summed += torch.tensor([loss.item(), labels])
        model.train()
        summed = self.accelerator.reduce(summed.to(self.args.device), "sum").cpu()
        metrics = {"eval_loss": float(summed[0] / summed[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------ the learning
    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            recipe = self.recipe
            groups: dict[tuple[bool, bool], dict[str, Any]] = {}
            for name, parameter in self.chat.model.named_parameters():
                if parameter.requires_grad:
                    low_rank, matrix = ".lora_" in name, parameter.ndim > 1
                    group = groups.setdefault((low_rank, matrix), {"params": []})
                    group["params"].append(parameter)
                    group["lr"] = recipe.lora.lr if low_rank else recipe.of_stage.lr
                    group["weight_decay"] = recipe.weight_decay if matrix else 0.0
            self.optimizer = torch.optim.AdamW(groups.values(), lr=recipe.of_stage.lr)
        return self.optimizer

    # --------------------------------------------------------------------------------------- the checkpoints
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What learned, and nothing else: the rest is where it came from."""
        if self.args.should_save:
            folder = Path(cast(str, output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            learned = self.chat.learned()
            weights = learned if state_dict is None else {k: state_dict[k] for k in learned}
            tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
            checkpointing.save_tensors(tensors, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # keeps its own
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            file = Path(resume_from_checkpoint) / _WEIGHTS
            try:
                weights = load_file(file)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"cannot read {file}: {error}; delete its folder to go back to an older one"
                ) from error
            self.chat.model.load_state_dict(weights, strict=False)

    def complete_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Write the export into a checkpoint."""
        weights = whole_weights(self)
        if self.args.should_save:
            recipe = self.recipe
            whole = recipe.stage == "instruct" and recipe.export == "whole"
            self.chat.save(folder / "export", weights, whole, recipe.mixed_precision == "bf16")
        return {"skipped": len(self.skipped.lines)}


def training_arguments(recipe: UnderstandingRecipe) -> TrainingArguments:
    """The Trainer's own options for a recipe; the number of steps is set when the data is known."""
    stage, folder = recipe.of_stage, Path(recipe.folder)
    check_deepspeed(recipe.deepspeed)
    keep = recipe.stage == "instruct" and recipe.lora.keep
    if keep and not recipe.lora.rank:
        raise UserError("--lora.keep compares with the language model without its LoRA: set --lora.rank")
    if keep and (recipe.fsdp_config or recipe.deepspeed):
        # A process whose part has pictures would not join in the others' second look at their weights.
        raise UserError("--lora.keep wants whole weights: leave out --fsdp-config and --deepspeed")
    on_cpu = not torch.accelerator.is_available()
    processes = TrainingArguments(str(folder / "checkpoints"), use_cpu=on_cpu, report_to=[]).world_size
    share, rest = divmod(stage.batch_size, processes * stage.accumulation)
    if rest or not share:
        raise UserError(
            f"batch size {stage.batch_size} is no multiple of {processes} processes x "
            f"{stage.accumulation} parts"
        )
    memory = recomputing_options(recipe.gradient_checkpointing)
    memory |= sharding_options(recipe.fsdp_config, processes)
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=1,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=stage.accumulation,
        dataloader_num_workers=recipe.num_workers,
        dataloader_pin_memory=not on_cpu,
        learning_rate=stage.lr,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        lr_scheduler_type="cosine",
        bf16=recipe.mixed_precision == "bf16",
        use_cpu=on_cpu,
        torch_compile=recipe.compile,
        deepspeed=recipe.deepspeed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # would wait for the GPU at every step
        eval_strategy="steps" if stage.eval_sources else "no",
        eval_steps=recipe.eval_every,
        save_steps=recipe.checkpoint_every,
        save_total_limit=max(2, recipe.keep),  # one may be incomplete
        seed=recipe.seed,
        report_to=list(recipe.trackers),
        remove_unused_columns=False,
        **memory,
    )
