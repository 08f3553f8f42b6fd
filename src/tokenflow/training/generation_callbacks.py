"""What only a generator's training does beside learning: averaged weights, sheets of samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tokenflow.files import atomic_write
from tokenflow.training import checkpointing
from tokenflow.training.averaging import WeightAverage
from tokenflow.training.callbacks import latest_checkpoint
from tokenflow.training.samples import picture_grid, write_picture
from tokenflow.training.sharding import gather_in

if TYPE_CHECKING:
    from tokenflow.training.text_to_image import GenerationTrainer

SAMPLES, COLUMNS = 8, 4  # pictures of a sheet, and in one of its rows


class Averaging(TrainerCallback):
    """The moving average of the weights: kept up to date, and taken up again by a resumed run."""

    def __init__(self, trainer: GenerationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.average = WeightAverage(trainer.network, trainer.recipe.optimizer.ema_decay)
        trainer.generator.image_tokenizer.model.to(args.device)
        last = latest_checkpoint(Path(trainer.recipe.output_dir))
        if last is not None and trainer.average.averages:
            updates = checkpointing.load_json(last / "complete.json")["average_updates"]
            trainer.average.load(load_file(last / "averages.safetensors"), updates)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.average.update()


class Samples(TrainerCallback):
    """Sheets of pictures by the averaged weights, always of the same prompts and seeds."""

    def __init__(self, trainer: GenerationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        gather_in(self.trainer.network, "generate_indices")

    def on_step_end(self, args, state, control, **kwargs):
        trainer, recipe = self.trainer, self.trainer.recipe
        if state.global_step % recipe.sample_every and state.global_step < state.max_steps:
            return
        prompts = list(recipe.sample_prompts) or (trainer.eval_rows or trainer.rows).captions(SAMPLES)
        prompts = prompts[:SAMPLES] or [""]
        trainer.network.eval()
        eager = torch.compiler.set_stance("force_eager")  # layers compiled for training know no cache
        with trainer.average.applied(), trainer.compute_loss_context_manager(), eager:
            pictures = trainer.generator.pictures(prompts, recipe.sample_guidance)
        trainer.network.train()
        if args.should_save:
            folder = Path(recipe.output_dir) / "samples"
            rows = pictures.split(COLUMNS if len(pictures) % COLUMNS == 0 else len(pictures))
            write_picture(picture_grid(rows), folder / f"step-{state.global_step:08d}.png")
            with atomic_write(folder / "prompts.txt") as temporary:
                temporary.write_text("\n".join(prompts) + "\n", encoding="utf-8")
