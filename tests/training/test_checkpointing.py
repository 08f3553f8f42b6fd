"""Checkpoints: a killed run repeats the uninterrupted one; folders are whole or absent; old ones go."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import log_lines, prepare, start_training, tiny_recipe
from torch import nn

from tokenflow import TokenFlowImageProcessor, TokenFlowModel
from tokenflow.errors import UserError
from tokenflow.files import atomic_folder
from tokenflow.training import checkpointing
from tokenflow.training.loop import train_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def finished(files):
    """An uninterrupted run of 24 steps in a process of its own, as the interrupted ones are."""
    recipe = tiny_recipe(files, "uninterrupted", steps=24, checkpoint_every=8)
    process = start_training(recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return recipe


def weights(recipe, step: int) -> dict[str, torch.Tensor]:
    folder = checkpointing.step_folder(Path(recipe.output_dir) / "checkpoints", step)
    return {
        f"{file.relative_to(folder)}/{name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.slow
def test_a_killed_run_ends_as_the_uninterrupted_one(files, finished):
    recipe = replace(finished, output_dir=str(files / "killed"))
    process = start_training(recipe)
    checkpoint = checkpointing.step_folder(Path(recipe.output_dir) / "checkpoints", 8)
    while not (checkpoint.exists() and log_lines(recipe)[-1]["step"] > 8):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    newest = checkpointing.latest_checkpoint(Path(recipe.output_dir) / "checkpoints")
    assert newest is not None
    assert newest.name in ("step-00000008", "step-00000016")  # before the end

    process = start_training(recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert log_lines(recipe) == log_lines(finished)  # losses, gradient norms, usage
    expected, actual = weights(finished, 24), weights(recipe, 24)
    assert actual.keys() == expected.keys()
    assert any("discriminator" in name for name in actual)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_ends_in_a_checkpoint(files):
    recipe = tiny_recipe(files, "terminated", steps=100_000)
    recipe = replace(recipe, data=replace(recipe.data, num_workers=1))
    process = start_training(recipe)
    log = Path(recipe.output_dir) / "log.jsonl"
    assert process.stdout is not None
    for _ in process.stdout:
        if log.exists() and log.read_text().count("\n") > 2:
            break
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers and terminals do it; the loader's worker is in it
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    newest = checkpointing.latest_checkpoint(Path(recipe.output_dir) / "checkpoints")
    assert newest is not None
    assert log_lines(recipe)[-1]["step"] == int(newest.name.removeprefix("step-"))


def test_random_state_is_restored_for_python_numpy_and_torch():
    state = checkpointing.random_state()
    first = (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002
    checkpointing.set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == first  # noqa: NPY002


def test_random_state_passes_through_a_file_that_is_read_without_pickle(tmp_path):
    state = checkpointing.random_state()
    torch.save(state, tmp_path / "state.pt")
    first = torch.rand(())
    checkpointing.set_random_state(checkpointing.load_torch(tmp_path / "state.pt"))
    assert torch.rand(()) == first


class Trap:
    def __reduce__(self):
        return (os.system, ("touch trapped",))


def test_a_state_file_with_code_in_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match=r"cannot read .*optimizer\.pt"):
        checkpointing.load_torch(tmp_path / "optimizer.pt")
    assert not (tmp_path / "trapped").exists()


def test_a_folder_whose_writing_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "step-00000001"
    with atomic_folder(target, replace=True) as folder:
        (folder / "a").write_text("old")

    def write_half() -> None:
        with atomic_folder(target, replace=True) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("save", [checkpointing.save_tensors, checkpointing.save_torch])
def test_a_full_disk_is_one_line(tmp_path, save):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as near to a full disk as a test gets
    try:
        with (
            pytest.raises(UserError, match=r"cannot write .*step-00000001: ") as caught,
            atomic_folder(tmp_path / "step-00000001", replace=True) as folder,
        ):
            save({"a": torch.zeros(10_000)}, folder / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_rotation_keeps_the_newest_and_clears_what_a_kill_left(tmp_path):
    for step in (1, 2, 30):
        checkpointing.step_folder(tmp_path, step).mkdir()
    (tmp_path / ".step-00000040.tmp").mkdir()
    checkpointing.rotate(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000030"]
    assert checkpointing.latest_checkpoint(tmp_path) == tmp_path / "step-00000030"


def test_the_export_is_the_average_as_a_model_folder(finished):
    folder = Path(finished.output_dir) / "export"
    model = TokenFlowModel.from_pretrained(folder)
    assert TokenFlowImageProcessor.from_pretrained(folder).size["height"] == model.config.image_size
    trained = weights(finished, 24)
    name = "pixel_decoder.network.conv_out.weight"
    exported = model.state_dict()[name]
    assert exported.dtype == torch.float32
    assert torch.equal(exported, trained[f"export/model.safetensors/{name}"])
    assert not torch.equal(exported, trained[f"model.safetensors/{name}"])


def test_export_half_halves_the_file_and_keeps_the_card(finished, tmp_path):
    source = Path(finished.output_dir) / "export"
    (tmp_path / "README.md").write_text("card")
    out = checkpointing.export_half(source, tmp_path)
    stored = load_file(out / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    assert not any("usage" in name for name in stored)
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert (out / "README.md").read_text() == "card"
    full, half = TokenFlowModel.from_pretrained(source), TokenFlowModel.from_pretrained(out)
    for name, t in half.state_dict().items():
        torch.testing.assert_close(t, full.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_transient_buffers_are_the_ones_that_a_state_dict_leaves_out():
    module = nn.BatchNorm1d(2)
    module.register_buffer("window", torch.zeros(3), persistent=False)
    assert list(checkpointing.transient_buffers(module)) == ["window"]


def test_resuming_with_another_model_or_a_damaged_checkpoint_is_one_line(files, finished, tmp_path):
    changed = replace(finished, model=replace(finished.model, codebook_size=32))
    with pytest.raises(UserError, match="another model than this recipe's"):
        train_tokenizer(changed)
    folder = tmp_path / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*progress\.json"):
        train_tokenizer(replace(finished, output_dir=str(tmp_path)))
