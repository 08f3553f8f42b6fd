"""What `tokenflow info` says of a model or a token file, without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from tokenflow.bundled import resolve
from tokenflow.codec import first_line, tokenizer_config
from tokenflow.errors import UserError
from tokenflow.generation.class_conditional import TokenFlowClassToImageConfig
from tokenflow.generation.configuration import TokenFlowTextToImageConfig
from tokenflow.generation.pictures import IMAGE_TOKENIZER, model_kind
from tokenflow.tokenizer.token_file import load_tokens


def describe(name: str) -> dict[str, str]:
    """What there is to know about a tokenizer, a teacher, a model that draws or answers, a token file.

    Raises:
        UserError: none of these, or damaged.
    """
    if Path(name).is_file():
        return _token_file(name)
    if name.endswith(".safetensors") and not Path(name).exists():
        raise UserError(f"cannot read token file {name}: no such file")
    folder = Path(resolve(name))
    kinds = {
        TokenFlowTextToImageConfig.model_type: _text_to_image,
        TokenFlowClassToImageConfig.model_type: _class_to_image,
        "llava": _chat,
        "clip_vision_model": _teacher,
    }
    about = kinds.get(model_kind(str(folder)) or "", _tokenizer)(name)
    for part in ("", IMAGE_TOKENIZER):
        for file in sorted((folder / part).glob("*.safetensors")):
            about[str(file.relative_to(folder))] = _weights_line(file)
    if folder.is_dir():
        about["folder"] = str(folder)
    return about


def _token_file(name: str) -> dict[str, str]:
    tokens = load_tokens(name)
    return {
        "token file": name,
        "made by": f"{tokens.model} (codebook {tokens.fingerprint[:12]})",
        "images": f"{len(tokens.files)} of {tokens.image_size} x {tokens.image_size} px",
        "tokens per image": f"{tokens.indices.shape[1]} of {tokens.codebook_size:,} codes",
        "scales": " ".join(map(str, tokens.scales)),
        "files": ", ".join(tokens.files[:5]) + (" ..." if len(tokens.files) > 5 else ""),
    }


def _tokenizer(name: str) -> dict[str, str]:
    config = tokenizer_config(name)
    flows = [f"{flow.name} {flow.dim} dims, weight {flow.weight:g}" for flow in config.flow_specs]
    return {
        "model": name,
        "image": f"{config.image_size} x {config.image_size} px",
        "tokens per image": f"{config.num_tokens} of {config.codebook_size:,} codes",
        "scales": " ".join(map(str, config.scales)),
        "flows": "; ".join(flows),
    }


def _text_to_image(name: str) -> dict[str, str]:
    config = _config(name)
    return {
        "model": name,
        "draws from": f"prompts of up to {config.max_text_tokens} tokens",
        "language model": _sizes(config.text_config),
        **_drawn(config),
    }


def _class_to_image(name: str) -> dict[str, str]:
    config = _config(name)
    return {
        "model": name,
        "draws from": f"labels, 0 to {config.num_classes - 1}",
        "transformer": f"{config.depth} layers of {config.hidden_size}",
        **_drawn(config),
    }


def _drawn(config: Any) -> dict[str, str]:
    return {
        "tokens per image": f"{config.num_image_tokens} of {config.codebook_size:,} codes",
        "scales": " ".join(map(str, config.scales)),
    }


def _chat(name: str) -> dict[str, str]:
    config = _config(name)
    tower = config.vision_config
    strategy = getattr(tower, "feature_strategy", None)  # other towers than ours have none
    return {
        "model": name,
        "answers": "questions about pictures",
        "language model": f"{config.text_config.model_type}, {_sizes(config.text_config)}",
        "tower": f"{tower.model_type}, {tower.image_size} x {tower.image_size} px"
        + (f", features {strategy!r}" if strategy else ""),
        "tokens per image": str(config.image_seq_length),
    }


def _teacher(name: str) -> dict[str, str]:
    config = _config(name)
    return {
        "model": name,
        "gives": f"features of pictures, {config.num_hidden_layers} layers of {config.hidden_size}",
        "image": f"{config.image_size} x {config.image_size} px in patches of {config.patch_size}",
    }


def _sizes(text: Any) -> str:
    return f"{text.num_hidden_layers} layers of {text.hidden_size}, {text.vocab_size:,} tokens"


def _config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve(name))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load model {name}: {first_line(error)}") from error


def _weights_line(file: Path) -> str:
    try:
        with safe_open(file, "pt") as tensors:
            slices = [tensors.get_slice(key) for key in tensors.keys()]  # noqa: SIM118 (not a dict)
            values = sum(torch.Size(part.get_shape()).numel() for part in slices)
            dtypes = sorted({part.get_dtype() for part in slices})
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {first_line(error)}") from error
    return f"{values / 1e6:.2f} M values, {', '.join(dtypes)}, {file.stat().st_size / 1e6:.1f} MB"
