"""The training loop of the tokenizer, top to bottom: build, resume, step, log, save.

Notable: losses live in modules that data-parallel wrappers know; a step whose gradient is not finite is
skipped on all processes alike; whatever influences the next step is in the checkpoint, so a killed run
repeats the uninterrupted one bit by bit on a CPU.
"""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from tokenflow.data.loader import ImageLoader
from tokenflow.errors import UserError
from tokenflow.files import atomic_folder, write_error
from tokenflow.tokenizer.quantizer import CodeUsage
from tokenflow.training import checkpointing
from tokenflow.training.averaging import WeightAverage, whole
from tokenflow.training.losses import TokenizerLoss
from tokenflow.training.progress import LogFile, StopRequest, lr_factor, recipe_changes
from tokenflow.training.recipe import TrainRecipe
from tokenflow.training.samples import mean_psnr, picture_grid, sample_pictures, to_uint8, write_picture
from tokenflow.training.tokenizer import (
    DiscriminatorStep,
    GeneratorStep,
    build_config,
    build_losses,
    build_model,
    build_optimizer,
    build_teacher,
    parse_source,
    pixel_networks,
    to_channels_last,
)

logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # by the newest torch only
SHOWN = ("total", "reconstruction", "perceptual", "adversarial", "semantic")  # in the progress bar
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class TrainResult:
    """Attributes:
    step: optimizer steps done, earlier invocations included.
    stopped_by: "steps", "max_minutes" or the name of a signal.
    export: a `from_pretrained` folder of the averaged weights.
    """

    step: int
    stopped_by: str
    export: Path


def train_tokenizer(recipe: TrainRecipe) -> TrainResult:
    """Train a tokenizer, or go on with the run in `recipe.output_dir`.

    Raises:
        UserError: something in the recipe, the data or the checkpoint is wrong; too many bad steps in a row.
    """
    trainer = Trainer(recipe)
    try:
        return trainer.run()
    finally:
        trainer.close()


