"""Prompts without a picture: many, all different, none of them what is measured with."""

from __future__ import annotations

from tokenflow.data.question_texts import text_prompts
from tokenflow.evaluation.answers import normalise
from tokenflow.evaluation.knowledge import FACTS


def test_prompts_differ_and_are_reproducible():
    prompts = text_prompts(2000, seed=3)
    assert len(set(prompts)) == 2000
    assert prompts[:50] == text_prompts(50, seed=3) != text_prompts(50)
    assert not any("{" in prompt or "  " in prompt for prompt in prompts)
    assert not any(" a a" in prompt.replace(" a and", "") or " a o" in prompt for prompt in prompts)


def test_no_prompt_is_measured_with():
    measured = [normalise(fact.question) for fact in FACTS]
    for prompt in text_prompts(8000):
        said = normalise(prompt)
        assert not [question for question in measured if question in said or said in question], prompt
