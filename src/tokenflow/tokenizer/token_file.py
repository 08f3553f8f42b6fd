"""Tokens on disk: one safetensors file with the indices of many images, and what is needed to decode them.

The tensor `indices` is `[N, L]`, uint16 where the codebook allows it (2 bytes a token), else int32. The
metadata names the model, its codebook fingerprint, codebook size, scales and image size, and each image's
file name and original width and height.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from tokenflow.errors import UserError
from tokenflow.files import atomic_write

if TYPE_CHECKING:
    from tokenflow.tokenizer.modeling import TokenFlowModel

FORMAT = "tokenflow-tokens-1"


@dataclass(frozen=True)
class TokenFile:
    """Tokens of N images and where they come from.

    Attributes:
        indices: `[N, L]` int64, scales in order, row-major.
        model: the name or path that the model was loaded by.
        fingerprint: `codebook_fingerprint` of that model.
        codebook_size, scales, image_size: of that model.
        files: N file names.
        sizes: N original sizes, (width, height) in pixels.
    """

    indices: Tensor
    model: str
    fingerprint: str
    codebook_size: int
    scales: list[int]
    image_size: int
    files: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def check_model(self, model: TokenFlowModel, name: str) -> None:
        """Raise UserError unless these tokens mean in `model` what they meant in the model that made them."""
        config = model.config
        for what, here, there in (
            ("scales", self.scales, config.scales),
            ("codebook size", self.codebook_size, config.codebook_size),
            ("codebook", self.fingerprint[:12], codebook_fingerprint(model)[:12]),
        ):
            if here != there:
                raise UserError(
                    f"these tokens were made by model {self.model!r} ({what} {here}) and cannot be decoded "
                    f"with {name!r} ({what} {there}); give --model {self.model}"
                )


def codebook_fingerprint(model: TokenFlowModel) -> str:
    """sha256 over the flows' names, dimensions and codes and the scales: what gives an index its meaning.

    Decoders are left out: tokens stay valid when only a decoder is fine-tuned.
    """
    digest = hashlib.sha256(json.dumps([model.config.scales, model.dims]).encode())
    # The stored rows, not the normalised ones: those differ in the last bit between devices.
    for codebook in model.quantizer.quantizer.codebooks.values():
        digest.update(codebook.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(model: TokenFlowModel) -> str:
    """sha256 over all that turns pixels into indices: `codebook_fingerprint`, image size, encoders.

    Two models of equal fingerprint give an image the same tokens; decoders may differ.
    """
    digest = hashlib.sha256(codebook_fingerprint(model).encode())
    flows = [(flow.name, flow.weight) for flow in model.config.flow_specs]
    digest.update(json.dumps([model.config.image_size, model.config.l2_norm, flows]).encode())
    for name, tensor in sorted(model.encoders.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_tokens(path: str | os.PathLike[str], tokens: TokenFile) -> None:
    """Write `path`, whole or not at all. Raises UserError where it cannot be written."""
    narrow = np.uint16 if tokens.codebook_size <= 2**16 else np.int32
    metadata = {
        "format": FORMAT,
        "model": tokens.model,
        "fingerprint": tokens.fingerprint,
        "codebook_size": str(tokens.codebook_size),
        "scales": json.dumps(tokens.scales),
        "image_size": str(tokens.image_size),
        "files": json.dumps(tokens.files),
        "sizes": json.dumps(tokens.sizes),
    }
    data = save({"indices": tokens.indices.cpu().numpy().astype(narrow)}, metadata)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)  # not save_file, whose errors do not say that the disk is full


def load_tokens(path: str | os.PathLike[str]) -> TokenFile:
    """Read what `save_tokens` wrote; nothing in the file is trusted.

    Raises:
        UserError: missing, unreadable, truncated, no token file, or a file that contradicts itself.
    """
    name = os.fspath(path)
    try:
        with safe_open(name, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{name} is not a token file of this version (format {metadata.get('format')!r})"
                )
            raw = file.get_tensor("indices")
        tokens = TokenFile(
            indices=torch.from_numpy(raw.astype(np.int64)),
            model=metadata["model"],
            fingerprint=metadata["fingerprint"],
            codebook_size=int(metadata["codebook_size"]),
            scales=[int(side) for side in json.loads(metadata["scales"])],
            image_size=int(metadata["image_size"]),
            files=[str(file) for file in json.loads(metadata["files"])],
            sizes=[(int(width), int(height)) for width, height in json.loads(metadata["sizes"])],
        )
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"cannot read token file {name}: no such file") from error
    except OSError as error:
        raise UserError(f"cannot read token file {name}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"cannot read token file {name}: it is damaged or no token file ({error})") from error
    _check(tokens, raw, name)
    return tokens


def _check(tokens: TokenFile, raw: np.ndarray, name: str) -> None:
    length = sum(side * side for side in tokens.scales)
    problem = None
    if raw.dtype not in (np.uint16, np.int32) or raw.ndim != 2:
        problem = f"indices are {raw.dtype} {list(raw.shape)}, not whole numbers [N, L]"
    elif raw.shape[1] != length:
        problem = f"{raw.shape[1]} tokens an image, but scales {tokens.scales} have {length}"
    elif not len(raw) == len(tokens.files) == len(tokens.sizes):
        problem = f"{len(raw)} images, {len(tokens.files)} file names and {len(tokens.sizes)} sizes"
    elif raw.size and not (raw.min() >= 0 and raw.max() < tokens.codebook_size):
        problem = f"indices run from {raw.min()} to {raw.max()}, outside a codebook of {tokens.codebook_size}"
    if problem:
        raise UserError(f"token file {name} contradicts itself: {problem}")
