"""Saving memory by transformers' Trainer: FSDP2, DeepSpeed, layers computed again; whole weights after it."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel, Trainer, TrainingArguments

from tokenflow.errors import UserError


def recomputing_options(wanted: bool) -> dict[str, Any]:
    """The option of `TrainingArguments` that computes layers again in the backward pass, to save memory."""
    names = {field.name for field in fields(TrainingArguments)}
    new, old = "activation_checkpointing", "gradient_checkpointing"  # transformers has warned of the old one
    return {new if new in names else old: wanted}


def sharding_options(fsdp_config: str | None, processes: int) -> dict[str, Any]:
    """Options of `TrainingArguments` that shard a model over `processes`; none without a file.

    Args:
        fsdp_config: a JSON file with the Trainer's `fsdp_config`; `{}` will do.

    Raises:
        UserError: a file that is missing or no JSON object, FSDP1, a single process.
    """
    if fsdp_config is None:
        return {}
    try:
        config = json.loads(Path(fsdp_config).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --fsdp-config {fsdp_config}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--fsdp-config {fsdp_config} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--fsdp-config {fsdp_config} must hold a JSON object, such as {{}}")
    version = config.get("version", config.get("fsdp_version", 2))
    if str(version) != "2":
        raise UserError(f"--fsdp-config {fsdp_config} asks for version {version}; models are sharded by 2")
    if processes == 1:
        raise UserError(
            "--fsdp-config shards a model over processes; start them with torchrun --nproc-per-node N "
            "-m tokenflow train ..."
        )
    return {"fsdp": True, "fsdp_config": config}


def check_deepspeed(config: str | None) -> None:
    """Raise UserError where DeepSpeed was asked for and could not start: it is missing, or torchrun is."""
    if config is not None and importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed needs a package: pip install --no-build-isolation deepspeed")
    if config is not None and "RANK" not in os.environ:
        raise UserError(
            "--deepspeed takes its place among processes from torchrun: start it with torchrun "
            "--nproc-per-node N -m tokenflow train ..."
        )


def check_sharding(trainer: Trainer) -> None:
    """Raise UserError where accelerate would train data-parallel though the Trainer was asked to shard."""
    if trainer.args.fsdp and not trainer.accelerator.is_fsdp2:
        raise UserError(
            "--fsdp-config: models are sharded over GPUs only, and these processes have none; leave it out "
            "to train data-parallel"
        )


def name_layers(model: PreTrainedModel) -> None:
    """Name no kinds of layers to shard one by one that the model lacks: accelerate would not have it."""
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = present & set(model._no_split_modules or ())


def gather_in(model: nn.Module, *methods: str) -> None:
    """Let methods beside `forward` see whole weights: a sharded model gathers them in forward methods."""
    if isinstance(model, FSDPModule):
        for method in methods:
            register_fsdp_forward_method(model, method)


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The model's state dict, whole and by its own names, however it is wrapped; all processes must ask.

    It may hold the model's own tensors: use it before they change. Of shards, only the first process gets it.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}  # torch.compile's
