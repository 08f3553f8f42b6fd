"""Does a chat model still know what its language model knew? Plain questions without a picture."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenflow.evaluation.answers import normalise

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


class Fact(NamedTuple):
    """A question, the word an answer must have (or one of several, split by "|"), and a whole answer."""

    question: str
    key: str
    sentence: str


FACTS = (
    Fact("What is the capital of France?", "paris", "The capital of France is Paris."),
    Fact("What is the capital of Japan?", "tokyo", "The capital of Japan is Tokyo."),
    Fact("What is the capital of Italy?", "rome", "The capital of Italy is Rome."),
    Fact("What is the capital of Germany?", "berlin", "The capital of Germany is Berlin."),
    Fact("What is the capital of Spain?", "madrid", "The capital of Spain is Madrid."),
    Fact("What is the capital of Egypt?", "cairo", "The capital of Egypt is Cairo."),
    Fact("What is the capital of Russia?", "moscow", "The capital of Russia is Moscow."),
    Fact("On which continent is Brazil?", "south america", "Brazil is in South America."),
    Fact("On which continent is Kenya?", "africa", "Kenya is in Africa."),
    Fact("What is the largest planet in our solar system?", "jupiter", "The largest planet is Jupiter."),
    Fact("Which planet is known as the Red Planet?", "mars", "Mars is known as the Red Planet."),
    Fact("Which planet is closest to the Sun?", "mercury", "Mercury is closest to the Sun."),
    Fact("What do we call the star at the center of our solar system?", "sun", "It is called the Sun."),
    Fact("What is the chemical formula of water?", "h2o|h₂o", "The chemical formula of water is H2O."),
    Fact("What gas do plants take in from the air?", "carbon dioxide|co2", "Plants take in carbon dioxide."),
    Fact("What gas do humans need to breathe to live?", "oxygen", "Humans need oxygen."),
    Fact("What is frozen water called?", "ice", "Frozen water is called ice."),
    Fact("Which metal has the chemical symbol Fe?", "iron", "Fe is the symbol of iron."),
    Fact("Which element has the chemical symbol Au?", "gold", "Au is the symbol of gold."),
    Fact("At how many degrees Celsius does water boil?", "100", "Water boils at 100 degrees Celsius."),
    Fact(
        "What force pulls objects toward the Earth?", "gravity|gravitational", "Gravity pulls objects down."
    ),
    Fact("Which organ pumps blood through the body?", "heart", "The heart pumps blood through the body."),
    Fact("Which organ do humans use to think?", "brain", "Humans think with the brain."),
    Fact("How many legs does a spider have?", "8", "A spider has eight legs."),
    Fact("How many legs does a dog have?", "4", "A dog has four legs."),
    Fact("What do bees make?", "honey", "Bees make honey."),
    Fact("What is a baby dog called?", "puppy|pup", "A baby dog is called a puppy."),
    Fact("What is a baby cat called?", "kitten", "A baby cat is called a kitten."),
    Fact("What is the largest ocean on Earth?", "pacific", "The largest ocean is the Pacific Ocean."),
    Fact("How many days are there in a week?", "7", "There are seven days in a week."),
    Fact("How many months are there in a year?", "12|twelve", "There are twelve months in a year."),
    Fact("How many minutes are there in an hour?", "60|sixty", "There are 60 minutes in an hour."),
    Fact("Which day comes after Monday?", "tuesday", "Tuesday comes after Monday."),
    Fact("Which month comes after June?", "july", "July comes after June."),
    Fact("What is two plus three?", "5", "Two plus three is five."),
    Fact("How many sides does a triangle have?", "3", "A triangle has three sides."),
    Fact("What color do you get if you mix blue and yellow?", "green", "Blue and yellow make green."),
    Fact("What color is the sky on a clear day?", "blue", "The sky is blue on a clear day."),
    Fact("Who wrote Romeo and Juliet?", "shakespeare", "William Shakespeare wrote Romeo and Juliet."),
    Fact("Who painted the Mona Lisa?", "da vinci|leonardo", "Leonardo da Vinci painted the Mona Lisa."),
    Fact("Who was the first president of the United States?", "washington", "It was George Washington."),
    Fact("Which language is spoken in Brazil?", "portuguese", "Portuguese is spoken in Brazil."),
    Fact("What is the opposite of hot?", "cold|cool", "The opposite of hot is cold."),
    Fact("What is the opposite of up?", "down", "The opposite of up is down."),
)


def fingerprint_of_facts() -> str:
    """sha256 of the questions and answers."""
    return hashlib.sha256(json.dumps(FACTS).encode()).hexdigest()


def has_key(answer: str, key: str) -> bool:
    """Whether an answer has the word or one of the words of a `Fact` in it, as whole words."""
    said = f" {normalise(answer)} "
    return any(f" {word} " in said for word in key.split("|"))


def ask_facts(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    facts: Sequence[Fact] = FACTS,
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
) -> dict[str, float]:
    """Ask plain questions, without a picture.

    Returns:
        `accuracy`, the share of answers with the right word in them; `log-likelihood` of the whole answers,
        the mean over their tokens in nats, then over questions; and the number of `questions`.
    """
    from tokenflow.understanding.ask import generate, tokenize, user_message

    right: list[bool] = []
    for start in range(0, len(facts), batch_size):
        batch = facts[start : start + batch_size]
        inputs = tokenize(model, processor, [[user_message(processor, fact.question, 0)] for fact in batch])
        given = generate(model, processor, inputs, [], max_new_tokens=max_new_tokens, do_sample=False)
        right += [has_key(text, fact.key) for text, fact in zip(given, batch, strict=True)]
    likely = [_log_likelihood(model, processor, fact) for fact in facts]
    return {
        "accuracy": sum(right) / len(right),
        "log-likelihood": statistics.mean(likely),
        "questions": len(facts),
    }


def _log_likelihood(model: LlavaForConditionalGeneration, processor: LlavaProcessor, fact: Fact) -> float:
    import torch

    from tokenflow.understanding.ask import tokenize, user_message

    prompt = tokenize(model, processor, [[user_message(processor, fact.question, 0)]])["input_ids"]
    answer = processor.tokenizer(fact.sentence, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.cat([prompt, answer.to(prompt.device)], 1)).logits.float()
    # The logits at a position are those of the next token.
    of_answer = logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    return of_answer.gather(1, answer.to(prompt.device).T).mean().item()


def before_training(
    name_or_path: str, like: LlavaForConditionalGeneration
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor] | None:
    """The chat model with its language model as it was before training, on the device and of the dtype of
    another; None where its folder does not name the language model (see `tokenflow.understanding.parts`)."""
    from tokenflow.bundled import resolve
    from tokenflow.understanding.llava import PARTS_FILE
    from tokenflow.understanding.parts import Parts, assemble_parts

    file = Path(resolve(name_or_path), PARTS_FILE)
    if not file.is_file():
        return None
    parts = Parts(**json.loads(file.read_text(encoding="utf-8")))
    model, processor = assemble_parts(parts, like.lm_head.weight.dtype)
    return model.to(like.device).eval(), processor  # type: ignore[arg-type]


def compare_knowledge(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, name_or_path: str, batch_size: int = 16
) -> dict[str, Any]:
    """Figures of `ask_facts` for a chat model, and for its language model before training where known."""
    figures: dict[str, Any] = {"text": ask_facts(model, processor, batch_size=batch_size)}
    before = before_training(name_or_path, model)
    if before is not None:
        figures["text, before training"] = ask_facts(*before, batch_size=batch_size)
    return figures
