"""Released text-to-image folders as folders for `TextToImagePipeline.from_pretrained`.

A released folder holds a config.json of type `llava_llama`, a text tokenizer with `[PAD]` and all visual
tokens, and weights in any number of files. The image tokenizer is not in it: its `.pt` lies beside it or is
named.
"""

from __future__ import annotations

import json
import os
import re
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

    from tokenflow.generation.configuration import TokenFlowTextToImageConfig
    from tokenflow.generation.modeling import TokenFlowForTextToImage
    from tokenflow.tokenizer.modeling import TokenFlowModel

# Keys of ours and of the released code. The released code kept Llama's names for norms that it had moved: its
# "post_attention_layernorm" sits after the feed-forward layer.
_RULES = (
    (r"\.post_attention_layernorm\.", ".input_layernorm."),
    (r"\.post_feedforward_layernorm\.", ".post_attention_layernorm."),
    (r"\.self_attn\.q_norm\.", ".self_attn.qknorm.query_norm."),
    (r"\.self_attn\.k_norm\.", ".self_attn.qknorm.key_norm."),
    (r"^model\.visual_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.visual_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.scale_embedding\.weight$", "model.lvl_embed.weight"),
    (r"^model\.image_position_embedding\.weight$", "model.pos_1LC"),
)
_UNUSED = (
    (r"image_token_(start|end)", "ids that the vocabulary's sizes give"),
    (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "constants that the configuration gives"),
)
_CODES = "code_table.codes"  # ours, from the image tokenizer
_EMBEDDING = "model.embed_tokens.weight"
_VISUAL_TOKEN = re.compile(r"<vq_token_\d+>")
_LLAMA_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "initializer_range",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)
MAX_TEXT_TOKENS = 128  # the released code's own


@dataclass
class TextToImageReport:
    """What a conversion read, renamed and ignored.

    Attributes:
        source, output, tokenizer: the two folders, and the image tokenizer's file or folder.
        layers, hidden_size: of the language model.
        text_tokens, codebook_size: its vocabulary; `[PAD]` is one of the former.
        scales: of the image tokenizer.
        dropped_rows: embedding rows of visual tokens, which nothing ever reads.
        tensors, values: how many were read from the folder and used.
        renamed: `(key in the files, key in the model)`.
        ignored: `{key in the files: reason}`.
        tokenizer_report: that of the image tokenizer's conversion; None if it was a folder already.
    """

    source: str
    output: str
    tokenizer: str
    layers: int
    hidden_size: int
    text_tokens: int
    codebook_size: int
    scales: list[int]
    dropped_rows: int
    tensors: int
    values: int
    renamed: list[tuple[str, str]]
    ignored: dict[str, str]
    tokenizer_report: dict[str, Any] | None

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        title = Text(f"{self.source} -> {self.output}")
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_row("language model", f"{self.layers} layers of width {self.hidden_size:,}")
        table.add_row("vocabulary", f"{self.text_tokens:,} text tokens, {self.codebook_size:,} codes")
        table.add_row("image tokenizer", self.tokenizer)
        table.add_row(
            "scales", f"{' '.join(map(str, self.scales))} ({sum(s * s for s in self.scales)} tokens)"
        )
        table.add_row("read", f"{self.tensors:,} tensors, {self.values:,} values")
        table.add_row("renamed", f"{len(self.renamed):,} (listed in {REPORT_FILE})")
        table.add_row(
            "dropped", f"{self.dropped_rows:,} embedding rows of visual tokens, which are never read"
        )
        reasons = sorted(set(self.ignored.values()))
        table.add_row("ignored", "\n".join(reasons) or "none")
        return table


