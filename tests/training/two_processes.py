"""What `test_distributed.py` runs on two gloo processes; results go to the folder in TINY_FOLDER."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_run import tiny_recipe
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tokenflow.tokenizer.quantizer import SharedMappingQuantizer
from tokenflow.training.averaging import WeightAverage
from tokenflow.training.loop import FULL, Trainer
from tokenflow.training.loss_config import LossConfig
from tokenflow.training.recipe import TrainRecipe
from tokenflow.training.tokenizer import (
    GeneratorStep,
    build_config,
    build_losses,
    build_model,
    build_optimizer,
    build_teacher,
)

NO_DISCRIMINATOR = LossConfig(perceptual="none", discriminator="none")


def plain_recipe(folder: Path, output: str, **changes: Any) -> TrainRecipe:
    """A run whose steps do not depend on how many processes share the batch (BatchNorm's would)."""
    return tiny_recipe(folder, output, loss=NO_DISCRIMINATOR, steps=4, **changes)


def quantizer_steps(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a k-means-initialised EMA quantizer after two training steps on `parts` of a batch."""
    torch.manual_seed(7)
    quantizer = SharedMappingQuantizer(
        [("a", 4, 1.0), ("b", 2, 0.5)], 8, init="kmeans", update="ema", usage_window=64
    )
    z = torch.cat(parts)
    quantizer.initialize(z.movedim(1, -1).flatten(0, 2))
    for _ in range(2):
        quantizer(z)
    return {**quantizer.state_dict(), "recent": quantizer.usage.recent}


def sharded_step(recipe: TrainRecipe, shard: bool) -> dict[str, Any]:
    """A step of Muon and AdamW on a fixed batch, with FSDP2 or plainly; then the averaged weights rebuild."""
    torch.manual_seed(0)
    config = build_config(recipe.model)
    teacher = build_teacher(recipe.model, config)
    model = build_model(recipe.model, config, teacher)
    model.quantizer.drop = 0.0
    step = GeneratorStep(model, build_losses(recipe, config, teacher), teacher)
    if shard:
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in [m for m in model.modules() if type(m).__name__ in step._no_split_modules]:
            fully_shard(block, mesh=mesh)
        fully_shard(step, mesh=mesh)
    optimizer = build_optimizer(model, replace(recipe.optimizer, muon_lr=1e-3))
    average = WeightAverage(model, 0.9, step)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    mine = images[dist.get_rank() :: dist.get_world_size()] if shard else images
    loss, _, _ = step(mine, 0)
    loss.backward()
    optimizer.step()
    average.update()
    with average.applied(), torch.no_grad():
        step.eval()(mine, 1)
    weights = get_model_state_dict(model, options=FULL)
    return {
        "loss": loss.detach(),
        "sharded": all(isinstance(p, DTensor) for p in step.parameters()),
        "weights": weights,
        "average": average.full_state(weights),
    }


def all_equal(values: dict[str, torch.Tensor]) -> bool:
    """Whether both processes have the same tensors."""
    for value in values.values():
        other = value.detach().clone()
        dist.broadcast(other, src=0)
        if not torch.equal(other, value):
            return False
    return True


class TerminatedOnce(Trainer):
    """A run whose second process alone gets a SIGTERM during step 2."""

    def train_step(self) -> None:
        super().train_step()
        if self.step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    found: dict[str, Any] = {}

    # 1. data-parallel training, interrupted and resumed
    recipe = plain_recipe(folder, "two")
    result = TerminatedOnce(recipe).run()
    found["both_stopped"] = (result.step, result.stopped_by) == (2, "SIGTERM")
    trainer = Trainer(recipe)
    trainer.run()
    found["two_processes"] = trainer.accelerator.num_processes == 2 and trainer.step == 4
    found["parameters_equal"] = all_equal(dict(trainer.model.named_parameters()))
    found["usage_equal"] = all_equal(dict(trainer.model.named_buffers()))
    found["average_equal"] = all_equal(trainer.average.averages)

    # 2. with a discriminator from the first step, k-means and EMA codebooks
    adversarial = LossConfig(
        perceptual="none", discriminator_start=0, discriminator_layers=1, discriminator_width=8
    )
    recipe = tiny_recipe(folder, "adversarial", loss=adversarial, steps=2)
    recipe = replace(recipe, model=replace(recipe.model, codebook_init="kmeans", codebook_update="ema"))
    trainer = Trainer(recipe)
    trainer.run()
    found["adversarial_parameters_equal"] = all_equal(
        {**dict(trainer.model.named_parameters()), **dict(trainer.discriminator_network.named_parameters())}
    )

    # 3. the quantizer's synchronised parts
    z = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    halves = quantizer_steps([z.chunk(2)[dist.get_rank()]])
    found["quantizer_equal"] = all_equal(halves)

    # 4. a gradient that is not finite on one process only
    trainer = Trainer(plain_recipe(folder, "poisoned", max_bad_steps=5))
    if dist.get_rank() == 1:
        trainer.model.pixel_decoder.network.conv_out.bias.register_hook(lambda g: g * torch.nan)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step()
    found["skipped_everywhere"] = trainer.skipped_steps == 1 and all(
        torch.equal(p, before[name]) for name, p in trainer.model.named_parameters()
    )

    # 5. FSDP2
    sharded = sharded_step(plain_recipe(folder, "sharded"), shard=True)
    found["sharded"] = sharded["sharded"]
    dist.all_reduce(sharded["loss"])
    found["sharded_loss"] = sharded["loss"].item() / dist.get_world_size()

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(gathered))
        save_file({k: v.contiguous() for k, v in halves.items()}, folder / "quantizer.safetensors")
        for name in ("weights", "average"):
            save_file({k: v.contiguous() for k, v in sharded[name].items()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(os.environ["TINY_FOLDER"]))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that tears the interpreter down around them
