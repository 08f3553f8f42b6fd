"""What a generator's training begins with and ends in: the model, its frozen tokenizer, a folder to load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from tokenflow.bundled import resolve
from tokenflow.codec import Loaded, load
from tokenflow.errors import UserError
from tokenflow.generation.class_conditional import TokenFlowClassToImageConfig, TokenFlowForClassToImage
from tokenflow.generation.configuration import TokenFlowTextToImageConfig
from tokenflow.generation.modeling import TokenFlowForTextToImage
from tokenflow.generation.pictures import IMAGE_TOKENIZER, model_kind
from tokenflow.generation.prompt import encode_prompts, marker_ids
from tokenflow.hub import check_model
from tokenflow.tokenizer.modeling import TokenFlowModel
from tokenflow.tokenizer.token_file import tokenizer_fingerprint
from tokenflow.training.generation_data import ClassCollator, GenerationRows, PromptCollator
from tokenflow.training.text_to_image_recipe import ClassModelRecipe, LanguageModelRecipe
from tokenflow.training.text_tokenizer import train_text_tokenizer

# What a run cannot change about its model when it goes on, as the configurations call it.
FIXED = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_text_tokens",
    "depth",
    "num_classes",
)


@dataclass(frozen=True)
class Generator:
    """A generator in training. `text_tokenizer` is None for a class-conditional one."""

    model: PreTrainedModel
    image_tokenizer: Loaded
    text_tokenizer: Any = None

    @property
    def collator(self) -> PromptCollator | ClassCollator:
        """Items of `GenerationRows` to arguments of the model."""
        config = self.model.config
        if self.text_tokenizer is None:
            return ClassCollator(config.num_classes)
        return PromptCollator(self.text_tokenizer, config.max_text_tokens, config.image_open_ids)

    @torch.no_grad()
    def pictures(self, prompts: Sequence[str], guidance_scale: float) -> Tensor:
        """One picture of each prompt (class-conditional: of the first labels), uint8 `[B, 3, H, W]`."""
        from tokenflow.training.samples import to_uint8

        model: Any = self.model
        options = {"guidance_scale": guidance_scale, "seed": list(range(len(prompts)))}
        if self.text_tokenizer is None:
            labels = torch.arange(len(prompts)) % model.config.num_classes
            codes = model.generate_indices(labels.to(model.device), **options)
        else:
            config = model.config
            ids, mask = encode_prompts(
                self.text_tokenizer, prompts, config.max_text_tokens, config.image_open_ids
            )
            codes = model.generate_indices(ids.to(model.device), mask.to(model.device), **options)
        tokenizer = self.image_tokenizer.model
        quantized = tokenizer.quantized_from_indices(codes.to(tokenizer.device))
        return to_uint8(tokenizer.decode_pixels(quantized))

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A folder for `from_pretrained` of a pipeline; `weights` is a full state dict of the model."""
        self.model.save_pretrained(folder, state_dict={name: t.clone() for name, t in weights.items()})
        if self.text_tokenizer is not None:
            self.text_tokenizer.save_pretrained(folder)
        self.image_tokenizer.model.save_pretrained(folder / IMAGE_TOKENIZER)
        self.image_tokenizer.processor.save_pretrained(folder / IMAGE_TOKENIZER)


def build_generator(
    recipe: LanguageModelRecipe | ClassModelRecipe,
    image_tokenizer: Loaded,
    rows: GenerationRows,
    folder: Path,
    seed: int,
) -> Generator:
    """The model of a recipe with the tokenizer's code vectors.

    Args:
        rows: a new model's text tokenizer is learned from their captions.
        folder: of the run; the text tokenizer is kept there, so that a resumed run has the same.
        seed: of a new model's weights.

    Raises:
        UserError: a model cannot be loaded or does not fit the image tokenizer.
    """
    torch.manual_seed(seed)
    if isinstance(recipe, ClassModelRecipe):
        return Generator(_class_model(recipe, image_tokenizer), image_tokenizer)
    source = recipe.init_from or recipe.language_model
    try:
        if recipe.init_from is not None:
            start = _of_kind(recipe.init_from, TokenFlowTextToImageConfig.model_type)
            text_tokenizer = AutoTokenizer.from_pretrained(start)
            model = TokenFlowForTextToImage.from_pretrained(start)
            model.set_codebooks(image_tokenizer.model)
        elif recipe.language_model is not None:
            check_model(recipe.language_model, "language model")
            text_tokenizer = AutoTokenizer.from_pretrained(recipe.language_model)
            model = TokenFlowForTextToImage.from_llama(
                recipe.language_model, text_tokenizer, image_tokenizer.model, recipe.max_text_tokens
            )
        else:
            text_tokenizer = _own_text_tokenizer(recipe, rows, folder)
            model = new_language_model(recipe, image_tokenizer, text_tokenizer)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load language model {source}: {str(error).splitlines()[0]}") from error
    return Generator(model, image_tokenizer, text_tokenizer)


