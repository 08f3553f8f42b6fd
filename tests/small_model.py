"""A model of a few thousand random values: its configuration, and a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path


def small_config(**overrides):
    """32 px, grid 4 x 4, scales 1 2 4 (21 tokens), 64 codes, two flows."""
    from tokenflow.tokenizer.configuration import (
        ConvSpec,
        PixelDecoderSpec,
        PixelFlow,
        SemanticFlow,
        TokenFlowConfig,
    )

    encoder = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    conv = {"width": 32, "multipliers": (1, 1), "blocks": 1, "latent_channels": 32, "patch": 4}
    semantic = SemanticFlow(encoder=encoder, decoder_layers=1, decoder_heads=2, target_dim=24)
    settings = {
        "image_size": 32,
        "scales": [1, 2, 4],
        "flows": [semantic, PixelFlow(encoder=ConvSpec(**conv))],
        "pixel_decoder": PixelDecoderSpec(**conv),
        "codebook_size": 64,
        "usage_window": 256,
    }
    return TokenFlowConfig(**{**settings, **overrides})


def save_small_model(folder: Path, seed: int = 0, **overrides) -> Path:
    """A seeded random model with its processor, saved as `from_pretrained` reads it."""
    import torch

    from tokenflow import TokenFlowImageProcessor, TokenFlowModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TokenFlowModel(small_config(**overrides))
    model.save_pretrained(folder)
    TokenFlowImageProcessor(size=model.config.image_size).save_pretrained(folder)
    return folder


def small_words():
    """A text tokenizer of 320 tokens, its last three `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`."""
    from transformers import PreTrainedTokenizerFast

    file = Path(__file__).parent / "parity" / "i2t" / "tokenizer_qwen.json"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def small_language_model(**changes):
    """A seeded random Llama of two layers that reads 512 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 320, "max_position_embeddings": 512}
    special = {"eos_token_id": 319, "bos_token_id": None, "pad_token_id": 317}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **special, **changes}))


def small_chat(tower_folder: Path, text: dict | None = None, **options):
    """A LLaVA of all three, and its processor; `text` changes the Llama, `options` go to `assemble`."""
    import torch

    from tokenflow import TokenFlowModel
    from tokenflow.understanding import assemble

    tower = TokenFlowModel.from_pretrained(tower_folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the projector
        options = {"template": "smollm2", **options}
        return assemble(tower, small_language_model(**(text or {})), small_words(), **options)


def save_small_chat(folder: Path, tower_folder: Path) -> Path:
    """`small_chat` as a folder."""
    model, processor = small_chat(tower_folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
