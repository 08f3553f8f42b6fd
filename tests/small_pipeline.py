"""Pipelines that draw from text and from labels: a few thousand random values around the small tokenizer."""

from __future__ import annotations

from pathlib import Path


def byte_tokenizer():
    """A text tokenizer whose tokens are bytes: any text, no vocabulary file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_small_pipeline(folder: Path, tokenizer_folder: Path, seed: int = 0) -> Path:
    """A seeded random pipeline with two layers, saved as `TextToImagePipeline.from_pretrained` reads it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenflow import TokenFlowModel
    from tokenflow.generation.modeling import TokenFlowForTextToImage
    from tokenflow.generation.pipeline import TextToImagePipeline

    text_tokenizer = byte_tokenizer()
    tokenizer = TokenFlowModel.from_pretrained(tokenizer_folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(text_tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.2,
            )
        )
        model = TokenFlowForTextToImage.from_llama(llama, text_tokenizer, tokenizer, max_text_tokens=32)
    TextToImagePipeline(model, text_tokenizer, tokenizer).save_pretrained(folder)
    return folder


def save_small_class_pipeline(folder: Path, tokenizer_folder: Path, seed: int = 0) -> Path:
    """The same for five class labels: one layer, with open gates and a head that is not nearly zero."""
    import torch

    from tokenflow import (
        ClassToImagePipeline,
        TokenFlowClassToImageConfig,
        TokenFlowForClassToImage,
        TokenFlowModel,
    )

    tokenizer = TokenFlowModel.from_pretrained(tokenizer_folder)
    config = TokenFlowClassToImageConfig(depth=1, codebook_size=64, scales=[1, 2, 4], num_classes=5)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TokenFlowForClassToImage(config)
    model.set_codebooks(tokenizer)
    with torch.no_grad():
        for block in model.blocks:
            block.adaptation.bias[: block.adaptation.gate_rows] = 0.7
        model.head.weight.mul_(50)
    ClassToImagePipeline(model, tokenizer).save_pretrained(folder)
    return folder
