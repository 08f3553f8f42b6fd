"""The benchmarks compare like with like: the baselines give what our code gives."""

from __future__ import annotations

import pytest
import torch
from benchmarks import eager_baseline, measure, search, text_to_image, text_to_image_gpu, understanding

from small_model import small_chat, small_config, small_language_model, small_words
from tokenflow import TokenFlowModel


@torch.inference_mode()
def test_eager_baseline_equals_the_model():
    torch.manual_seed(0)
    model = TokenFlowModel(small_config()).eval()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    indices, quantized = eager_baseline.encode(model, pixels)
    encoded = model.encode(pixels)
    assert torch.equal(indices, encoded.indices)
    torch.testing.assert_close(quantized, encoded.quantized)
    image, semantic = eager_baseline.decode(model, quantized)
    decoded = model.decode(quantized)
    torch.testing.assert_close(image, decoded.pixel_values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(semantic, decoded.semantic, atol=1e-5, rtol=1e-4)


def test_searches_agree():
    queries, codes = search.vectors(50, 400)
    for ours, naive in zip(
        search.our_search(queries, codes), search.naive_search(queries, codes), strict=True
    ):
        torch.testing.assert_close(ours, naive)


def test_sampling_with_and_without_a_cache_agrees():
    model = text_to_image.build(layers=1, width=64, codebook_size=256)
    seconds, equal, positions = text_to_image.compare(model, rows=2)
    assert set(seconds) == {"ours", "plain"}
    assert equal > 0.99  # random weights have near ties, which rounding may turn
    assert positions["plain"] / positions["ours"] > 3.8


def test_a_whole_picture_is_timed_from_its_prompt():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipe = text_to_image_gpu.build({**sizes, "vocab_size": 600}, small_config(), "cpu", torch.bfloat16)
    kinds = {name.split(".")[0]: p.dtype for name, p in pipe.model.named_parameters()}
    assert set(kinds.values()) == {torch.bfloat16}
    assert pipe.model.code_table.codes.dtype == torch.float32
    rows = text_to_image_gpu.rows_for(pipe, batches=(1, 2), repeats=1)
    assert [row.seconds["paper, A100"] for row in rows] == [2.7, 2.7]
    assert "7 passes over" in rows[0].note
    assert "4 rows of 2" in rows[1].note
    assert rows[0].aim == pytest.approx(5.4)


def test_without_a_gpu_the_large_model_is_skipped(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert text_to_image_gpu.run(repeats=1) == []
    assert capsys.readouterr().err == "text-to-image-7b: skipped, there is no CUDA device\n"


def test_both_chats_see_as_much_and_answer_at_the_same_length(small_model_folder):
    ours = small_chat(small_model_folder)
    tower = ours[0].model.vision_tower
    clip = understanding.with_clip(tower, small_language_model(), small_words(), width=32)
    size = sum(parameter.numel() for parameter in clip[0].model.vision_tower.parameters())
    assert size == pytest.approx(understanding.encoding_parameters(tower), rel=0.1)
    given = [understanding.one_question(chat, batch=2) for chat in (ours, clip)]
    assert torch.equal(given[0]["input_ids"], given[1]["input_ids"])
    for (model, _), asked in zip((ours, clip), given, strict=True):
        new = understanding.answer(model, asked, 5).shape[1] - asked["input_ids"].shape[1]
        assert new == 5
    for seconds in understanding.compare({"ours": ours, "clip": clip}, batch=2, repeats=1):
        assert set(seconds) == {"ours", "clip"}


def test_a_second_question_encodes_nothing(small_model_folder):
    times, encoded, decoded = understanding.second_question(small_chat(small_model_folder), repeats=1)
    assert set(times) == {"ours", "encoded_again"}
    assert (encoded, decoded) == (1, 0)


def test_sides_take_turns_and_the_best_counts():
    calls = []
    times = measure.best_seconds(2, a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"}
    assert all(0 < seconds < 1 for seconds in times.values())


def allocate(mebibytes: int):
    return lambda: bytearray(b"1") * (mebibytes * 2**20)


@pytest.mark.skipif(not measure.PEAK_RESET.exists(), reason="memory is measured through Linux's /proc")
def test_extra_memory_of_a_process():
    assert 60 < measure.extra_mebibytes(allocate, 64) < 80
