"""The configuration of the text-to-image language model (Sec. 3.3)."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from tokenflow.errors import UserError
from tokenflow.tokenizer.config_checks import check_scales


class TokenFlowTextToImageConfig(PreTrainedConfig):
    r"""Configuration of a [`TokenFlowForTextToImage`].

    The full vocabulary is the text vocabulary, `[PAD]` included, followed by one token per code.

    Args:
        text_config (`LlamaConfig` or `dict`): the decoder; its `vocab_size` counts text tokens and `[PAD]`.
        codebook_size (`int`): K, visual tokens.
        scales (`list[int]`): grid sides of the tokenizer, coarse to fine.
        flow_dims (`list[int]`): channels of the tokenizer's flows; their sum D enters the visual projector.
        max_text_tokens (`int`): length of the text block in front of the image; longer prompts are cut.
        image_open_ids, image_close_ids (`list[int]`): the sub-words of the markers `<img>` and `</img>`,
            which are ordinary text. Kept here so that sampling and training need no text tokenizer.
        pad_token_id, bos_token_id, eos_token_id (`int`): of the text vocabulary.
        image_tokenizer (`str`): the image tokenizer where the model's folder has none in `tokenizer/`: a
            bundled name, a folder or a hub name.

    Raises:
        UserError: a value that no model can have.
    """

    model_type = "tokenflow_text_to_image"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012 (transformers' own way)

    text_config: Any = None
    codebook_size: int = 32768
    scales: list[int] | tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    flow_dims: list[int] | tuple[int, ...] = (32, 8)
    max_text_tokens: int = 128
    image_open_ids: list[int] | tuple[int, ...] = ()
    image_close_ids: list[int] | tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    image_tokenizer: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        text = {"vocab_size": 32001} if self.text_config is None else self.text_config
        self.text_config = LlamaConfig(**text) if isinstance(text, dict) else text
        # The head has rows for codes, the embedding has none; so they cannot be tied.
        self.text_config.tie_word_embeddings = False
        self.scales = check_scales(self.scales)
        self.flow_dims = [int(dim) for dim in self.flow_dims]
        self.image_open_ids, self.image_close_ids = list(self.image_open_ids), list(self.image_close_ids)
        if self.pad_token_id is None:
            self.pad_token_id = self.text_vocab_size - 1
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        if not isinstance(self.text_config, LlamaConfig):
            raise UserError(f"text_config must be a LlamaConfig, got {type(self.text_config).__name__}")
        for name in ("codebook_size", "max_text_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.flow_dims or min(self.flow_dims) < 1:
            raise UserError(f"flow_dims must be positive, got {self.flow_dims}")
        special = {"pad_token_id": self.pad_token_id, "bos_token_id": self.bos_token_id}
        special |= {"eos_token_id": self.eos_token_id}
        special |= {f"image_open_ids[{i}]": token for i, token in enumerate(self.image_open_ids)}
        special |= {f"image_close_ids[{i}]": token for i, token in enumerate(self.image_close_ids)}
        for name, token in special.items():
            if token is None or not 0 <= token < self.text_vocab_size:
                raise UserError(
                    f"{name} is {token}; the text vocabulary has ids 0 to {self.text_vocab_size - 1}"
                )

    @property
    def text_vocab_size(self) -> int:
        """Text tokens and `[PAD]`; also the id of the first visual token."""
        return self.text_config.vocab_size

    @property
    def full_vocab_size(self) -> int:
        """Rows of the output head: text tokens, `[PAD]` and K codes."""
        return self.text_vocab_size + self.codebook_size

    @property
    def num_image_tokens(self) -> int:
        """N, tokens of an image over all scales."""
        return sum(side * side for side in self.scales)

    @property
    def code_dim(self) -> int:
        """D, channels of a code vector."""
        return sum(self.flow_dims)


__all__ = ["TokenFlowTextToImageConfig"]
