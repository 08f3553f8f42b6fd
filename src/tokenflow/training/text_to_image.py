"""Training the generators with transformers' Trainer: the work of `tokenflow train text-to-image`.

What is notable:
- the Trainer brings loops, mixed precision, accumulation, DDP, FSDP2 and DeepSpeed; ours are the order of the
  data (`generation_data.Draws`), the loss, the bits per token, and the callbacks below;
- images are tokenized on the fly by the frozen tokenizer, token shards are checked to be of that tokenizer;
- a run started again goes on from its newest complete checkpoint and sees the batches that would have come;
- `OUTPUT/export` always is a folder that `TextToImagePipeline.from_pretrained` loads, with averaged weights.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tokenflow.data.sources import Source
from tokenflow.errors import UserError
from tokenflow.files import write_error
from tokenflow.tokenizer.token_file import tokenizer_fingerprint
from tokenflow.training import checkpointing
from tokenflow.training.averaging import WeightAverage, whole
from tokenflow.training.callbacks import (
    Checkpoints,
    Reports,
    Stopping,
    latest_checkpoint,
    signals_left_to_the_parent,
)
from tokenflow.training.generation_callbacks import Averaging, Samples
from tokenflow.training.generation_data import GenerationRows
from tokenflow.training.generation_models import (
    Generator,
    build_generator,
    check_same_sizes,
    check_same_tokenizer,
    load_image_tokenizer,
)
from tokenflow.training.muon import MuonAdamW, muon_groups
from tokenflow.training.progress import StopRequest, cosine
from tokenflow.training.sharding import (
    check_deepspeed,
    check_sharding,
    recomputing_options,
    sharding_options,
    whole_weights,
)
from tokenflow.training.text_to_image_recipe import ClassToImageRecipe, TextToImageRecipe

Recipe = TextToImageRecipe | ClassToImageRecipe
# Matrices that AdamW learns in any case: the output head, and what reads code vectors.
NOT_MUON = ("head", "visual_proj")
FLEX_FROM = 512  # positions
_SHOWN = {"loss": "loss", "images_per_second": "img/s", "eval_bits_per_token": "bits"}  # beside the bar


@dataclass(frozen=True)
class TrainResult:
    """Attributes:
    step: optimizer steps done, over all invocations.
    stopped_by: "steps", "max_minutes", "SIGINT" or "SIGTERM".
    export: a folder for `TextToImagePipeline.from_pretrained`.
    """

    step: int
    stopped_by: str
    export: Path


def train_text_to_image(recipe: Recipe) -> TrainResult:
    """Train a generator by a recipe; goes on from the newest checkpoint in its output folder.

    Raises:
        UserError: no sources, sources of another tokenizer, a model that cannot be loaded or is not the
            one that the run began with, a place that cannot be written to.
    """
    folder, data = Path(recipe.output_dir), recipe.data
    arguments = training_arguments(recipe)  # joins the other processes, if there are any
    image_tokenizer = load_image_tokenizer(recipe.model.tokenizer)
    fingerprint = tokenizer_fingerprint(image_tokenizer.model)
    last = latest_checkpoint(folder)
    if last is not None:
        check_same_tokenizer(last / "export", fingerprint, recipe.model.tokenizer)
    options = {"image_size": image_tokenizer.model.config.image_size, "seed": recipe.seed}
    train_rows = GenerationRows(
        [Source.parse(text, split=data.split) for text in data.sources],
        train=True,
        caption_dropout=data.caption_dropout,
        first_sentence=data.first_sentence,
        label_templates=data.label_templates,
        extra_templates=data.extra_templates,
        **options,
    )
    eval_rows = None
    if data.eval_sources:
        sources = [Source.parse(text, split=data.eval_split) for text in data.eval_sources]
        eval_rows = GenerationRows(sources, train=False, label_templates=data.label_templates, **options)
    for rows in filter(None, (train_rows, eval_rows)):
        rows.check_tokenizer(fingerprint, recipe.model.tokenizer)
    if recipe.deepspeed and recipe.optimizer.ema_decay:
        raise UserError("weights cannot be averaged under DeepSpeed; set --optimizer.ema-decay 0")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with arguments.main_process_first():  # it writes the text tokenizer that the others read
        generator = build_generator(recipe.model, image_tokenizer, train_rows, folder, recipe.seed)
    if last is not None:
        check_same_sizes(last / "export", generator.model)
    if isinstance(recipe, TextToImageRecipe):
        generator.model.set_attn_implementation(attention_for(recipe, generator.model, arguments.device))
    if recipe.compile:
        compile_layers(generator.model)
    trainer = GenerationTrainer(recipe, arguments, generator, train_rows, eval_rows)
    if last is not None and int(last.name.split("-")[1]) >= recipe.steps:
        return TrainResult(recipe.steps, "steps", folder / "export")
    minutes = recipe.max_minutes
    if minutes is not None and recipe.optimizer.schedule == "cosine-minutes":  # of the whole run
        minutes = max(0.0, minutes - trainer.seconds_before / 60)
    with StopRequest(minutes) as trainer.stop:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return TrainResult(trainer.state.global_step, trainer.stop.reason or "steps", folder / "export")


class GenerationTrainer(Trainer):
    """The Trainer for a generator: data order, loss, optimizer, and bits per token as the evaluation."""

    def __init__(
        self,
        recipe: Recipe,
        arguments: TrainingArguments,
        generator: Generator,
        train_rows: GenerationRows,
        eval_rows: GenerationRows | None,
    ):
        self.recipe, self.generator = recipe, generator
        self.network: Any = generator.model
        self.rows, self.eval_rows = train_rows, eval_rows
        self.stop = StopRequest(None)
        self.average = WeightAverage(generator.model, 0.0)
        self.started, self.seconds_before = time.monotonic(), 0.0
        last = latest_checkpoint(Path(recipe.output_dir))
        if last is not None:
            self.seconds_before = checkpointing.load_json(last / "complete.json").get("seconds", 0.0)
        super().__init__(
            model=generator.model,
            args=arguments,
            data_collator=generator.collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            callbacks=[Averaging(self), Stopping(self), Checkpoints(self, recipe.output_dir), Samples(self)],
        )
        check_sharding(self)
        self.model_accepts_loss_kwargs = False  # the losses are means: accumulation averages them
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if self.is_world_process_zero():
            batch_size = recipe.data.batch_size
            # The last, so that it hears of everything.
            self.add_callback(Reports(recipe, recipe.output_dir, batch_size, "images_per_second", _SHOWN))

    # ---------------------------------------------------------------------------------------------- the data
    def get_train_dataloader(self) -> DataLoader:
        return signals_left_to_the_parent(super().get_train_dataloader())

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.rows.draws(self.recipe.steps * self.recipe.data.batch_size)

    def model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """A batch as the model takes it: images become codes, and some input codes wrong in training."""
        inputs = dict(inputs)
        pixels = inputs.pop("pixels", None)
        if pixels is not None:
            tokenizer: Any = self.generator.image_tokenizer.model
            with torch.no_grad():
                inputs["codes"] = tokenizer.to(pixels.device).encode(pixels.float() / 127.5 - 1).indices
        noise = self.recipe.data.token_noise
        if noise and self.network.training:
            inputs["input_codes"] = noisy_codes(inputs["codes"], noise, self.network.config.codebook_size)
        return inputs

    # ------------------------------------------------------------------------------------------ the learning
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self.model_inputs(inputs)
        if isinstance(self.recipe, TextToImageRecipe) and self.recipe.text_loss:
            inputs["text_loss"] = True
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.recipe, model or self.network)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        o, minutes = self.recipe.optimizer, self.recipe.max_minutes
        if o.schedule != "cosine-minutes" or minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (o.warmup_steps + 1)) * cosine(self.seconds / (60 * minutes), 0.0)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), factor)
        return self.lr_scheduler

    @property
    def seconds(self) -> float:
        """That the run has taken so far, over all invocations."""
        return self.seconds_before + time.monotonic() - self.started

    def complete_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Write the averages and, with averaged weights, the export into a checkpoint."""
        averages = {name: whole(t).cpu() for name, t in self.average.averages.items()}
        with self.average.applied():  # until all is written: a state dict may hold the model's own tensors
            weights = whole_weights(self)
            if self.args.should_save:
                checkpointing.save_tensors(averages, folder / "averages.safetensors")
                self.generator.save(folder / "export", weights)
        return {"average_updates": self.average.updates, "seconds": self.seconds}

    # ------------------------------------------------------------------------------------------ the measuring
    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Bits per token of `eval_rows` by the averaged weights: overall and of each scale."""
        if self.eval_rows is None:
            return {}
        world, rank = self.args.world_size, self.args.process_index
        draws = self.eval_rows.in_order(self.recipe.data.eval_rows)
        mine = draws[: len(draws) // world * world][rank::world]
        batches = DataLoader(
            self.eval_rows,
            batch_size=self.args.per_device_train_batch_size,
            sampler=mine,
            collate_fn=self.data_collator,
        )
        scales = self.network.config.scales
        length = sum(side * side for side in scales)
        total = torch.zeros(length, dtype=torch.float64)
        model: Any = self.model_wrapped
        model.eval()
        with self.average.applied():
            for batch in batches:
                with self.compute_loss_context_manager():
                    outputs = model(**self.model_inputs(self._prepare_inputs(batch)))
                total += outputs.nll[:, :length].double().sum(dim=0).cpu()
        model.train()
        total = self.accelerator.reduce(total.to(self.args.device), "sum").cpu()
        bits = total / (len(mine) * world * math.log(2))
        metrics = {"eval_bits_per_token": float(bits.mean())}
        for side, part in zip(scales, bits.split([side * side for side in scales]), strict=True):
            metrics[f"eval_bits_scale/{side}"] = float(part.mean())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's own options for a recipe."""
    o, data, folder = recipe.optimizer, recipe.data, Path(recipe.output_dir)
    check_deepspeed(recipe.deepspeed)
    on_cpu = not torch.accelerator.is_available()
    processes = TrainingArguments(str(folder / "checkpoints"), use_cpu=on_cpu, report_to=[]).world_size
    share, rest = divmod(data.batch_size, processes * data.accumulation)
    if rest or not share:
        raise UserError(
            f"batch size {data.batch_size} is no multiple of {processes} processes x "
            f"{data.accumulation} parts"
        )
    memory = recomputing_options(recipe.gradient_checkpointing)
    memory |= sharding_options(recipe.fsdp_config, processes)
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=data.accumulation,
        dataloader_num_workers=data.num_workers,
        dataloader_pin_memory=not on_cpu,
        dataloader_prefetch_factor=4 if data.num_workers else None,
        # A step never waits for the device: not to copy a batch, nor to look whether the loss is finite.
        accelerator_config={"non_blocking": not on_cpu},
        logging_nan_inf_filter=on_cpu,
        learning_rate=o.lr,
        max_grad_norm=o.clip,
        lr_scheduler_type="cosine" if o.schedule == "cosine-minutes" else o.schedule,
        warmup_steps=o.warmup_steps,
        bf16=recipe.mixed_precision == "bf16",
        use_cpu=on_cpu,
        deepspeed=recipe.deepspeed,
        logging_steps=recipe.log_every,
        eval_strategy="steps" if data.eval_sources else "no",
        eval_steps=recipe.eval_every,
        save_steps=recipe.checkpoint_every,
        save_total_limit=max(2, recipe.keep),  # one may be incomplete
        seed=recipe.seed,
        report_to=list(recipe.trackers),
        remove_unused_columns=False,
        **memory,
    )


