"""Prompts as token ids: a text block of fixed length and the marker that opens an image (Sec. 3.3).

`[PAD]` fills the block on the left, so that the text ends where the image begins. `<img>` and `</img>` are
ordinary text, several sub-words each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenflow.errors import UserError

IMAGE_OPEN, IMAGE_CLOSE, PAD = "<img>", "</img>", "[PAD]"


def add_pad_token(tokenizer: Any) -> int:
    """Make `[PAD]` the padding token of a text tokenizer, added if it is not there; its id."""
    tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer.pad_token_id


def marker_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The sub-words of `<img>` and `</img>`."""
    opening, closing = (
        tokenizer.encode(text, add_special_tokens=False) for text in (IMAGE_OPEN, IMAGE_CLOSE)
    )
    return opening, closing


def prompt_lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with the beginning-of-text token, before any cut."""
    return [len(_text_ids(tokenizer, text)) for text in texts]


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], max_text_tokens: int, image_open_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Texts to the prefix that an image follows.

    Args:
        tokenizer: a transformers text tokenizer with a padding token (`add_pad_token`).
        texts: B texts; an empty one is allowed and means "anything". Each keeps its first `max_text_tokens`
            tokens, the beginning-of-text token included.
        max_text_tokens: length of the text block.
        image_open_ids: the opening marker's sub-words.

    Returns:
        `input_ids` `[B, P]` int64 and `attention_mask` `[B, P]` int64 (0 at padding), with
        P = `max_text_tokens` + `len(image_open_ids)`.

    Raises:
        UserError: a text is not a string; the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise UserError("the text tokenizer has no padding token; call add_pad_token(tokenizer) first")
    shape = len(texts), max_text_tokens + len(image_open_ids)
    input_ids = torch.full(shape, tokenizer.pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = _text_ids(tokenizer, text)[:max_text_tokens] + list(image_open_ids)
        input_ids[row, -len(ids) :] = torch.tensor(ids)
        attention_mask[row, -len(ids) :] = 1
    return input_ids, attention_mask


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    if not isinstance(text, str):
        raise UserError(f"a prompt must be a string, got {type(text).__name__}: {text!r:.80}")
    ids = tokenizer.encode(text)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids if ids and ids[0] == bos else [bos, *ids]
