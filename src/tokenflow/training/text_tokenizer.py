"""A small text tokenizer of one's own, for a generator that starts from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tokenflow.generation.prompt import IMAGE_CLOSE, IMAGE_OPEN, PAD

BOS, EOS = "<s>", "</s>"


def train_text_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of lower-cased `texts`, deterministic: equal texts give equal tokenizers.

    Any text can be encoded (bytes are the alphabet), with `<s>` in front. The image markers are one token
    each, where a language model's own tokenizer would take several.

    Args:
        texts: what to learn from.
        vocabulary: entries at most, `[PAD]`, `<s>`, `</s>` and the markers included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS]
    markers = [AddedToken(marker, normalized=False) for marker in (IMAGE_OPEN, IMAGE_CLOSE)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(markers),
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(markers)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
