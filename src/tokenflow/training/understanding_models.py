"""What training on conversations begins with and ends in: a LLaVA of a recipe, and a folder to load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tokenflow.bundled import resolve
from tokenflow.errors import UserError
from tokenflow.training.tower_cache import TowerBeside
from tokenflow.training.understanding_recipe import LoraRecipe, UnderstandingRecipe
from tokenflow.understanding import load
from tokenflow.understanding.llava import PARTS_FILE
from tokenflow.understanding.parts import Parts, assemble_parts, save_parts

_ADAPTER, _PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
_TOWER = "model.vision_tower."


@dataclass
class Chat:
    """A LLaVA in training.

    Attributes:
        model: only what learns has gradients.
        processor: of the model as it will be used: with its own template.
        parts: what it is made of; None if it comes from a whole folder.
        lora: peft's settings of the LoRA, if there is one.
    """

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    parts: Parts | None
    lora: Any = None

    def learned(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: Path, weights: dict[str, Tensor], whole: bool, half: bool) -> None:
        """A folder for `tokenflow.understanding.load`.

        Args:
            weights: a full state dict of the model.
            whole: for `LlavaForConditionalGeneration.from_pretrained`, too, with the LoRA added.
            half: store a whole language model in bfloat16.
        """
        if whole or self.parts is None:
            self._save_whole(folder, weights, half)
            return
        prefix = "model.multi_modal_projector."
        projector = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        save_parts(folder, self.model, self.parts, projector)
        if self.lora is not None:
            adapter = {
                f"{_PEFT_PREFIX}{name.replace('.default.', '.')}": tensor.contiguous()
                for name, tensor in weights.items()
                if ".lora_" in name
            }
            self.lora.save_pretrained(folder)
            save_file(adapter, folder / _ADAPTER)

    def _save_whole(self, folder: Path, weights: dict[str, Tensor], half: bool) -> None:
        weights = merged(weights, self.lora)
        if half:
            weights = {k: v if k.startswith(_TOWER) else v.bfloat16() for k, v in weights.items()}
        tower: Any = self.model.model.vision_tower
        if isinstance(tower, TowerBeside):
            original: Any = tower.tower
            weights |= {_TOWER + name: tensor for name, tensor in original.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)


def build_chat(recipe: UnderstandingRecipe) -> Chat:
    """The model of a recipe's stage, with gradients where that stage learns.

    Raises:
        UserError: a part that cannot be loaded; nothing to start the second stage from; a start of another
            shape; an export that cannot hold what is learned.
    """
    start = None if recipe.init_from is None else resolve(recipe.init_from)
    if recipe.stage == "instruct" and start is None:
        start = f"{recipe.output_dir}/align/export"
        if not Path(start).is_dir():
            raise UserError(
                f"there is no {start} to start from: run --stage align first, or give --init-from FOLDER"
            )
    torch.manual_seed(recipe.seed)
    m = recipe.model
    parts: Parts | None = Parts(
        m.tower, m.language_model, m.template, m.feature_strategy, m.package, m.requirement
    )
    if start is None or Path(start, PARTS_FILE).is_file():
        model, processor = assemble_parts(parts)  # type: ignore[arg-type]
    else:
        (model, processor), parts = load(start, device="cpu", dtype="float32"), None
        if recipe.stage == "instruct" and recipe.export == "parts":
            raise UserError(f"{start} holds a whole model, of which there are no parts: give --export whole")
    processor.image_processor.resize_mode = recipe.of_stage.resize_mode
    chat = Chat(model, processor, parts)
    model.requires_grad_(False)
    if not torch.accelerator.is_available():
        # The backward of the fused attention is slow on a CPU: a step takes half as long again (measured).
        model.model.language_model.set_attn_implementation("eager")
    if recipe.stage == "instruct":
        _let_language_model_learn(chat, recipe)
    if recipe.mixed_precision == "bf16" and not (recipe.fsdp_config or recipe.deepspeed):
        keep_half(model)  # those two want parameters of one dtype
    model.model.multi_modal_projector.requires_grad_(True)
    if start is not None and parts is not None:
        _start_from(chat, Path(start))
    return chat


def _let_language_model_learn(chat: Chat, recipe: UnderstandingRecipe) -> None:
    if recipe.lora.rank:
        chat.lora = add_lora(chat.model, recipe.lora)
    elif recipe.export == "parts":
        raise UserError(
            "the export 'parts' has no place for a language model that learned: "
            "set --lora.rank, or --export whole"
        )
    else:
        chat.model.model.language_model.requires_grad_(True)
        chat.model.lm_head.requires_grad_(True)


def add_lora(model: LlavaForConditionalGeneration, recipe: LoraRecipe) -> Any:
    """Put low-rank updates, zero at first, into the language model's layers; returns peft's settings.

    Raises:
        UserError: the language model has no layers of these names.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = "|".join(recipe.targets)
    settings = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # peft multiplies with it
        target_modules=rf"model\.language_model\..*\.({names})",
    )
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise UserError(f"no layer of the language model is called {names.replace('|', ' or ')}") from error
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast casts where it must; to float32 and back costs a tenth of a step (measured).
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return settings


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within, the model answers as it did before its LoRA; gradients must be off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters` would turn gradients off and on, too
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def keep_half(model: nn.Module) -> None:
    """What does not learn becomes bfloat16; the vision tower, which knows its own precision, excepted."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.startswith((_TOWER, "model.multi_modal_projector.")):
            parameter.data = parameter.data.bfloat16()


def _start_from(chat: Chat, folder: Path) -> None:
    """Take projector and LoRA of a parts folder."""
    try:
        chat.model.model.multi_modal_projector.load_state_dict(load_file(folder / "projector.safetensors"))
        if not (folder / _ADAPTER).is_file():
            return
        before = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if chat.lora is None or (before["r"], before["lora_alpha"]) != (chat.lora.r, chat.lora.lora_alpha):
            raise UserError(f"{folder} has a LoRA of rank {before['r']} and alpha {before['lora_alpha']}; "
                            "go on with that, or start from a folder without one")  # fmt: skip
        named = {f"{_PEFT_PREFIX}{name.replace('.default.', '.')}": p for name, p in chat.learned().items()}
        adapter = load_file(folder / _ADAPTER)
        if adapter.keys() != {name for name in named if ".lora_" in name}:
            raise UserError(f"{folder} has a LoRA of other layers than --lora.targets")
        for name, tensor in adapter.items():
            named[name].data.copy_(tensor)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot start from {folder}: {str(error).splitlines()[0]}") from error


def merged(weights: dict[str, Tensor], lora: Any) -> dict[str, Tensor]:
    """A state dict with the LoRA added to the layers that have one, under the names of a model without."""
    found = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            layer = name.split(".base_layer.")[0]
            if name.endswith(".weight"):
                down, up = (weights[f"{layer}.lora_{x}.default.weight"].float() for x in "AB")
                tensor = tensor.float() + lora.lora_alpha / lora.r * up @ down
            name = name.replace(".base_layer.", ".")
        found[name] = tensor
    return found
