"""A LLaVA of a few thousand random values: the small tower, a tiny Llama and 320 words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORDS = Path(__file__).parent.parent / "parity" / "i2t" / "tokenizer_qwen.json"


@pytest.fixture
def words():
    """A text tokenizer of 320 tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(WORDS), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def language_model(vocab_size: int = 320, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 512, "eos_token_id": 319, "bos_token_id": None, "pad_token_id": 317}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**sizes, **changes}))


@pytest.fixture
def make_chat(small_model_folder, words):
    """`make_chat(**options of assemble)` -> a fresh (model, processor)."""
    from tokenflow import TokenFlowModel
    from tokenflow.understanding import assemble

    def make(text: dict | None = None, **options):
        tower = TokenFlowModel.from_pretrained(small_model_folder)
        with torch.random.fork_rng():
            torch.manual_seed(1)  # the projector
            options = {"template": "smollm2", **options}
            return assemble(tower, language_model(**(text or {})), words, **options)

    return make


@pytest.fixture
def pictures():
    from PIL import Image

    colours = ((200, 30, 30), (20, 160, 60), (40, 40, 220))
    return [Image.new("RGB", (40 + 10 * i, 30), colour) for i, colour in enumerate(colours)]
