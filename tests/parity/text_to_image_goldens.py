"""The model and the files of the parity case `t2i_tiny`. "README" is tests/parity/t2i_tiny/README.md."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from seeded_weights import load_manifest, seeded_state_dict
from torch import Tensor

from tokenflow.checkpoints.text_to_image import released_key
from tokenflow.generation.configuration import TokenFlowTextToImageConfig
from tokenflow.generation.modeling import TokenFlowForTextToImage

FOLDER = Path(__file__).parent / "t2i_tiny"
CASE = json.loads((FOLDER / "case.json").read_text())

# README section 12.
FEATURE_ATOL = 1e-5
LOGIT_ATOL = 1e-4  # hidden states, logits, per-token losses
LOSS_ATOL = 1e-5
GRAD_RTOL = 1e-3
GUIDED_ATOL = 5e-4
PROBABILITY_ATOL = 1e-6


def load(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@lru_cache(maxsize=1)
def released_state() -> dict[str, Tensor]:
    """The released layout's state dict. Read only."""
    return seeded_state_dict(load_manifest(FOLDER / "manifest.json"), CASE["seed"])


@lru_cache(maxsize=1)
def codes() -> Tensor:
    """The code vectors `[K, 40]`, normalised flow by flow."""
    books = seeded_state_dict(load_manifest(FOLDER / "codebook_manifest.json"), CASE["seed"])
    flows = ("vqkd", "vqgan")
    return torch.cat([F.normalize(books[f"quantize.embedding_{flow}.weight"], dim=-1) for flow in flows], 1)


def config() -> TokenFlowTextToImageConfig:
    values, ids = CASE["config"], CASE["ids"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_act")
    text = {name: values[name] for name in names}
    return TokenFlowTextToImageConfig(
        text_config={**text, "vocab_size": ids["base_vocab"] + 1},
        codebook_size=values["codebook_size"],
        scales=values["scales"],
        max_text_tokens=CASE["max_text_tokens"],
        image_open_ids=ids["image_open"],
        image_close_ids=ids["image_close"],
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )


def golden_model() -> TokenFlowForTextToImage:
    """The seeded model, keys by `released_key`."""
    model = TokenFlowForTextToImage(config()).eval()
    state = {}
    for key, tensor in model.state_dict().items():
        if key == "code_table.codes":
            state[key] = codes()
        else:
            state[key] = released_state()[released_key(key)][: len(tensor)]
    model.load_state_dict(state)
    return model
