"""The chat model against transformers' LLaVA with an untouched CLIP tower of the same size.

Both sides are `LlavaForConditionalGeneration` around the same language model, SmolLM2-135M-Instruct, with as
many features of an image. The CLIP tower is random and has as many parameters as ours needs to encode. All
answers have a fixed length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from benchmarks.measure import Row, best_seconds
from tokenflow import TokenFlowImageProcessor, TokenFlowModel
from tokenflow.bundled import bundled_names
from tokenflow.data.images import read_image
from tokenflow.demo import SAMPLES
from tokenflow.understanding import Conversation, assemble_continuous, load
from tokenflow.understanding.ask import tokenize, user_message
from tokenflow.understanding.parts import TINY_CHAT, assemble_parts, language_model

BUNDLED = "tokenflow-tiny-chat"
QUESTIONS = ("What is in the picture?", "Is there a person in the picture?")
MORE_TOKENS = 16  # timed after the first
Chat = tuple[LlavaForConditionalGeneration, LlavaProcessor]


def encoding_parameters(tower: TokenFlowModel) -> int:
    """What a tokenizer needs to encode: its encoders and codebooks."""
    parts = (tower.encoders, tower.quantizer)
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def with_clip(tower: TokenFlowModel, text: PreTrainedModel, words: Any, width: int = 256) -> Chat:
    """A LLaVA with a random CLIP tower instead of `tower`: as many features, about as many parameters."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=max(2, round(encoding_parameters(tower) / (12 * width**2))),
        num_attention_heads=max(1, width // 64),
        image_size=tower.config.image_size,
        patch_size=tower.config.image_size // tower.config.grid,
    )
    pictures = TokenFlowImageProcessor(size=config.image_size, resize_mode="pad")
    return assemble_continuous(CLIPVisionModel(config), pictures, text, words, template=TINY_CHAT.template)


def one_question(chat: Chat, batch: int) -> dict[str, Tensor]:
    """Everything that `generate` needs to answer a question about each of so many sample photographs."""
    model, processor = chat
    paths = islice(cycle(sorted(SAMPLES.glob("*.jpg"))), batch)
    pixels = processor.image_processor([read_image(path) for path in paths], return_tensors="pt")
    asked = [[user_message(processor, QUESTIONS[0], images=1)]] * batch
    return {**tokenize(model, processor, asked), "pixel_values": pixels["pixel_values"]}


def compare(chats: dict[str, Chat], batch: int, repeats: int) -> tuple[dict[str, dict[str, float]], ...]:
    """Seconds of each side to encode the images, to the first token, and for each token after it."""
    sides: dict[str, Callable[[], object]] = {}
    for name, chat in chats.items():
        given = one_question(chat, batch)
        sides[f"{name} tower"] = lambda m=chat[0], g=given: m.get_image_features(g["pixel_values"])
        for part, tokens in (("first", 1), ("all", 1 + MORE_TOKENS)):
            sides[f"{name} {part}"] = lambda m=chat[0], g=given, n=tokens: answer(m, g, n)
    times = best_seconds(repeats, **sides)
    tower, first = ({name: times[f"{name} {part}"] for name in chats} for part in ("tower", "first"))
    more = {name: (times[f"{name} all"] - first[name]) / MORE_TOKENS for name in chats}
    return tower, first, more


def answer(model: LlavaForConditionalGeneration, given: dict[str, Tensor], tokens: int) -> Tensor:
    """Exactly so many likeliest tokens."""
    return model.generate(**given, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)


class Calls:
    """How often any of some modules has run."""

    def __init__(self, *modules: nn.Module) -> None:
        self.count = 0
        for module in modules:
            module.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def second_question(chat: Chat, repeats: int) -> tuple[dict[str, float], int, int]:
    """Seconds to the first token of a second question about an image, with its features kept and without.

    Returns:
        The seconds; how often the conversation ran the image encoder, and how often a decoder.
    """
    model, processor = chat
    tower: Any = model.model.vision_tower
    encoders = Calls(tower.encoders["pixel"])
    decoders = Calls(tower.pixel_decoder, *tower.semantic_decoders.values())
    picture, one = read_image(SAMPLES / "cat.jpg"), {"min_new_tokens": 1, "max_new_tokens": 1}
    talk = Conversation(model, processor)
    talk.ask(QUESTIONS[0], picture, **one)
    talk.ask(QUESTIONS[1], **one)
    counted = encoders.count, decoders.count
    messages, features = talk.messages[:2], talk.features
    asked = tokenize(model, processor, [[*messages, user_message(processor, QUESTIONS[1], images=0)]])
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]

    def ours() -> None:
        talk.messages, talk.features = messages, features
        talk.ask(QUESTIONS[1], **one)

    times = best_seconds(
        repeats, ours=ours, encoded_again=lambda: answer(model, {**asked, "pixel_values": pixels}, 1)
    )
    return times, *counted


@torch.inference_mode()
def run(repeats: int) -> list[Row]:
    torch.manual_seed(0)
    chat = load(BUNDLED, device="cpu") if BUNDLED in bundled_names() else assemble_parts(TINY_CHAT)
    half = copy.deepcopy(chat[0]).to(torch.bfloat16)  # the tower's encoders stay in float32
    tower: Any = chat[0].model.vision_tower
    clip = with_clip(tower, *language_model(TINY_CHAT))
    chats = {"ours": chat, "ours_bf16": (half, chat[1]), "clip": clip}
    rows = []
    for batch in (1, 8):
        towers, first, more = compare(chats, batch, repeats)
        shares = {name: towers[name] / first[name] for name in chats}
        note = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        rows += [
            row(f"chat, first token, batch {batch}", first, f"the vision tower's share: {note}"),
            row(f"chat, each token after it, batch {batch}", more, rates(more, batch)),
            row(f"chat, vision tower, batch {batch}", towers, "encoding alone"),
        ]
    times, encoded, decoded = second_question(chat, repeats)
    if (encoded, decoded) != (1, 0):
        raise RuntimeError(f"a conversation encoded its image {encoded} times and decoded {decoded} times")
    note = "the image is encoded once, nothing is decoded"
    rows.append(row("chat, first token of a second question", times, note))
    return rows


def row(name: str, seconds: dict[str, float], note: str) -> Row:
    return Row(name, seconds, list(seconds.values())[-1] / seconds["ours"], None, note)


def rates(seconds: dict[str, float], batch: int) -> str:
    return ", ".join(f"{batch / value:.0f} tokens/s {name}" for name, value in seconds.items())
