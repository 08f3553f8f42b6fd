"""Two gloo processes by torchrun train a generator as one does on the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenflow.training.text_to_image_recipe import (
    GenerationData,
    GenerationOptimizer,
    LanguageModelRecipe,
    TextToImageRecipe,
)


def small_recipe(tokens: Path, tokenizer: Path, output: Path) -> TextToImageRecipe:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2}
    return TextToImageRecipe(
        model=LanguageModelRecipe(tokenizer=str(tokenizer), max_text_tokens=8, text_vocabulary=280, **sizes),
        data=GenerationData(sources=(str(tokens),), eval_sources=(str(tokens),), batch_size=4),
        optimizer=GenerationOptimizer(lr=1e-2, warmup_steps=1, ema_decay=0.9),
        output_dir=str(output),
        steps=3,
        mixed_precision="no",
        log_every=1,
        eval_every=3,
        sample_every=3,
        trackers=(),
    )


def write_tokens(folder: Path, tokenizer: Path) -> Path:
    from tokenflow import TokenFlowModel
    from tokenflow.data.token_shards import ShardInfo, write_shard
    from tokenflow.tokenizer.token_file import tokenizer_fingerprint

    model = TokenFlowModel.from_pretrained(tokenizer)
    config = model.config
    info = ShardInfo("small", tokenizer_fingerprint(model), 64, list(config.scales), config.image_size)
    values = {"label": None, "label_name": None}
    for split in ("train", "val"):
        rows = [
            {"codes": [(7 * i + j) % 64 for j in range(21)], "captions": [f"number {i}"], "row": i, **values}
            for i in range(8)
        ]
        write_shard(folder / f"{split}-00000-of-00001.parquet", rows, info)
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_whole_batch(tmp_path, small_model_folder):
    from tokenflow.training.text_to_image import train_text_to_image

    recipe = small_recipe(
        write_tokens(tmp_path / "tokens", small_model_folder), small_model_folder, tmp_path / "two"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        __file__,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SMALL_RECIPE": json.dumps(
            [str(tmp_path / "tokens"), str(small_model_folder), str(tmp_path / "two")]
        ),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    one = replace(recipe, output_dir=str(tmp_path / "one"))
    train_text_to_image(one)

    def log(recipe):
        return list(map(json.loads, (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()))

    for ours, theirs in zip(log(one), log(recipe), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"images_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    weights = [load_file(Path(r.output_dir) / "export" / "model.safetensors") for r in (one, recipe)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


if __name__ == "__main__":
    from tokenflow.training.text_to_image import train_text_to_image

    train_text_to_image(small_recipe(*map(Path, json.loads(os.environ["SMALL_RECIPE"]))))
    torch.distributed.barrier()
    os._exit(0)  # without interpreter teardown, which gloo's threads do not always survive
