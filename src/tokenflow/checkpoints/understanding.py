"""Released understanding models: from their LLaVA-style folder to one for `LlavaForConditionalGeneration`.

The folder holds a config.json of type `llava_qwen` or `llava_llama`, a tokenizer, and weights in any number
of files: the language model under its own names, `model.mm_projector.{0,2}` and, unless training kept the
tower elsewhere, the TokenFlow tokenizer under `model.vision_tower.vision_tower.`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow.checkpoints.released_folder import check_text_tokenizer, read_json, read_weights
from tokenflow.checkpoints.safe_load import CheckpointError, read_state_dict
from tokenflow.checkpoints.tokenizer import REPORT_FILE, convert_state_dict
from tokenflow.errors import UserError
from tokenflow.files import atomic_folder

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel

    from tokenflow.tokenizer.modeling import TokenFlowModel

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = {"model.mm_projector.0.": "linear_1.", "model.mm_projector.2.": "linear_2."}
# The language model that each released type extends, and the conversation template it was trained with.
KINDS = {"llava_qwen": ("qwen2", "qwen_2_5"), "llava_llama": ("llama", "vicuna_v1")}


@dataclass
class UnderstandingReport:
    """What a conversion read and made.

    Attributes:
        source, output: the two folders.
        language_model, template: the model_type, and the conversation template.
        tower: where the tower came from.
        features: N, how many features the language model sees of an image.
        image_token_id: the id of `<image>`.
        grown_rows: rows that embedding table and head got for it.
        tensors, values: how many were read and used, the tower's from another file not counted.
        ignored: `{key in the files: reason}`.
    """

    source: str
    output: str
    language_model: str
    template: str
    tower: str
    features: int
    image_token_id: int
    grown_rows: int
    tensors: int
    values: int
    ignored: dict[str, str]

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        title = Text(f"{self.source} -> {self.output}")
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_row("language model", f"{self.language_model}, template {self.template}")
        table.add_row("tower", f"{self.tower} ({self.features} features an image)")
        grown = f", {self.grown_rows} rows added for it" if self.grown_rows else ""
        table.add_row("<image>", f"id {self.image_token_id}{grown}")
        table.add_row("read", f"{self.tensors:,} tensors, {self.values:,} values")
        reasons = sorted(set(self.ignored.values()))
        table.add_row("ignored", "\n".join(reasons) or "none")
        return table


def is_released_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is one that `convert_understanding` reads."""
    try:
        return read_json(Path(folder, "config.json")).get("model_type") in KINDS
    except CheckpointError:
        return False


