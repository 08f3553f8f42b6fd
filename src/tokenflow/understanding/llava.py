"""LLaVA around a TokenFlow tower (Sec. 3.4): every class here is transformers' own.

Notable: the tower gives its features of `config.feature_strategy` as its one hidden state, so LLaVA selects
layer -1 and takes all of it. The tower is frozen, runs in float32 inside a language model of any dtype, and
runs none of its decoders. `<image>` is in no language model's vocabulary: it gets the next free id, and where
that lies beyond the embedding table, the table and the head grow.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tokenflow.bundled import resolve
from tokenflow.errors import UserError
from tokenflow.names import unknown_name
from tokenflow.tokenizer.configuration import FeatureStrategy, TokenFlowConfig
from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
from tokenflow.tokenizer.modeling import TokenFlowModel, check_weights

IMAGE_TOKEN = "<image>"
PARTS_FILE = "parts.json"  # in a folder that names tower and language model instead of storing them
TEMPLATES = ("plain", "qwen_2_5", "smollm2", "vicuna_v1")
_TABLE_MULTIPLE = 64  # rows of a grown table: matrix units like it, and new tokens may follow


def chat_template(name: str) -> str:
    """The Jinja text of a conversation template, as `apply_chat_template` of transformers takes it.

    In a message, images come first, one `<image>` and a newline each. Answers are marked as `generation`, so
    `return_assistant_tokens_mask` gives the tokens to learn: the answer and its end token.

    Args:
        name: one of `TEMPLATES`: `"plain"` (the first training stage), `"vicuna_v1"`, `"qwen_2_5"` (the
            released model) or `"smollm2"`.

    Raises:
        UserError: unknown name; the message suggests the nearest one.
    """
    if name not in TEMPLATES:
        raise unknown_name("chat template", name, TEMPLATES)
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def feature_count(config: TokenFlowConfig) -> int:
    """N, how many features a language model sees of one image: the final grid's, or those of all scales."""
    return config.num_tokens if config.feature_strategy.startswith("all") else config.grid**2


def make_processor(
    tokenizer: Any,
    config: TokenFlowConfig,
    *,
    template: str,
    resize_mode: str = "pad",
) -> LlavaProcessor:
    """What turns messages and pictures into the input of a LLaVA with a tower of `config`.

    Args:
        tokenizer: of the language model; a copy of it gets `<image>` and pads on the left, as generation
            wants.
        config: the tower's.
        template: see `chat_template`.
        resize_mode: how a picture becomes square: `"pad"` (the second stage and inference of the released
            models) or `"squash"` (their first stage).

    Raises:
        UserError: unknown template or resize mode.
    """
    images = TokenFlowImageProcessor(size=config.image_size, resize_mode=resize_mode)
    patch_size = config.image_size // config.grid
    extra = feature_count(config) - (config.image_size // patch_size) ** 2
    return _processor(tokenizer, images, template, patch_size, "full", extra)


def _processor(
    tokenizer: Any, images: Any, template: str, patch_size: int, select: str, extra: int
) -> LlavaProcessor:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only what is in both is saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=extra,
        chat_template=chat_template(template),
        image_token=IMAGE_TOKEN,
    )


