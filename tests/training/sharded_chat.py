"""What two gloo processes shard, by FSDP2 (see `sharded_generator.py`) or DeepSpeed; SHARDED_FOLDER says."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from sharded_generator import let_accelerate_shard_on_cpus

from tokenflow.training import understanding
from tokenflow.training.understanding_recipe import (
    ChatModelRecipe,
    LoraRecipe,
    StageRecipe,
    UnderstandingRecipe,
)

LORA = LoraRecipe(rank=2, alpha=4.0, targets=("q_proj", "down_proj"), lr=1e-2)


def stages(folder: Path, name: str, **changes: Any) -> list[UnderstandingRecipe]:
    """Stage align; stage instruct with a LoRA, and with the whole language model."""
    stage = StageRecipe(sources=(str(folder / "train.parquet"),), batch_size=4, steps=3, lr=1e-2)
    align = UnderstandingRecipe(
        model=ChatModelRecipe(str(folder / "tower"), "last", str(folder / "text"), "smollm2"),
        align=replace(stage, template="plain", eval_sources=stage.sources),
        instruct=replace(stage, accumulation=2),
        output_dir=str(folder / name / "lora"),
        mixed_precision="no",
        cache=str(folder / name / "cache"),
        log_every=1,
        eval_every=1,
        trackers=(),
        **changes,
    )
    lora = replace(align, stage="instruct", lora=LORA, export="parts")
    whole = replace(
        align,
        stage="instruct",
        output_dir=str(folder / name / "whole"),
        init_from=str(folder / name / "lora" / "align" / "export"),
        cache=None,  # the tower is in the model
    )
    return [align, lora, whole]


def train_sharded(folder: Path, **changes: Any) -> None:
    """Each run is stopped after its first step and started again."""
    facts: dict[str, str] = {}

    class Watched(understanding.UnderstandingTrainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            kinds = {type(parameter).__name__ for parameter in self.chat.model.parameters()}
            facts.setdefault(self.recipe.folder, ", ".join(kinds))
            return super().compute_loss(*args, **options)

    understanding.UnderstandingTrainer = Watched
    for recipe in stages(folder, "two", **changes):
        assert understanding.train_understanding(replace(recipe, max_minutes=0.0)).step == 1
        assert understanding.train_understanding(recipe).step == 3
    if dist.get_rank() == 0:
        (folder / "facts.json").write_text(json.dumps(list(facts.values())))


if __name__ == "__main__":
    folder = Path(os.environ["SHARDED_FOLDER"])
    dist.init_process_group("gloo")
    if (folder / "zero2.json").exists():
        train_sharded(folder, deepspeed=str(folder / "zero2.json"))
    else:
        let_accelerate_shard_on_cpus()
        # The layers that are computed again gather their weights again.
        train_sharded(folder, fsdp_config=str(folder / "fsdp.json"), gradient_checkpointing=True)
    dist.barrier()
    os._exit(0)  # without interpreter teardown, which gloo's threads do not always survive