def is_text_to_image_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is one that `convert_text_to_image` reads."""
    try:
        config = read_json(Path(folder, "config.json"))
    except CheckpointError:
        return False
    return config.get("model_type") == "llava_llama" and config.get("mm_vision_vq_type") == "TOKEN_FLOW"


def convert_text_to_image(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> TextToImageReport:
    """Turn a released text-to-image folder into one for `TextToImagePipeline.from_pretrained`.

    Weights keep the precision of their files. The new folder appears whole or not at all.

    Args:
        folder: config.json, text tokenizer and weights, as released.
        out: the folder to make; must not exist, or be empty.
        tokenizer: the image tokenizer it was trained with: a released `.pt`, or a folder of a
            `TokenFlowModel`. By default the file that config.json names, if it lies in or beside `folder`.
        image_size: see `checkpoints.tokenizer.convert_tokenizer`.

    Returns:
        What was read, renamed and ignored; also written to the folder.

    Raises:
        CheckpointError: a file that cannot be read safely, another kind of model, tensors that are missing,
            left over or of another shape.
        UserError: no image tokenizer, or one that does not fit; `out` is taken or cannot be written.
    """
    from tokenflow.generation.pipeline import TextToImagePipeline

    folder, out = Path(folder), Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; choose another folder or remove it")
    released = read_json(folder / "config.json")
    if not is_text_to_image_folder(folder):
        raise CheckpointError(
            f"{folder} is no released text-to-image model: config.json has model_type "
            f"{released.get('model_type')!r} and mm_vision_vq_type {released.get('mm_vision_vq_type')!r}, "
            "not 'llava_llama' and 'TOKEN_FLOW'"
        )
    place = _tokenizer_place(folder, released, tokenizer)
    image_tokenizer, tokenizer_report = _image_tokenizer(place, image_size)
    config, text_tokenizer = _configuration(folder, released, image_tokenizer)
    weights = read_weights(folder)
    model, renamed, ignored = _language_model(config, weights, folder)
    model.set_codebooks(image_tokenizer)
    report = TextToImageReport(
        source=os.fspath(folder),
        output=os.fspath(out),
        tokenizer=os.fspath(place),
        layers=config.text_config.num_hidden_layers,
        hidden_size=config.text_config.hidden_size,
        text_tokens=config.text_vocab_size,
        codebook_size=config.codebook_size,
        scales=list(config.scales),
        dropped_rows=config.codebook_size,
        tensors=len(renamed),
        values=sum(weights[key].numel() for key, _ in renamed),
        renamed=renamed,
        ignored=ignored,
        tokenizer_report=tokenizer_report,
    )
    pipeline = TextToImagePipeline(model, text_tokenizer, image_tokenizer)
    with atomic_folder(out) as temporary:
        pipeline.save_pretrained(temporary)
        (temporary / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def released_key(key: str) -> str:
    """Where the released layout keeps one of our tensors (a key of a `TokenFlowForTextToImage`)."""
    for pattern, replacement in _RULES:
        renamed = re.sub(pattern, replacement, key)
        if renamed != key:
            return renamed
    return key


def _tokenizer_place(folder: Path, released: dict[str, Any], named: str | os.PathLike[str] | None) -> Path:
    if named is not None:
        return Path(named)
    name = Path(str(released.get("mm_vision_tower", ""))).name
    for place in (folder / name, folder.parent / name):
        if name and place.is_file():
            return place
    raise UserError(
        f"the image tokenizer {name or 'of this model'} is neither in {folder} nor beside it; "
        "name it: --tokenizer FILE"
    )


def _image_tokenizer(place: Path, image_size: int | None) -> tuple[TokenFlowModel, dict[str, Any] | None]:
    import torch

    from tokenflow.tokenizer.modeling import TokenFlowModel

    if place.is_dir():
        return TokenFlowModel.from_pretrained(place), None
    weights, wrapper = read_state_dict(place)
    config, state, report = convert_state_dict(weights, image_size, source=os.fspath(place))
    with torch.device("meta"):
        model = TokenFlowModel(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model, asdict(report) | {"wrapper": wrapper}


def _configuration(
    folder: Path, released: dict[str, Any], image_tokenizer: TokenFlowModel
) -> tuple[TokenFlowTextToImageConfig, Any]:
    """The configuration, and the text tokenizer without the visual tokens."""
    from huggingface_hub.errors import StrictDataclassError

    from tokenflow.generation.configuration import TokenFlowTextToImageConfig
    from tokenflow.generation.prompt import add_pad_token, marker_ids

    full, codes = (_integer(folder, released, name) for name in ("vocab_size", "vq_codebook_size"))
    base = full - codes - 1
    if codes != image_tokenizer.config.codebook_size:
        raise UserError(
            f"{folder} was trained with {codes:,} codes, the image tokenizer has "
            f"{image_tokenizer.config.codebook_size:,}; name the right one: --tokenizer FILE"
        )
    text_tokenizer = _text_tokenizer(folder)
    pad = add_pad_token(text_tokenizer)
    if pad != base:
        raise CheckpointError(
            f"{folder}: [PAD] has id {pad} in the text tokenizer, but {base} by vocab_size {full:,}"
        )
    opening, closing = marker_ids(text_tokenizer)
    text = {name: released[name] for name in _LLAMA_KEYS if released.get(name) is not None}
    try:
        config = TokenFlowTextToImageConfig(
            text_config={**text, "vocab_size": base + 1, "pad_token_id": pad},
            codebook_size=codes,
            scales=image_tokenizer.config.scales,
            flow_dims=[flow.dim for flow in image_tokenizer.config.flow_specs],
            max_text_tokens=MAX_TEXT_TOKENS,
            image_open_ids=opening,
            image_close_ids=closing,
            pad_token_id=pad,
            bos_token_id=text_tokenizer.bos_token_id,
            eos_token_id=text_tokenizer.eos_token_id,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:  # of the file's values
        raise CheckpointError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:300]}") from error
    return config, text_tokenizer


def _integer(folder: Path, released: dict[str, Any], name: str) -> int:
    if not isinstance(released.get(name), int):
        raise CheckpointError(f"{folder / 'config.json'}: {name} is {released.get(name)!r}, not an integer")
    return released[name]


def _text_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer without visual tokens: in a prompt they would be ids without an embedding."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_text_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever damaged files make the libraries raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} has no text tokenizer that can be read: {reason}") from error
    added = content["added_tokens"]
    content["added_tokens"] = [token for token in added if not _VISUAL_TOKEN.fullmatch(token["content"])]
    special = ("bos_token", "eos_token", "unk_token")
    names = {name: getattr(tokenizer, name) for name in special if getattr(tokenizer, name) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)


def _language_model(
    config: TokenFlowTextToImageConfig, weights: dict[str, Tensor], folder: Path
) -> tuple[TokenFlowForTextToImage, list[tuple[str, str]], dict[str, str]]:
    """The model, the pairs of keys, and what was ignored."""
    import torch

    from tokenflow.generation.modeling import TokenFlowForTextToImage

    with torch.device("meta"):
        model = TokenFlowForTextToImage(config)
    wanted = {key: list(tensor.shape) for key, tensor in model.state_dict().items() if key != _CODES}
    places = {key: released_key(key) for key in wanted}
    missing = [old for old in places.values() if old not in weights]
    if missing:
        raise CheckpointError(f"{folder} lacks {_first(missing)}")
    wanted[_EMBEDDING][0] = config.full_vocab_size
    wrong = [
        f"{old} {list(weights[old].shape)} {weights[old].dtype}, not {wanted[key]} floating point"
        for key, old in places.items()
        if list(weights[old].shape) != wanted[key] or not weights[old].is_floating_point()
    ]
    if wrong:
        raise CheckpointError(f"{folder} has in another shape or type {_first(wrong)}")
    ignored, unexpected = {}, []
    for key in weights.keys() - places.values():
        reasons = [reason for pattern, reason in _UNUSED if re.fullmatch(pattern, key)]
        if reasons:
            ignored[key] = reasons[0]
        else:
            unexpected.append(key)
    if unexpected:
        raise CheckpointError(f"{folder} has beyond its layout {_first(sorted(unexpected))}")
    state = {key: weights[old].contiguous() for key, old in places.items()}
    state[_EMBEDDING] = state[_EMBEDDING][: config.text_vocab_size].clone()
    state[_CODES] = torch.zeros(config.codebook_size, config.code_dim)
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config.text_config)  # its buffers are in no file
    return model, [(old, key) for key, old in places.items()], ignored


def _first(names: list[str]) -> str:
    shown = ", ".join(str(name)[:120] for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {shown}{more}"