def assemble(
    tower: TokenFlowModel,
    language_model: PreTrainedModel,
    tokenizer: Any,
    *,
    template: str,
    feature_strategy: FeatureStrategy | None = None,
    resize_mode: str = "pad",
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of a tokenizer and a causal language model, with a new projector: where training begins.

        tower = TokenFlowModel.from_pretrained("tokenflow-tiny")
        text = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        words = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        model, processor = assemble(tower, text, words, template="smollm2")

    Args:
        tower: becomes the vision tower; not copied.
        language_model: a `...ForCausalLM` of transformers that LLaVA can hold, such as one of Llama's layout;
            its modules are taken over, not copied.
        tokenizer: its tokenizer.
        template: see `chat_template`.
        feature_strategy: the rows of Tab. 8; by default the tower's own.
        resize_mode: see `make_processor`.

    Returns:
        The model, in the language model's dtype and on its device, and its processor.

    Raises:
        UserError: unknown template, strategy or resize mode; a language model that LLaVA cannot hold.
    """
    check_language_model(language_model)
    vision: Any = tower.config
    if feature_strategy is not None:
        vision = tower.config = TokenFlowConfig.from_dict(vision.to_dict(), feature_strategy=feature_strategy)
    processor = make_processor(tokenizer, vision, template=template, resize_mode=resize_mode)
    return _assemble(tower, language_model, processor, feature_count(vision), layer=-1)


def assemble_continuous(
    tower: PreTrainedModel,
    image_processor: Any,
    language_model: PreTrainedModel,
    tokenizer: Any,
    *,
    template: str,
    layer: int = -2,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The same with an ordinary vision tower, such as the tokenizer's continuous teacher (Tab. 9).

    Args:
        tower: a vision model that transformers' LLaVA takes: `CLIPVisionModel`, `SiglipVisionModel`, ...
        image_processor: its image processor; a `TokenFlowImageProcessor` with the tower's mean and standard
            deviation shows it the same crops as a tokenizer gets.
        language_model, tokenizer, template: as in `assemble`.
        layer: the hidden state that is used; a class token is dropped.

    Raises:
        UserError: unknown template; a language model that LLaVA cannot hold.
    """
    check_language_model(language_model)
    vision: Any = tower.config
    patches = (vision.image_size // vision.patch_size) ** 2
    zeros = torch.zeros(1, 3, vision.image_size, vision.image_size, device=tower.device, dtype=tower.dtype)
    with torch.no_grad():
        class_tokens = tower(zeros).last_hidden_state.shape[1] - patches
    select = "default" if class_tokens else "full"  # "default" drops one token
    processor = _processor(tokenizer, image_processor, template, vision.patch_size, select, class_tokens)
    return _assemble(tower, language_model, processor, patches + max(class_tokens - 1, 0), layer)


def _assemble(
    tower: PreTrainedModel,
    language_model: PreTrainedModel,
    processor: LlavaProcessor,
    features: int,
    layer: int,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    unused = grow_vocabulary(language_model, processor.image_token_id)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=processor.image_token_id,
        image_seq_length=features,
        vision_feature_layer=layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # a shell: the parts take the place of its own
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = copy.deepcopy(language_model.generation_config)
    model.generation_config.suppress_tokens = unused
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.to(language_model.device, language_model.dtype)  # type: ignore[arg-type]
    tower.requires_grad_(False)
    return model.eval(), processor


def check_language_model(language_model: PreTrainedModel) -> None:
    """Raise UserError where transformers' LLaVA cannot hold a language model.

    It ties its head to a table `embed_tokens` only, and its own head has no bias: a saved one would be lost.
    """
    head: Any = language_model.get_output_embeddings()
    if language_model.config.tie_word_embeddings and not hasattr(language_model.base_model, "embed_tokens"):
        reason = "has a head tied to a table of another name than embed_tokens"
    elif head.bias is not None:
        reason = "has a head with a bias"
    else:
        return
    raise UserError(
        f"{type(language_model).__name__} {reason}, which transformers' LLaVA cannot hold; take one of "
        "Llama's layout"
    )


@torch.no_grad()
def grow_vocabulary(language_model: PreTrainedModel, image_token_id: int) -> list[int]:
    """Give the embedding table and the head a row for `image_token_id`, if they lack one.

    LLaVA embeds all ids before it puts the features in their places, so the row must be there, though its
    values are never used. Tables grow to a multiple of 64; new rows are the mean of the old ones.

    Returns:
        The ids that must never be generated: that of `<image>`, and the new rows.
    """
    rows = len(_tables(language_model)[0])
    if image_token_id < rows:
        return [image_token_id]
    language_model.resize_token_embeddings(
        image_token_id + 1, pad_to_multiple_of=_TABLE_MULTIPLE, mean_resizing=False
    )
    for table in _tables(language_model):
        table[rows:] = table[:rows].float().mean(0).to(table.dtype)
    return list(range(rows, len(table)))


def _tables(language_model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ends: tuple[Any, Any] = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    return ends[0].weight, ends[1].weight


def load(
    name_or_path: str | Path, *, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with a TokenFlow tower, and its processor, by bundled name, folder or hub name.

    Args:
        device: "auto" (a GPU if there is one), or any device that torch knows.
        dtype: of the language model, projector and decoders; "auto" is that of the file. Encoders and
            quantizer are float32 in any case.

    Raises:
        UserError: no such model, another kind of model, a folder that is damaged or lacks weights, or no such
            device.
    """
    folder = resolve(name_or_path)
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "llava":
            raise UserError(
                f"{name_or_path} answers no questions: its config says {config.model_type!r}, not 'llava'"
            )
        model, processor = _load(folder, dtype)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load model {name_or_path}: {str(error).splitlines()[0]}") from error
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        return model.to(device).eval(), processor  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error


def _load(folder: str, dtype: str | torch.dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    if Path(folder, PARTS_FILE).is_file():
        from tokenflow.understanding.parts import load_parts  # which builds on this file

        whole = torch.float32 if dtype == "auto" else dtype
        return load_parts(folder, getattr(torch, whole) if isinstance(whole, str) else whole)
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    model, report = loaded
    check_weights(folder, "missing", report["missing_keys"])
    check_weights(folder, "of another shape", [key for key, *_ in report["mismatched_keys"]])
    return model, AutoProcessor.from_pretrained(folder)
