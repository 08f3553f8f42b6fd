"""Released understanding models: a released folder, converted, loaded by transformers' LLaVA, and compared
with the goldens of tests/parity/i2t (its README has the tolerances and section numbers).

The tower is a small one whose features are replaced by the stored maps: it has cases of its own. Measured on
CPU in float32: embeddings, hidden states and logits within 5e-6, greedy tokens and pictures equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from seeded_weights import load_manifest, seeded_state_dict
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from tokenflow import TokenFlowImageProcessor
from tokenflow.checkpoints.understanding import convert_understanding
from tokenflow.understanding import chat_template

I2T = Path(__file__).parent / "i2t"
IMAGE, IGNORE = -200, -100
EMBEDS_ATOL, LOGITS_ATOL, LOSS_ATOL, GRAD_RTOL = 1e-5, 1e-4, 1e-5, 1e-3
SPECIAL = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
}


def text_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(I2T / f"tokenizer_{name}.json"), **SPECIAL[name])


def conversations() -> dict:
    return json.loads((I2T / "conversations.json").read_text())


def write_released_folder(name: str, folder: Path) -> None:
    """A folder as released, without the tower, its weights in two files."""
    manifest = load_manifest(I2T / name / "manifest.json")
    case = json.loads((I2T / name / "case.json").read_text())
    weights = seeded_state_dict(manifest, case["seed"])
    folder.mkdir()
    (folder / "config.json").write_bytes((I2T / name / "released_config.json").read_bytes())
    text_tokenizer(name).save_pretrained(folder)
    projector = {key: value for key, value in weights.items() if "mm_projector" in key}
    rest = {key: value for key, value in weights.items() if key not in projector}
    save_file(rest, folder / "model-00001-of-00002.safetensors")
    save_file(projector, folder / "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module", params=["qwen", "llama"])
def case(request, small_model_folder, tmp_path_factory) -> SimpleNamespace:
    """The converted and loaded model, its processor, and everything stored about it."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    write_released_folder(name, folder / "released")
    report = convert_understanding(folder / "released", folder / "out", tokenizer=small_model_folder)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stored = load_file(I2T / name / "inputs.safetensors")
    features = stored["feature_map"].flatten(2).transpose(1, 2)
    return SimpleNamespace(
        name=name,
        report=report,
        model=model.eval(),
        processor=AutoProcessor.from_pretrained(folder / "out"),
        stored=stored,
        features=features,
        golden=load_file(I2T / name / "golden.safetensors"),
        about=json.loads((I2T / name / "case.json").read_text()),
        vocabulary=json.loads((I2T / name / "released_config.json").read_text())["vocab_size"],
    )


def show(case, images: list[int], monkeypatch) -> None:
    """Have the tower see the stored maps of `images`, whatever the pixels."""
    features = case.features[images]
    monkeypatch.setattr(
        case.model.model.vision_tower,
        "forward",
        lambda pixels, **kwargs: BaseModelOutput(last_hidden_state=features, hidden_states=(features,)),
    )


def expand(case, ids: list[int]) -> list[int]:
    """Stored ids with their one -200 an image as the ids that LLaVA takes."""
    token, count = case.model.config.image_token_id, case.features.shape[1]
    return [new for old in ids for new in ([token] * count if old == IMAGE else [old])]


PIXELS = torch.zeros(1, 3, 32, 32)


def test_the_report_says_what_was_made(case):
    report = case.report
    assert report.language_model == {"qwen": "qwen2", "llama": "llama"}[case.name]
    assert report.image_token_id == 320  # the first id that the text tokenizer leaves free
    assert report.grown_rows == {"qwen": 0, "llama": 64}[case.name]
    assert report.tensors == len(load_manifest(I2T / case.name / "manifest.json"))
    assert case.model.config.text_config.vocab_size == {"qwen": 336, "llama": 384}[case.name]
    suppressed = {"qwen": [320], "llama": list(range(320, 384))}[case.name]
    assert case.model.generation_config.suppress_tokens == suppressed


