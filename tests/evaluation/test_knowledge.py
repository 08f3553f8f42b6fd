"""Plain questions without a picture: what counts as an answer, and a model before and after training."""

from __future__ import annotations

import math

import pytest
import torch

from small_model import small_chat, small_language_model, small_words
from tokenflow.evaluation.knowledge import FACTS, Fact, ask_facts, compare_knowledge, has_key


def test_every_whole_answer_has_its_word():
    assert len(FACTS) >= 40
    assert len({fact.question for fact in FACTS}) == len(FACTS)
    for fact in FACTS:
        assert has_key(fact.sentence, fact.key), fact
        assert not has_key(fact.question, fact.key), fact


def test_words_count_whole_and_numbers_as_digits():
    assert has_key("It is Paris!", "paris")
    assert has_key("A spider has eight legs.", "8")
    assert has_key("It boils at 100 degrees.", "100")
    assert not has_key("Parisian", "paris")
    assert has_key("carbon dioxide gas", "co2|carbon dioxide")


def test_figures_of_a_chat_model(small_model_folder):
    model, processor = small_chat(small_model_folder)
    facts = (Fact("say a", "a|", "a b."), Fact("what is it, and is it long ?", "zzzz", "no"))
    figures = ask_facts(model, processor, facts, max_new_tokens=2, batch_size=2)
    assert figures["questions"] == 2
    assert figures["accuracy"] in (0, 0.5, 1)
    # A model of random values gives every one of its tokens about the same probability.
    assert figures["log-likelihood"] == pytest.approx(-math.log(320), abs=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert ask_facts(model, processor, facts, max_new_tokens=1)["log-likelihood"] == pytest.approx(
        -math.log(384)
    )


def test_a_model_in_parts_is_compared_with_its_language_model(small_model_folder, tmp_path):
    from tokenflow.understanding import load
    from tokenflow.understanding.parts import Parts, assemble_parts, save_parts

    small_language_model().save_pretrained(tmp_path / "words")
    small_words().save_pretrained(tmp_path / "words")
    parts = Parts(tower=str(small_model_folder), language_model=str(tmp_path / "words"), template="smollm2")
    save_parts(tmp_path / "chat", assemble_parts(parts)[0], parts)
    model, processor = load(tmp_path / "chat", device="cpu")
    same = compare_knowledge(model, processor, str(tmp_path / "chat"))
    assert same["text"] == same["text, before training"]
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    other = compare_knowledge(model, processor, str(tmp_path / "chat"))
    assert other["text"]["log-likelihood"] != same["text"]["log-likelihood"]
    assert other["text, before training"] == same["text, before training"]
