"""A language model's own answers, as conversations without pictures."""

from __future__ import annotations

from small_model import small_language_model, small_words
from tokenflow.data.conversations import Conversations
from tokenflow.data.question_texts import text_prompts
from tokenflow.data.sources import Source
from tokenflow.understanding.own_answers import own_answers, whole_sentences, write_own_answers


def test_each_prompt_gets_an_answer():
    model, words = small_language_model().eval(), small_words()
    prompts = text_prompts(9)
    options = {"template": "smollm2", "max_new_tokens": 80, "batch_size": 5}
    first, again = (own_answers(model, words, prompts, seed=1, **options) for _ in range(2))
    assert len(first) == 9
    assert any(first)
    assert first == again != own_answers(model, words, prompts, seed=2, **options)


def test_answers_that_were_cut_off_end_with_a_sentence():
    assert whole_sentences("It is 3.5 m long. It eats grass. And") == "It is 3.5 m long. It eats grass."
    assert whole_sentences("one two") == ""
    assert whole_sentences("What? Yes") == "What?"


def test_they_are_conversations(tmp_path):
    file = tmp_path / "text-train.jsonl"
    assert write_own_answers(file, ["Who?", "What?", "Where?"], ["Me.", "", "Here."]) == 2
    rows = Conversations(Source(str(file)))
    assert [rows.images(i) for i in range(len(rows))] == [[], []]
    assert [m.text for m in rows.messages(1, 0)] == ["Where?", "Here."]