@torch.no_grad()
def test_inference(case, monkeypatch):
    show(case, [0], monkeypatch)
    ids = torch.tensor([expand(case, case.about["infer"]["input_ids"])])
    assert ids.shape[1] == case.about["infer"]["spliced_len"]
    projected = case.model.get_image_features(PIXELS, return_dict=True).pooler_output[0]
    golden, at = case.golden, case.about["infer"]["probe_positions"]
    torch.testing.assert_close(projected[:4], golden["projected_row0_head"], atol=EMBEDS_ATOL, rtol=0)
    out = case.model(input_ids=ids, pixel_values=PIXELS, output_hidden_states=True)
    embeds, last = out.hidden_states[0][0], out.hidden_states[-1][0]
    torch.testing.assert_close(embeds[at], golden["infer.inputs_embeds"], atol=EMBEDS_ATOL, rtol=0)
    torch.testing.assert_close(last[at], golden["infer.last_hidden"], atol=LOGITS_ATOL, rtol=0)
    logits = out.logits[0, at, : case.vocabulary]
    torch.testing.assert_close(logits, golden["infer.logits"], atol=LOGITS_ATOL, rtol=0)
    assert float(embeds.double().sum()) == pytest.approx(case.about["infer"]["embeds_sum"], abs=1e-2)


@torch.no_grad()
def test_greedy_tokens(case, monkeypatch):
    show(case, [0], monkeypatch)
    ids = torch.tensor([expand(case, case.about["infer"]["input_ids"])])
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    out = case.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=PIXELS,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert out.sequences[0, ids.shape[1] :].tolist() == case.about["infer"]["greedy_tokens"]
    logits = torch.cat(out.logits)[:, : case.vocabulary]
    torch.testing.assert_close(logits, case.golden["infer.step_logits"], atol=LOGITS_ATOL, rtol=0)


@torch.no_grad()
def test_two_images(case, monkeypatch):
    show(case, [0, 1], monkeypatch)
    ids = torch.tensor([expand(case, case.about["two_images"]["input_ids"])])
    assert ids.shape[1] == case.about["two_images"]["spliced_len"]
    logits = case.model(input_ids=ids, pixel_values=PIXELS).logits[0, -1, : case.vocabulary]
    torch.testing.assert_close(logits, case.golden["two_images.last_logits"], atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize("tag", ["pair", "with_text_only", "truncated", "plain"])
def test_training_batches(case, tag, monkeypatch):
    about, stored = case.about[tag], case.stored
    limit = about["limit"] or case.about["config"]["tokenizer_model_max_length"]
    rows, labels, images = [], [], []
    for row, (ids, targets, mask) in enumerate(
        zip(*(stored[f"{tag}.{key}"] for key in ("input_ids", "labels", "attention_mask")), strict=True)
    ):
        ids, targets = ids[mask.bool()].tolist(), targets[mask.bool()].tolist()
        images += [row] * ids.count(IMAGE)
        repeats = [case.features.shape[1] if token == IMAGE else 1 for token in ids]
        rows.append(expand(case, ids)[:limit])
        labels.append([t for t, n in zip(targets, repeats, strict=True) for _ in range(n)][:limit])
    show(case, images, monkeypatch)
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    targets = torch.tensor([row + [IGNORE] * (length - len(row)) for row in labels])
    assert torch.equal(targets, case.golden[f"{tag}.spliced_labels"].long())
    assert torch.equal(mask, case.golden[f"{tag}.spliced_attention_mask"].long())
    batch = {"input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows])}
    out = case.model(**batch, attention_mask=mask, labels=targets, pixel_values=PIXELS)
    last = out.logits[range(len(rows)), about["last_positions"], : case.vocabulary]
    torch.testing.assert_close(last, case.golden[f"{tag}.last_logits"], atol=LOGITS_ATOL, rtol=0)
    if case.report.grown_rows:  # the released softmax knows nothing of the rows that LLaVA needs
        logits = out.logits[:, :-1, : case.vocabulary].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets[:, 1:].flatten())
    else:
        loss = out.loss
    assert loss.item() == pytest.approx(about["loss"], abs=LOSS_ATOL)
    weight = case.model.model.multi_modal_projector.linear_1.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    golden = case.golden[f"{tag}.grad.mm_projector.0.weight"]
    assert (gradient[:6] - golden).abs().max() <= GRAD_RTOL * golden.abs().max()


# ------------------------------------------------------------------------------------- strings, ids, pictures
def messages(name: str, turns: int) -> list[dict]:
    """The conversations of README section 5, images after the text to see them put in front."""
    if turns == 1:
        texts = ["What is shown in this picture?", "The picture shows a small red boat on a quiet lake."]
    else:
        texts = ["How many people are there in the image?", "There are two people\nand one dog."]
        texts += ["Is it day or night?", "It is day, the sun is bright."]
    found = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for text, role in zip(texts, ["user", "assistant"] * turns, strict=False)
    ]
    found[0]["content"].append({"type": "image"})
    return found


