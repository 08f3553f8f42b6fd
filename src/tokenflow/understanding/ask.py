"""Questions about images: one call, or a conversation in which each image is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflow.data.images import read_image
from tokenflow.errors import UserError

Picture = Image.Image | str | Path
MAX_NEW_TOKENS = 128


def ask(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Picture | Sequence[Picture],
    question: str,
    **generate_kwargs: Any,
) -> str:
    """Answer a question about images (Sec. 3.4).

        model, processor = tokenflow.understanding.load("my-chat-model")
        ask(model, processor, "photo.jpg", "What is in the picture?")

    Args:
        model, processor: a LLaVA with a TokenFlow tower; see `load` and `assemble`.
        images: one picture or several, as PIL images or files. None at all is a question without picture.
        question: plain text. Special tokens in it, `<image>` among them, are read as text.
        generate_kwargs: options of `model.generate` that lead to one answer: `max_new_tokens` (default 128,
            or what `max_length` leaves), `do_sample` (default False, the likeliest answer), `temperature`,
            `streamer`, ...; or a `generation_config`, which has its own.

    Returns:
        The answer.

    Raises:
        UserError: a question that is empty or no text; question, images and answer exceed the model's
            context; a processor without chat template.
        ImageError: a file that is no picture.
    """
    return Conversation(model, processor).ask(question, images, **generate_kwargs)


class Conversation:
    """Questions and answers in turn; images may join at any turn, and each is encoded once.

    Attributes:
        messages: the turns so far, as `apply_chat_template` takes them.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        if processor.chat_template is None:
            raise UserError("the processor has no chat template; see tokenflow.understanding.chat_template")
        self.model, self.processor = model, processor
        self.messages: list[dict[str, Any]] = []
        self.features: list[Tensor] = []

    def ask(self, question: str, images: Picture | Sequence[Picture] = (), **generate_kwargs: Any) -> str:
        """The answer to `question`, which joins the conversation with it; arguments and errors as `ask`.

        If it fails, the conversation is what it was before.
        """
        if not isinstance(question, str):
            raise UserError(f"the question must be text, not {type(question).__name__}")
        if not question.strip():
            raise UserError("the question is empty; ask something about the image")
        try:
            question.encode()
        except UnicodeEncodeError as error:  # bytes of a command line or pipe that are no text
            raise UserError(f"the question {question!r:.80} is not valid UTF-8 text") from error
        several: Any = images if isinstance(images, (list, tuple)) else [images]
        pictures = [] if images is None else list(several)
        if wrong := [type(p).__name__ for p in pictures if not isinstance(p, (Image.Image, str, Path))]:
            raise UserError(f"images must be PIL images or files, not {wrong[0]}")
        messages = [*self.messages, user_message(self.processor, question, len(pictures))]
        inputs = tokenize(self.model, self.processor, [messages])
        images_so_far = len(self.features) + len(pictures)
        given = inputs["input_ids"].shape[1]
        options, longest = answer_options(generate_kwargs, given)
        if longest < 1:
            raise UserError(
                f"the conversation has {given} tokens: the length given leaves none for an answer"
            )
        self._check_length(given, images_so_far, longest)
        features = self.features + encode_images(self.model, self.processor, pictures)
        (answer,) = generate(self.model, self.processor, inputs, features, **options)
        # What the model wrote may spell a special token too.
        said = [{"type": "text", "text": without_special_tokens(self.processor, answer)}]
        self.messages = [*messages, {"role": "assistant", "content": said}]
        self.features = features
        return answer

    def _check_length(self, given: int, images: int, answer: int) -> None:
        context = self.model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
        if given + answer > context:
            pictures = f" with {images} image{'s' if images > 1 else ''}" if images else ""
            raise UserError(
                f"the conversation{pictures} has {given} tokens and the answer may take {answer}, but this "
                f"model reads {context}: shorten the question, drop images or lower max_new_tokens"
            )


def answer_options(generate_kwargs: dict[str, Any], given: int) -> tuple[dict[str, Any], int]:
    """Options of `model.generate`, with ours where the caller has none; and how many tokens the answer to
    `given` ones may take."""
    settings = generate_kwargs.get("generation_config")
    options = dict(generate_kwargs) if settings is not None else {"do_sample": False, **generate_kwargs}
    new, whole = (options.get(k, getattr(settings, k, None)) for k in ("max_new_tokens", "max_length"))
    if new is None and whole is not None:
        return options, whole - given
    if new is None:
        options["max_new_tokens"] = new = MAX_NEW_TOKENS
    return options, new


# What a turn consists of; evaluation uses it on many questions at a time.
def user_message(processor: LlavaProcessor, question: str, images: int) -> dict[str, Any]:
    """A turn of the user: so many images, then the question, in which special tokens are text."""
    text = without_special_tokens(processor, question.strip())
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def tokenize(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, conversations: list[list[dict[str, Any]]]
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[B, P]`, left-padded, with the places of all images' features."""
    token = processor.image_token
    prompts = [processor.apply_chat_template(turns, add_generation_prompt=True) for turns in conversations]
    prompts = [prompt.replace(token, token * model.config.image_seq_length) for prompt in prompts]
    tokenized = processor.tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)
    return {key: tokenized[key].to(model.device) for key in ("input_ids", "attention_mask")}


@torch.inference_mode()
def encode_images(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Sequence[Picture]
) -> list[Tensor]:
    """Projected features `[N, hidden]` of each picture."""
    if not pictures:
        return []
    opened = [p if isinstance(p, Image.Image) else read_image(p) for p in pictures]
    tower = model.model.vision_tower
    pixels = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
    return list(
        model.get_image_features(pixels.to(tower.device, tower.dtype), return_dict=True).pooler_output
    )


@torch.inference_mode()
def generate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    inputs: dict[str, Tensor],
    features: list[Tensor],
    **generate_kwargs: Any,
) -> list[str]:
    """The B answers to tokenized conversations; `features` are those of all images in order."""
    asked: dict[str, Any] = {**inputs, **generate_kwargs}
    if features:
        asked["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}  # type: ignore[arg-type]
    output = model.generate(**asked)  # type: ignore[misc]
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def without_special_tokens(processor: LlavaProcessor, text: str) -> str:
    """`text` with a space inside whatever the tokenizer would read as a special token, such as `<image>`."""
    specials = {*processor.tokenizer.all_special_tokens, processor.image_token}
    specials |= {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    for token in sorted(specials, key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