def attention_for(recipe: TextToImageRecipe, model: Any, device: torch.device) -> str:
    """The attention that a recipe's `attention` means for this model on this device.

    Raises:
        UserError: FlexAttention is wanted where it cannot learn.
    """
    text = model.config.text_config
    if recipe.attention == "flex_attention" and device.type != "cuda":
        raise UserError("FlexAttention learns on CUDA devices only; use --attention sdpa here")
    if recipe.attention != "auto":
        return recipe.attention
    length = model.image_start + model.config.num_image_tokens + len(model.config.image_close_ids)
    fits = text.head_dim in (16, 32, 64, 128, 256) and not text.attention_dropout
    return "flex_attention" if device.type == "cuda" and fits and length >= FLEX_FROM else "sdpa"


def compile_layers(model: Any, **options: Any) -> None:
    """Compile a generator's layers in place, with `options` of `torch.compile`; one graph serves them all."""
    for layer in model.modules():
        if type(layer).__name__ in model._no_split_modules:
            layer.compile(dynamic=False, **options)


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices of the layers and AdamW for the rest; norms and biases do not decay."""
    o = recipe.optimizer
    if o.kind == "muon":
        return MuonAdamW(muon_groups(model, o.muon_lr, o.lr, o.weight_decay, NOT_MUON), betas=o.betas)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas)


def noisy_codes(codes: Tensor, share: float, codebook_size: int) -> Tensor:
    """`codes` `[B, L]` with up to `share` of each row (uniform) replaced by random ones.

    The model sees these and learns the true ones, so that it meets mistakes as its own samples hold them
    (after the self-correction of Infinity, Han et al. 2024).
    """
    rows = torch.rand(len(codes), 1, device=codes.device) * share
    wrong = torch.rand(codes.shape, device=codes.device) < rows
    return torch.where(wrong, torch.randint_like(codes, codebook_size), codes)
