"""What a language model itself answers: conversations without pictures that keep what it knows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenflow.files import atomic_write
from tokenflow.understanding.llava import chat_template

_TEMPERATURE = 0.7
_ENDS = re.compile(r"^.*[.!?](?=\s|$)", re.DOTALL)


@torch.inference_mode()
def own_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    template: str,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> list[str]:
    """One sampled answer to each prompt, cut after its last whole sentence; "" where there is none.

    Args:
        model, tokenizer: a causal language model, and its tokenizer.
        template: conversation template, see `chat_template`.
        batch_size: prompts at a time; the same size gives the same answers.
    """
    tokenizer.padding_side = "left"
    torch.manual_seed(seed)
    answers = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="own answers", unit="batch"):
        turns = [
            [{"role": "user", "content": [{"type": "text", "text": p}]}] for p in prompts[start:][:batch_size]
        ]
        texts = tokenizer.apply_chat_template(
            turns, chat_template=chat_template(template), add_generation_prompt=True, tokenize=False
        )
        asked = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        given = model.generate(
            input_ids=asked.input_ids,
            attention_mask=asked.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=_TEMPERATURE,
            top_k=0,
        )
        new = given[:, asked.input_ids.shape[1] :]
        for ids, text in zip(new, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            ended = tokenizer.eos_token_id in ids
            answers.append(text.strip() if ended else whole_sentences(text.strip()))
    return answers


def whole_sentences(text: str) -> str:
    """`text` up to its last full stop, question or exclamation mark; "" without one."""
    found = _ENDS.match(text)
    return found[0] if found else ""


def write_texts(file: Path, count: int, seed: int) -> int:
    """What `tokenflow questions --text` does: prompts, answered by the language model of the bundled chat
    model, on a GPU if there is one. Returns how many conversations there are; an answer may be missing.

    Raises:
        UserError: the language model is missing, or the place cannot be written to.
    """
    from tokenflow.data.question_texts import text_prompts
    from tokenflow.understanding.parts import TINY_CHAT, language_model

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model, tokenizer = language_model(TINY_CHAT, torch.bfloat16)
    model.to(device).eval()  # type: ignore[arg-type]
    prompts = text_prompts(count, seed)
    answers = own_answers(model, tokenizer, prompts, template=TINY_CHAT.template, seed=seed)
    return write_own_answers(file, prompts, answers)


def write_own_answers(file: Path, prompts: Sequence[str], answers: Sequence[str]) -> int:
    """Write conversations without pictures as JSON lines; returns how many have an answer."""
    rows = [
        {"id": f"text-{i}", "conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}]}
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
        if a
    ]
    with atomic_write(file) as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return len(rows)