def check_same_tokenizer(export: Path, fingerprint: str, name: str) -> None:
    """Raise UserError unless the run that made `export` goes on with the tokens that it learned.

    Args:
        fingerprint: `tokenizer_fingerprint` of the image tokenizer called `name`.
    """
    before = tokenizer_fingerprint(TokenFlowModel.from_pretrained(export / IMAGE_TOKENIZER))
    if before != fingerprint:
        raise UserError(
            f"the run learned the codes of another image tokenizer (fingerprint {before[:12]}) than {name} "
            f"(fingerprint {fingerprint[:12]}); another --output-dir starts anew"
        )


def check_same_sizes(export: Path, model: PreTrainedModel) -> None:
    """Raise UserError, naming what differs, unless the run that made `export` can go on with `model`."""
    before, now = (
        values.get("text_config", {}) | values
        for values in (AutoConfig.from_pretrained(export).to_dict(), model.config.to_dict())
    )
    for name in FIXED:
        if before.get(name) != now.get(name):
            raise UserError(
                f"the run's model has {name} {before.get(name)}, not {now.get(name)}; "
                "another --output-dir starts anew"
            )


def new_language_model(
    recipe: LanguageModelRecipe, image_tokenizer: Loaded, text_tokenizer: Any
) -> TokenFlowForTextToImage:
    """A decoder of the recipe's sizes with random weights."""
    config = image_tokenizer.model.config
    opening, closing = marker_ids(text_tokenizer)
    length = recipe.max_text_tokens + len(opening) + config.num_tokens + len(closing) + 1
    model = TokenFlowForTextToImage(
        TokenFlowTextToImageConfig(
            text_config={
                "vocab_size": len(text_tokenizer),
                "hidden_size": recipe.hidden_size,
                "intermediate_size": recipe.intermediate_size,
                "num_hidden_layers": recipe.layers,
                "num_attention_heads": recipe.heads,
                "num_key_value_heads": recipe.heads,
                "max_position_embeddings": length,
                "pad_token_id": text_tokenizer.pad_token_id,
                "bos_token_id": text_tokenizer.bos_token_id,
                "eos_token_id": text_tokenizer.eos_token_id,
            },
            codebook_size=config.codebook_size,
            scales=config.scales,
            flow_dims=[flow.dim for flow in config.flow_specs],
            max_text_tokens=recipe.max_text_tokens,
            image_open_ids=opening,
            image_close_ids=closing,
            pad_token_id=text_tokenizer.pad_token_id,
            bos_token_id=text_tokenizer.bos_token_id,
            eos_token_id=text_tokenizer.eos_token_id,
        )
    )
    model.set_codebooks(image_tokenizer.model)
    model.start_head_from_codes()
    return model


def _own_text_tokenizer(recipe: LanguageModelRecipe, rows: GenerationRows, folder: Path) -> Any:
    kept = folder / "text_tokenizer"
    if not (kept / "tokenizer.json").exists():
        train_text_tokenizer(rows.all_captions(), recipe.text_vocabulary).save_pretrained(kept)
    return AutoTokenizer.from_pretrained(kept)


def _of_kind(name: str, kind: str) -> str:
    """Where the model `name` is. Raises UserError if its configuration is not of the model type `kind`."""
    place = resolve(name)
    if (found := model_kind(place)) != kind:
        raise UserError(f"cannot start from {name}: its config says model_type {found!r}, not {kind!r}")
    return place


def _class_model(recipe: ClassModelRecipe, image_tokenizer: Loaded) -> TokenFlowForClassToImage:
    if recipe.init_from is not None:
        try:
            start = _of_kind(recipe.init_from, TokenFlowClassToImageConfig.model_type)
            model = TokenFlowForClassToImage.from_pretrained(start, dtype=torch.float32)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            message = str(error).splitlines()[0]
            raise UserError(f"cannot load class model {recipe.init_from}: {message}") from error
    else:
        config = image_tokenizer.model.config
        model = TokenFlowForClassToImage(
            TokenFlowClassToImageConfig(
                depth=recipe.depth,
                num_classes=recipe.num_classes,
                class_dropout=recipe.class_dropout,
                codebook_size=config.codebook_size,
                scales=config.scales,
                flow_dims=[flow.dim for flow in config.flow_specs],
            )
        )
    model.set_codebooks(image_tokenizer.model)
    return model


def load_image_tokenizer(name: str) -> Loaded:
    """The frozen tokenizer on the CPU; see `codec.load`."""
    loaded = load(name, device="cpu")
    loaded.model.requires_grad_(False)
    return loaded
