"""Two gloo processes by torchrun train a generator as one does: data-parallel, and sharded by FSDP2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from same_runs import check_same_log, check_same_weights, torchrun
from sharded_generator import loss_and_gradients, small_model, small_recipe

from tokenflow.cli import main


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


def check_same_run(one: Path, two: Path) -> None:
    """Two output folders hold the same losses and exports."""
    check_same_log(one, two)
    check_same_weights(*(load_file(folder / "export" / "model.safetensors") for folder in (one, two)))


@pytest.mark.slow
def test_the_command_line_trains_data_parallel(tmp_path, small_model_folder, capsys):
    tokens = write_tokens(tmp_path / "tokens", small_model_folder)

    def command(output: Path) -> list[str]:
        options = {
            "--model.tokenizer": small_model_folder, "--model.max-text-tokens": 8,
            "--model.text-vocabulary": 280, "--model.hidden-size": 16, "--model.intermediate-size": 32,
            "--model.layers": 1, "--model.heads": 2, "--data.sources": tokens, "--data.eval-sources": tokens,
            "--data.batch-size": 4, "--data.token-noise": 0, "--optimizer.warmup-steps": 1, "--steps": 3,
            "--log-every": 1, "--eval-every": 3, "--sample-every": 3, "--mixed-precision": "no",
            "--output-dir": output,
        }  # fmt: skip
        words = [str(word) for option in options.items() for word in option]
        return ["train", "text-to-image", "tokenflow-tiny-t2i", *words, "--trackers"]

    torchrun("-m", "tokenflow", *command(tmp_path / "two"))
    assert main(command(tmp_path / "one")) == 0
    assert capsys.readouterr().out == f"step 3 (stopped by steps); the model: {tmp_path / 'one' / 'export'}\n"
    check_same_run(tmp_path / "one", tmp_path / "two")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, small_model_folder):
    """Where `sharded_generator.py` has run on two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    write_tokens(folder / "tokens", small_model_folder)
    shutil.copytree(small_model_folder, folder / "model")
    (folder / "fsdp.json").write_text("{}")
    torchrun(Path(__file__).with_name("sharded_generator.py"), SHARDED_FOLDER=str(folder))
    return folder


@pytest.mark.slow
def test_a_sharded_model_has_the_loss_and_gradients_of_a_whole_one(sharded):
    expected = loss_and_gradients(small_model(sharded), slice(None))
    found = load_file(sharded / "gradients.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_the_trainer_shards_stops_and_goes_on_as_one_process_trains(sharded):
    """Muon and AdamW; weights are averaged, evaluated and sampled from between the steps."""
    from tokenflow.training.text_to_image import train_text_to_image

    assert json.loads((sharded / "facts.json").read_text()) == {"parameters": "DTensor", "fsdp_version": 2}
    train_text_to_image(small_recipe(sharded, "one"))
    check_same_run(sharded / "one", sharded / "two")
