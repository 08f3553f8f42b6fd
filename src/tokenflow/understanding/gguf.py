"""Language models out of GGUF files, unpacked once: the float32 weights stay in the user's cache.

transformers reads the vocabulary of such a file three times in pure Python, which takes most of a minute on a
slow machine, and calls the model quantized even when its weights are plain floats, so that it can neither be
saved nor trained. The copy in the cache is an ordinary folder for `from_pretrained` and loads in a second.
It keeps float32: the file's weights are products of two half-precision numbers, which bfloat16 would round.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tokenflow.errors import NotInstalledError, UserError
from tokenflow.files import atomic_folder


def load_gguf(file: str | Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """The causal language model of a GGUF file, with plain weights of `dtype`, and its tokenizer.

    Raises:
        UserError: no such file, or none that transformers reads.
        NotInstalledError: gguf or accelerate is missing.
    """
    file = Path(file)
    try:
        folder = cache_folder(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    try:
        return _load_folder(folder, dtype)
    except Exception:  # absent or damaged, whatever the reason (tokenizers raises bare Exceptions): made anew
        plain, tokenizer = _unpack(file)
    try:
        with atomic_folder(folder, replace=True) as temporary:
            plain.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except (UserError, OSError) as error:  # OSError: another process wrote it at the same moment
        warnings.warn(f"{error}; until then {file.name} is unpacked at every start", stacklevel=2)
    return _plain(plain, dtype), tokenizer


def cache_folder(file: Path) -> Path:
    """Where the unpacked model of a GGUF file is kept: the name tells its content and who unpacked it.

    It lies with the other things that Hugging Face libraries cache: HF_HOME moves all of them.
    """
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    name = f"{file.stem}-{digest[:16]}-transformers-{transformers.__version__}"
    return Path(constants.HF_ASSETS_CACHE).expanduser() / "tokenflow" / "gguf" / name


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    if not (folder / "tokenizer.json").is_file():  # without it, AutoTokenizer makes an empty vocabulary
        raise FileNotFoundError(folder / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True), tokenizer


def _unpack(file: Path) -> tuple[PreTrainedModel, Any]:
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise NotInstalledError(
                f"reading {file.name} needs {needed}: pip install 'tokenflow-vision[chat]'"
            )
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file} is no language model: {str(error).splitlines()[0]}") from error
    del model.config.quantization_config
    return _plain(model, torch.float32), tokenizer


def _plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a model that knows nothing of quantization."""
    return type(model).from_pretrained(
        None, config=model.config, state_dict=dict(model.state_dict()), dtype=dtype
    )