def convert_understanding(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
) -> UnderstandingReport:
    """Turn a released understanding folder into one that transformers' LLaVA classes load.

    Args:
        folder: config.json, tokenizer files and weights, as released.
        out: the folder to make; must not exist, or be empty.
        tokenizer: the TokenFlow tokenizer that is the tower, as a released `.pt` or a folder: needed where
            the weights hold none, else taken in place of theirs (which training may have rounded to half
            precision).

    Returns:
        What was read and made; also written to the folder.

    Raises:
        CheckpointError: a file that cannot be read safely, another kind of model, tensors that are missing,
            left over or of another shape.
        UserError: no tower anywhere; `out` is taken or cannot be written.
    """
    import torch

    from tokenflow.understanding.llava import assemble

    folder, out = Path(folder), Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; choose another folder or remove it")
    released = read_json(folder / "config.json")
    if released.get("model_type") not in KINDS:
        raise CheckpointError(
            f"{folder} is no released understanding model: its config says model_type "
            f"{released.get('model_type')!r}, not {' or '.join(KINDS)}"
        )
    kind, template = KINDS[released["model_type"]]
    weights = read_weights(folder)
    of_tower = {key: weights.pop(key) for key in list(weights) if key.startswith(TOWER)}
    of_projector = {
        new + key.removeprefix(old): weights.pop(key)
        for old, new in PROJECTOR.items()
        for key in list(weights)
        if key.startswith(old)
    }
    tower, where, ignored = _tower(folder, of_tower, tokenizer)
    language_model = _language_model(folder, kind, released, weights)
    rows = language_model.config.vocab_size
    model, processor = assemble(tower, language_model, _text_tokenizer(folder), template=template)
    projector = model.model.multi_modal_projector
    _fit(folder, of_projector, {key: list(value.shape) for key, value in projector.state_dict().items()})
    with torch.no_grad():
        projector.load_state_dict(of_projector)
    used = [*weights.values(), *of_projector.values(), *(of_tower.values() if tokenizer is None else ())]
    report = UnderstandingReport(
        source=os.fspath(folder),
        output=os.fspath(out),
        language_model=kind,
        template=template,
        tower=where,
        features=model.config.image_seq_length,
        image_token_id=processor.image_token_id,
        grown_rows=language_model.config.vocab_size - rows,
        tensors=len(used),
        values=sum(tensor.numel() for tensor in used),
        ignored=ignored,
    )
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _tower(
    folder: Path, weights: dict[str, Tensor], tokenizer: str | os.PathLike[str] | None
) -> tuple[TokenFlowModel, str, dict[str, str]]:
    """The vision tower, where it came from, and what was ignored on the way."""
    from tokenflow.tokenizer.modeling import TokenFlowModel

    if tokenizer is not None and Path(tokenizer).is_dir():
        ignored = dict.fromkeys(weights, "the tower of the folder: another one was named")
        return TokenFlowModel.from_pretrained(tokenizer), os.fspath(tokenizer), ignored
    if tokenizer is not None:
        state, _ = read_state_dict(tokenizer)
        source, prefix = os.fspath(tokenizer), ""
        ignored = dict.fromkeys(weights, "the tower of the folder: another one was named")
    elif weights:
        state = {key.removeprefix(TOWER): value for key, value in weights.items()}
        source, prefix, ignored = f"{folder}: {TOWER}*", TOWER, {}
    else:
        raise UserError(
            f"{folder} holds no vision tower; name the tokenizer that it was trained with: --tokenizer FILE"
        )
    config, state, report = convert_state_dict(state, source=source)
    tower = TokenFlowModel(config)
    tower.load_state_dict(state, strict=True, assign=True)
    return tower, source, ignored | {prefix + key: reason for key, reason in report.ignored.items()}


def _language_model(
    folder: Path, kind: str, released: dict[str, Any], weights: dict[str, Tensor]
) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    ours = {key for key in released if key.startswith(("mm_", "image_", "tokenizer_", "tune_", "freeze_"))}
    ours |= {"model_type", "architectures", "transformers_version", "use_mm_proj", "torch_dtype"}
    config = AutoConfig.for_model(kind, **{key: released[key] for key in released.keys() - ours})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = model.state_dict()
    if config.tie_word_embeddings:  # the files hold a tied head once, or twice
        weights.setdefault(
            "lm_head.weight", weights.get("model.embed_tokens.weight", wanted["lm_head.weight"])
        )
    _fit(folder, weights, {key: list(value.shape) for key, value in wanted.items()})
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no file
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _fit(folder: Path, weights: dict[str, Tensor], wanted: dict[str, list[int]]) -> None:
    """Raise a CheckpointError unless names and shapes are those that are `wanted`."""
    for what, keys in (
        ("lacks", wanted.keys() - weights.keys()),
        ("holds, beyond its layout,", weights.keys() - wanted.keys()),
        (
            "has in another shape",
            {k for k in wanted.keys() & weights.keys() if list(weights[k].shape) != wanted[k]},
        ),
    ):
        if keys:
            raise CheckpointError(f"{folder} {what} {len(keys)} tensors, first {min(keys)[:120]}")


def _text_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    check_text_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}"
        ) from error
