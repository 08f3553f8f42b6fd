"""Two gloo processes by torchrun train a LLaVA as one does: data-parallel, and sharded by FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from same_runs import check_same_log, check_same_weights, torchrun
from sharded_chat import stages

from tokenflow.cli import main
from tokenflow.training.understanding import train_understanding
from tokenflow.understanding import ask, load


@pytest.mark.slow
def test_the_command_line_trains_data_parallel(language_model, conversations, small_model_folder, tmp_path):
    def command(folder: Path) -> list[str]:
        options = {
            "--stage": "align", "--model.tower": small_model_folder, "--model.package": None,
            "--model.language-model": language_model, "--align.sources": conversations, "--align.steps": 4,
            "--align.batch-size": 4, "--align.accumulation": 1, "--align.lr": 0.01, "--mixed-precision": "no",
            "--words.steps": 2, "--log-every": 1, "--output-dir": folder, "--cache": folder / "cache",
        }  # fmt: skip
        words = [str(word) for option in options.items() for word in option]
        return ["train", "understanding", "tokenflow-tiny-chat", *words, "--trackers"]

    torchrun("-m", "tokenflow", *command(tmp_path / "two"))
    assert main(command(tmp_path / "one")) == 0
    one, two = (tmp_path / name / "align" for name in ("one", "two"))
    check_same_log(one, two)
    check_same_weights(*(load_file(folder / "export" / "projector.safetensors") for folder in (one, two)))
    assert len((two / "skipped.txt").read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_trainer_shards_stops_and_goes_on_as_one_process_trains(
    language_model, conversations, small_model_folder, tmp_path
):
    """Parts of a batch with a picture and without one, on two processes at once."""
    names = {"text": language_model, "tower": small_model_folder, "train.parquet": conversations}
    for name, path in names.items():
        (tmp_path / name).symlink_to(path)
    (tmp_path / "fsdp.json").write_text("{}")
    torchrun(Path(__file__).with_name("sharded_chat.py"), SHARDED_FOLDER=str(tmp_path))
    assert json.loads((tmp_path / "facts.json").read_text()) == ["DTensor"] * 3
    for one, two in zip(stages(tmp_path, "one"), stages(tmp_path, "two"), strict=True):
        train_understanding(one)
        check_same_log(Path(one.folder), Path(two.folder))
        (model, _), (sharded, processor) = (load(Path(r.folder) / "export", device="cpu") for r in (one, two))
        check_same_weights(model.state_dict(), sharded.state_dict())
        assert isinstance(ask(sharded, processor, Image.new("RGB", (30, 30)), "What?", max_new_tokens=2), str)