@pytest.mark.parametrize("name", ["plain", "vicuna_v1", "qwen_2_5"])
def test_rendered_conversations(name):
    words, expected = text_tokenizer("qwen"), conversations()["rendered"][name]

    def render(turns: list[dict], prompt: bool) -> str:
        return words.apply_chat_template(
            turns, chat_template=chat_template(name), tokenize=False, add_generation_prompt=prompt
        )

    for turns, word in ((1, "one"), (2, "two")):
        if expected[f"{word}_turn_prompt"] is not None:
            assert render(messages(name, turns)[:-1], True) == expected[f"{word}_turn_prompt"]
        if expected[f"{word}_turn_full"] is not None:
            assert render(messages(name, turns), False) == expected[f"{word}_turn_full"]
    if "training_string" in expected:
        caption = [{"role": "user", "content": [{"type": "image"}]}]
        caption += [{"role": "assistant", "content": "A brown cow wearing a halter."}]
        assert render(caption, False) == expected["training_string"]


@pytest.mark.parametrize("turns", ["one", "two"])
def test_token_ids_of_prompts(case, turns):
    stored = conversations()["prompts"][case.name][f"{turns}_turn_prompt"]
    ids = case.processor.tokenizer(stored["text"]).input_ids
    token = case.processor.image_token_id
    assert [IMAGE if i == token else i for i in ids] == stored["input_ids"]
    conversation = messages(case.name, {"one": 1, "two": 2}[turns])[:-1]
    assert case.processor.apply_chat_template(conversation, add_generation_prompt=True) == stored["text"]


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("name", ["landscape", "portrait"])
def test_pictures(name, mode):
    about = json.loads((I2T / "images.json").read_text())["images"]
    (about,) = [entry for entry in about if entry["file"] == f"{name}.png" and entry["mode"] == mode]
    processor = TokenFlowImageProcessor(size=384, resize_mode={"pad": "pad", "square": "squash"}[mode])
    picture = Image.open(I2T / "images" / f"{name}.png").convert("RGB")
    pixels = processor(picture, return_tensors="pt").pixel_values[0]
    expected = torch.from_numpy(np.array(Image.open(I2T / about["expected_u8"]))).permute(2, 0, 1)
    assert torch.equal((pixels * 127.5 + 127.5).round().to(torch.uint8), expected)
    golden = load_file(I2T / "golden_images.safetensors")
    (centre,) = [value for key, value in golden.items() if name in key and mode in key and "center" in key]
    torch.testing.assert_close(pixels[:, 176:208, 176:208], centre, atol=1e-6, rtol=0)
    assert float(pixels.mean()) == pytest.approx(about["mean"], abs=1e-6)
