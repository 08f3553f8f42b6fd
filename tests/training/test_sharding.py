"""What FSDP and computing layers again ask of the Trainer, and mistakes; torchrun tests the sharding."""

from __future__ import annotations

import warnings
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from tokenflow.errors import UserError
from tokenflow.training import sharding, text_to_image, understanding
from tokenflow.training.sharding import check_sharding, recomputing_options, sharding_options
from tokenflow.training.text_to_image_recipe import TextToImageRecipe
from tokenflow.training.understanding_recipe import UnderstandingRecipe


def write(folder, text: str) -> str:
    (folder / "fsdp.json").write_text(text)
    return str(folder / "fsdp.json")


def test_a_config_file_reaches_the_trainer_as_fsdp2(tmp_path):
    assert sharding_options(None, processes=1) == {}
    file = write(tmp_path, '{"reshard_after_forward": false, "fsdp_cpu_offload": true}')
    options = sharding_options(file, processes=2)
    plugin = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options).fsdp_plugin_args
    assert plugin["fsdp_version"] == 2
    assert plugin["reshard_after_forward"] is False
    assert plugin["cpu_offload"] is True
    assert plugin["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"  # the models name their layers


@pytest.mark.parametrize(
    ("text", "processes", "message"),
    [
        (None, 2, "cannot read --fsdp-config .*fsdp.json: No such file"),
        ("{", 2, "fsdp.json is not JSON"),
        ("[]", 2, "must hold a JSON object"),
        ('{"fsdp_version": 1}', 2, "asks for version 1; models are sharded by 2"),
        ("{}", 1, "start them with torchrun"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, processes, message):
    file = str(tmp_path / "fsdp.json") if text is None else write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        sharding_options(file, processes)
    assert "\n" not in str(error.value)


def test_processes_that_cannot_shard_say_so():
    data_parallel = SimpleNamespace(
        args=SimpleNamespace(fsdp=True), accelerator=SimpleNamespace(is_fsdp2=False)
    )
    with pytest.raises(UserError, match="sharded over GPUs only"):
        check_sharding(data_parallel)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("trainer", ["text_to_image", "understanding"])
def test_layers_are_computed_again_without_a_warning(tmp_path, trainer, wanted):
    options = {"gradient_checkpointing": wanted, "output_dir": str(tmp_path), "trackers": ()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        if trainer == "understanding":
            arguments = understanding.training_arguments(UnderstandingRecipe(**options))
        else:
            arguments = text_to_image.training_arguments(TextToImageRecipe(**options))
    assert arguments.gradient_checkpointing is wanted  # a mirror of the new name, in versions that have it


def test_the_option_has_the_name_that_transformers_knows(monkeypatch):
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        known = {"gradient_checkpointing": bool, name: bool}  # the old name stays for a while
        monkeypatch.setattr(sharding, "TrainingArguments", make_dataclass("Arguments", known.items()))
        assert recomputing_options(True) == {name: True}
