"""What the training tests share: a tiny data set, teacher and recipe; and a process that trains by one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenflow.training.loss_config import LossConfig
from tokenflow.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainRecipe

SIDE = 32


def write_pictures(path: Path, count: int = 24) -> Path:
    """A parquet file of smooth random pictures."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        data = io.BytesIO()
        blocks.resize((SIDE + 8, SIDE + 8), Image.Resampling.BICUBIC).save(data, "PNG")
        rows.append({"bytes": data.getvalue(), "path": f"{i}.png"})
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), path)
    return path


def write_teacher(folder: Path) -> Path:
    """A random CLIP image tower of the small model's shape with its image processor."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=24,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil(size=SIDE).save_pretrained(folder)
    return folder


def prepare(folder: Path) -> Path:
    """Write pictures.parquet, teacher/ and config/ for `tiny_recipe` into `folder`."""
    import torch

    from small_model import small_config

    torch.manual_seed(0)
    write_pictures(folder / "pictures.parquet")
    write_teacher(folder / "teacher")
    small_config(usage_window=2048).save_pretrained(folder / "config")
    return folder


def tiny_recipe(folder: Path, output: str = "run", **changes: Any) -> TrainRecipe:
    """A run of a few steps on the files in `folder` that `prepare` wrote."""
    recipe = TrainRecipe(
        model=ModelRecipe(preset=str(folder / "config"), teacher=str(folder / "teacher")),
        data=DataRecipe(sources=(str(folder / "pictures.parquet"),), batch_size=8, num_workers=0),
        optimizer=OptimizerRecipe(lr=1e-3, warmup_steps=2, schedule="cosine", ema_decay=0.99),
        loss=LossConfig(
            perceptual="none", discriminator_start=2, discriminator_layers=1, discriminator_width=8
        ),
        output_dir=str(folder / output),
        steps=8,
        log_every=1,
        sample_every=1000,
        checkpoint_every=1000,
        trackers=(),
        mixed_precision="no",
    )
    return replace(recipe, **changes)


def log_lines(recipe: TrainRecipe) -> list[dict[str, Any]]:
    """The log lines with losses, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()]
    clock = ("hours", "images_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if "total" in line]


def start_training(recipe: TrainRecipe) -> subprocess.Popen:
    """Train in a process of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TINY_RECIPE": repr(recipe),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, to send signals to
    )


if __name__ == "__main__":
    from tokenflow.training.loop import train_tokenizer

    train_tokenizer(eval(os.environ["TINY_RECIPE"]))