class Trainer:
    """One training run in one of its processes."""

    def __init__(self, recipe: TrainRecipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
        self.accelerator = accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            # Unasked, accelerate would not join the processes of torchrun.
            cpu=not torch.accelerator.is_available(),
            log_with=list(recipe.trackers) or None,
            project_dir=recipe.output_dir,
            # Usage windows and EMA codebooks are the same on all processes already.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device, world = accelerator.device, accelerator.num_processes
        if recipe.data.batch_size % (world * recipe.data.accumulation):
            raise UserError(
                f"batch_size {recipe.data.batch_size} is not a multiple of {world} processes x "
                f"{recipe.data.accumulation} accumulated parts"
            )
        random.seed(recipe.seed)
        np.random.seed(recipe.seed)  # noqa: NPY002 (other libraries' global one)
        torch.manual_seed(recipe.seed)  # the same weights everywhere

        # 1. model, losses, optimizers
        config = build_config(recipe.model)
        plain = (config.codebook_update, config.codebook_init) == ("gradient", "uniform")
        if accelerator.is_fsdp2 and (not plain or config.restart_dead_codes):
            raise UserError(
                "FSDP2 shards the codebooks, so they learn by gradient from a uniform start, without restarts"
            )
        teacher = build_teacher(recipe.model, config)
        self.model = build_model(recipe.model, config, teacher)
        losses = build_losses(recipe, config, teacher)
        generator = GeneratorStep(self.model, losses, teacher)
        if teacher is not None:
            teacher.to(self.device)
        to_channels_last(losses.to(self.device))  # full-resolution networks: faster so
        if recipe.channels_last:
            for network in pixel_networks(self.model):
                to_channels_last(network)
        o = recipe.optimizer
        options: dict[str, Any] = {"betas": o.betas, "weight_decay": o.weight_decay, "fused": True}
        generator.to(self.device)
        optimizer = build_optimizer(self.model, recipe.optimizer)
        self.generator, self.optimizer = accelerator.prepare(generator, optimizer)
        self.discriminator = None
        if losses.discriminator_network is not None:
            self.discriminator_network = losses.discriminator_network
            step = DiscriminatorStep(losses)
            self.discriminator, self.discriminator_optimizer = accelerator.prepare(
                step, torch.optim.AdamW(step.parameters(), **options)
            )
        self.losses: TokenizerLoss = losses
        if recipe.compile:
            for network in pixel_networks(self.model):
                network.compile()
        self.average = WeightAverage(self.model, o.ema_decay, self.generator)

        # 2. data
        micro_batch = recipe.data.batch_size // world // recipe.data.accumulation
        self.loader = ImageLoader(
            [parse_source(text) for text in recipe.data.sources],
            config.image_size,
            micro_batch,
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
            rank=accelerator.process_index,
            world_size=world,
        )

        # The loader runs a batch ahead on a GPU; a checkpoint needs its place after the last batch used.
        self.ahead: deque[tuple[Tensor, dict[str, Any]]] = deque()
        self.loader_state = self.loader.state_dict()

        pictures = recipe.data.sample_sources or recipe.data.sources
        self.pictures = sample_pictures([parse_source(text) for text in pictures], config.image_size)

        # 3. progress; all of it is in a checkpoint
        self.step = 0
        self.seconds = 0.0  # of all invocations
        self.skipped_steps = self.bad_in_a_row = 0
        self.sums: dict[str, Tensor] = {}  # since the last log line, by name: sum and count
        torch.manual_seed(recipe.seed + 1 + accelerator.process_index)

    # ----------------------------------------------------------------------------------------------- the loop
    def run(self) -> TrainResult:
        recipe = self.recipe
        started = time.monotonic()
        self.resume()
        main = self.accelerator.is_main_process
        if main:
            self.open_log()
        self.accelerator.init_trackers("tokenflow")
        bar = tqdm(
            total=recipe.steps,
            initial=self.step,
            unit="step",
            disable=not main,
            mininterval=1.0,
            dynamic_ncols=True,
        )
        earlier, saved, logged, last_log = self.seconds, self.step, self.step, started
        minutes = recipe.max_minutes
        if minutes is not None and recipe.optimizer.schedule == "cosine-minutes":
            minutes = max(0.0, minutes - self.seconds / 60)  # of the whole run
        with StopRequest(minutes) as stop:
            while self.step < recipe.steps and stop.reason is None:
                self.train_step()
                self.seconds = earlier + time.monotonic() - started
                bar.update()
                if self.step % recipe.log_every == 0:
                    now = time.monotonic()
                    self.log(bar, self.step - logged, now - last_log)
                    logged, last_log = self.step, now
                if self.step % recipe.sample_every == 0:
                    self.sample()
                if self.step % recipe.checkpoint_every == 0:
                    self.save()
                    saved = self.step
                stop.check(self.accelerator)
            if saved != self.step or self.step == 0:
                self.save()
            if logged != self.step:  # after saving: a run that goes on needs the sums of its whole next line
                self.log(bar, self.step - logged, time.monotonic() - last_log)
            if self.step % recipe.sample_every:
                self.sample()
        bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return TrainResult(self.step, stop.reason or "steps", self.folder / "export")

    def train_step(self) -> None:
        """One optimizer step of the tokenizer, then one of the discriminator on the same reconstructions."""
        recipe, parts = self.recipe, self.recipe.data.accumulation
        self.set_learning_rate()
        pairs: list[tuple[Tensor, Tensor]] = []
        logs: dict[str, Tensor] = {}
        for part in range(parts):
            if not self.ahead:
                self.fetch()
            images, self.loader_state = self.ahead.popleft()
            with self.accelerator.no_sync(self.generator) if part + 1 < parts else nullcontext():
                loss, values, reconstruction = self.generator(images, self.step)
                self.accelerator.backward(loss / parts)
            pairs.append((images, reconstruction.detach()))
            add_to(logs, {"total": loss, **values}, 1 / parts)
            if self.device.type != "cpu":  # copied while the device is busy with this batch
                self.fetch()
        norm = self.accelerator.clip_grad_norm_(parameters_of(self.optimizer), recipe.optimizer.clip)
        finite = self.gate(self.optimizer, norm)
        if finite:
            self.average.update()
        logs["gradient_norm"] = whole(norm)

        if finite and self.discriminator is not None and self.losses.adversarial_weight(self.step):
            for part, (images, reconstruction) in enumerate(pairs):
                with self.accelerator.no_sync(self.discriminator) if part + 1 < parts else nullcontext():
                    loss, values = self.discriminator(images, reconstruction, self.step)
                    self.accelerator.backward(loss / parts)
                add_to(logs, values, 1 / parts)
            parameters = parameters_of(self.discriminator_optimizer)
            norm = self.accelerator.clip_grad_norm_(parameters, recipe.optimizer.clip)
            finite = self.gate(self.discriminator_optimizer, norm)
        self.step += 1
        self.count_bad(finite)
        if finite:
            for name, value in logs.items():
                self.sums[name] = self.sums.get(name, 0) + torch.stack([value, torch.ones_like(value)])

    def fetch(self) -> None:
        batch = next(self.loader)["pixel_values"]
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        self.ahead.append((batch.to(self.device, non_blocking=True), self.loader.state_dict()))

    def set_learning_rate(self) -> None:
        o, factor = self.recipe.optimizer, lr_factor(self.step, self.recipe, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * ((o.muon_lr or 0.0) if group.get("muon") else o.lr)
        if self.discriminator is not None:
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = (o.lr if o.discriminator_lr is None else o.discriminator_lr) * factor

    def gate(self, optimizer: Any, norm: Tensor) -> bool:
        """Step the optimizer if the gradient norm is finite; it is of averaged gradients, so all agree."""
        finite = bool(whole(norm).isfinite())
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return finite

    def count_bad(self, finite: bool) -> None:
        if finite:
            self.bad_in_a_row = 0
            return
        self.skipped_steps += 1
        self.bad_in_a_row += 1
        logger.warning("step %d: a gradient is not finite; its update is skipped", self.step)
        if self.bad_in_a_row >= self.recipe.max_bad_steps:
            raise UserError(
                f"gradients were not finite for {self.bad_in_a_row} steps in a row, up to step {self.step}; "
                "lower --optimizer.lr or set --mixed-precision no, and start again from the last checkpoint"
            )

    # ------------------------------------------------------------------------------------------------ reports
    def log(self, bar: tqdm, steps: int, seconds: float) -> None:
        """One line of log.jsonl, the trackers and the progress bar, with means since the last line.

        Args:
            steps, seconds: how many and how long since this invocation's last line, for the speed.
        """
        means = self.means()
        if not self.accelerator.is_main_process:
            return
        quantizer = self.model.quantizer
        size = self.model.config.codebook_size
        values = {
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": steps * self.recipe.data.batch_size / max(seconds, 1e-9),
            "usage": quantizer.quantizer.usage.fraction(size),
            **{
                f"usage_scale/{side}": cast(CodeUsage, usage).fraction(size)
                for side, usage in zip(quantizer.scales, quantizer.scale_usage, strict=True)
            },
            "skipped_steps": self.skipped_steps,
            "skipped_images": sum(self.loader.skipped.values()),
        }
        record = {
            "step": self.step,
            "images": self.step * self.recipe.data.batch_size,
            "hours": self.seconds / 3600,
        }
        self.log_file.write({**record, **values})
        self.accelerator.log(values, step=self.step)
        shown = {key: f"{value:.3g}" for key, value in means.items() if key in SHOWN}
        shown["img/s"] = f"{values['images_per_second']:.1f}"
        shown["codes"] = f"{values['usage']:.0%}"
        shown["by scale"] = "/".join(
            f"{100 * values[f'usage_scale/{side}']:.0f}" for side in quantizer.scales
        )
        bar.set_postfix(shown, refresh=False)

    def means(self) -> dict[str, float]:
        """Means over the steps since the last call and over all processes."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums, counts = torch.stack([self.sums[name] for name in names]).unbind(1)
        self.sums = {}
        return dict(zip(names, self.accelerator.reduce(sums / counts, "mean").tolist(), strict=True))

    def open_log(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log_file = LogFile(self.folder / "log.jsonl", self.step)
            checkpointing.save_json(asdict(self.recipe), self.folder / "recipe.json")
        except OSError as error:
            raise write_error(self.folder, error) from error

    def sample(self) -> None:
        """A sheet by the averaged weights: originals, reconstructions, decodings of fewer scales."""
        self.generator.eval()
        with self.average.applied(), torch.no_grad():
            decoded = self.generator(self.pictures.to(self.device), self.step)
        self.generator.train()
        if not self.accelerator.is_main_process:
            return
        rows = [self.pictures, *(to_uint8(pixels) for pixels in decoded)]
        psnr = mean_psnr(rows[0], rows[1])
        sheet = picture_grid(rows)
        write_picture(sheet, self.folder / "samples" / f"step-{self.step:08d}.png")
        self.log_file.write({"step": self.step, "sample_psnr": psnr})
        self.accelerator.log({"sample_psnr": psnr}, step=self.step)
        for tracker in self.accelerator.trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({"samples": sheet[None]}, step=self.step, dataformats="NHWC")

    # -------------------------------------------------------------------------------------------- checkpoints
    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save(self) -> None:
        """Write everything that the next step depends on, and the model to use."""
        own: dict[str, Any] = {
            "random": checkpointing.random_state(),
            "loader": self.loader_state,
            "sums": {name: value.cpu() for name, value in self.sums.items()},
        }
        processes = gather_object([own])
        weights = cast(dict[str, Tensor], get_model_state_dict(self.model, options=FULL))
        optimizer = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=FULL)
        averaged = self.average.full_state(weights)
        if self.accelerator.is_main_process:
            newest = checkpointing.step_folder(self.checkpoints, self.step)
            with atomic_folder(newest, replace=True) as folder:
                checkpointing.save_tensors(weights, folder / "model.safetensors")
                checkpointing.save_tensors(
                    checkpointing.transient_buffers(self.model), folder / "buffers.safetensors"
                )
                checkpointing.save_torch(optimizer, folder / "optimizer.pt")
                if self.discriminator is not None:
                    state = self.discriminator_network.state_dict()
                    checkpointing.save_tensors(state, folder / "discriminator.safetensors")
                    checkpointing.save_torch(
                        self.discriminator_optimizer.optimizer.state_dict(),
                        folder / "discriminator_optimizer.pt",
                    )
                checkpointing.save_torch(processes, folder / "processes.pt")
                checkpointing.save_export(self.model, averaged, folder / "export")
                progress = {
                    "step": self.step,
                    "seconds": self.seconds,
                    "skipped_steps": self.skipped_steps,
                    "bad_in_a_row": self.bad_in_a_row,
                    "average_updates": self.average.updates,
                    "processes": self.accelerator.num_processes,
                }
                checkpointing.save_json(progress, folder / "progress.json")
            checkpointing.point_to(self.folder / "export", newest / "export")
            checkpointing.rotate(self.checkpoints, self.recipe.keep)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest checkpoint in the output folder, if there is one."""
        folder = checkpointing.latest_checkpoint(self.checkpoints)
        if folder is None:
            return
        progress = checkpointing.load_json(folder / "progress.json")
        if progress["processes"] != self.accelerator.num_processes:
            raise UserError(
                f"{folder} was written by {progress['processes']} processes, not "
                f"{self.accelerator.num_processes}; start as many, or a new run with --model.init-from "
                f"{folder / 'export'}"
            )
        try:
            weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
            set_model_state_dict(self.model, weights, options=FULL)
        except RuntimeError as error:
            detail = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{folder} holds another model than this recipe's; give another --output-dir ({detail})"
            ) from error
        checkpointing.load_buffers(self.model, folder / "buffers.safetensors")
        set_optimizer_state_dict(
            self.model,
            self.optimizer.optimizer,
            checkpointing.load_torch(folder / "optimizer.pt"),
            options=FULL,
        )
        if self.discriminator is not None and not (folder / "discriminator.safetensors").exists():
            logger.warning("%s has no discriminator: it starts fresh", folder)
        elif self.discriminator is not None:
            self.discriminator_network.load_state_dict(load_file(folder / "discriminator.safetensors"))
            self.discriminator_optimizer.optimizer.load_state_dict(
                checkpointing.load_torch(folder / "discriminator_optimizer.pt")
            )
        self.average.load(load_file(folder / "export" / "model.safetensors"), progress["average_updates"])
        own = checkpointing.load_torch(folder / "processes.pt")[self.accelerator.process_index]
        self.loader.load_state_dict(own["loader"])
        self.ahead.clear()
        self.loader_state = own["loader"]
        checkpointing.set_random_state(own["random"])
        self.sums = {name: value.to(self.device) for name, value in own["sums"].items()}
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.skipped_steps, self.bad_in_a_row = progress["skipped_steps"], progress["bad_in_a_row"]
        before = self.folder / "recipe.json"
        if self.accelerator.is_main_process and before.exists():
            changes = recipe_changes(checkpointing.load_json(before), asdict(self.recipe))
            if changes:
                logger.warning("%s goes on with another recipe: %s", folder, ", ".join(changes))
        logger.info("going on from %s", folder)

    def close(self) -> None:
        """Stop the loader's workers and leave the group of processes."""
        self.loader.close()
        self.accelerator.end_training()


def parameters_of(optimizer: Any) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def add_to(sums: dict[str, Tensor], values: dict[str, Tensor], weight: float = 1.0) -> None:
    for name, value in values.items():
        value = torch.as_tensor(value).detach().float() * weight
        sums[name] = sums[name] + value if name in sums else value
