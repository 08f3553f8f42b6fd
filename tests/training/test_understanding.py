"""train understanding: what each stage changes, that it learns, goes on exactly, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from terminated_run import terminated_run
from transformers import LlavaForConditionalGeneration

from tokenflow.errors import UserError
from tokenflow.recipes.understanding import UNDERSTANDING_RECIPES
from tokenflow.training.understanding import Skipped, train_understanding
from tokenflow.training.understanding_models import build_chat
from tokenflow.training.understanding_recipe import (
    ChatModelRecipe,
    LoraRecipe,
    StageRecipe,
    UnderstandingRecipe,
)
from tokenflow.understanding import ask, load

COLOURS = ("red", "green", "blue", "gold")
LANGUAGE_MODEL, PROJECTOR = "model.language_model.", "model.multi_modal_projector."


@pytest.fixture
def recipe(language_model, conversations, small_model_folder, tmp_path) -> UnderstandingRecipe:
    stage = StageRecipe(sources=(str(conversations),), batch_size=4, steps=4, lr=1e-2)
    return UnderstandingRecipe(
        model=ChatModelRecipe(str(small_model_folder), "last", str(language_model), "smollm2"),
        align=replace(stage, template="plain"),
        instruct=stage,
        output_dir=str(tmp_path / "run"),
        mixed_precision="no",
        cache=str(tmp_path / "cache"),
        checkpoint_every=100,
        log_every=1,
        trackers=(),
    )


@pytest.fixture
def lora(recipe) -> UnderstandingRecipe:
    """The second stage with a LoRA, from a new projector."""
    whole = replace(recipe, output_dir=recipe.output_dir + "-start")
    train_understanding(replace(whole, align=replace(recipe.align, steps=1)))
    low_rank = LoraRecipe(rank=2, alpha=4.0, targets=("q_proj", "down_proj"), lr=1e-2)
    start = f"{whole.output_dir}/align/export"
    return replace(recipe, stage="instruct", lora=low_rank, export="parts", init_from=start)


def log_of(recipe) -> list[dict]:
    lines = [json.loads(line) for line in (Path(recipe.folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "conversations_per_second"} for line in lines]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder, device="cpu", dtype="float32")[0].state_dict()


def changed(recipe, export: Path) -> set[str]:
    """The tensors that are not as they were before all training."""
    fresh = build_chat(replace(recipe, stage="align", init_from=None)).model.state_dict()
    return {name for name, tensor in state_of(export).items() if not torch.equal(tensor, fresh[name])}


# --- what learns


def test_align_changes_the_projector_alone(recipe):
    done = train_understanding(recipe)
    assert (done.step, done.stopped_by, done.skipped) == (4, "steps", 1)
    moved = changed(recipe, done.export)
    assert moved
    assert all(name.startswith(PROJECTOR) for name in moved)
    (skipped,) = (Path(recipe.folder) / "skipped.txt").read_text().splitlines()
    assert skipped.startswith("cannot read image of row 4 of ")
    assert "(id 4)" in skipped
    assert train_understanding(recipe).step == 4  # finished: nothing more to do


def test_instruct_changes_projector_and_language_model(recipe):
    train_understanding(recipe)
    done = train_understanding(replace(recipe, stage="instruct"))
    moved = changed(recipe, done.export)
    assert any(name.startswith(PROJECTOR) for name in moved)
    assert any(name.startswith(LANGUAGE_MODEL) for name in moved)
    assert not any("vision_tower" in name for name in moved)
    model, processor = load(done.export, device="cpu")
    assert isinstance(ask(model, processor, Image.new("RGB", (30, 30)), "What?", max_new_tokens=2), str)
    from transformers import LlavaForConditionalGeneration

    again = LlavaForConditionalGeneration.from_pretrained(done.export)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_lora_is_exported_as_it_learned(lora):
    done = train_understanding(lora)
    files = {path.name for path in done.export.iterdir()}
    assert {"parts.json", "projector.safetensors", "adapter_model.safetensors"} <= files
    assert not {name for name in files if name.startswith("model")}
    moved = {name for name in changed(lora, done.export) if not name.startswith(PROJECTOR)}
    ends = ("self_attn.q_proj.weight", "mlp.down_proj.weight")
    assert moved == {f"{LANGUAGE_MODEL}layers.{i}.{end}" for i in range(2) for end in ends}
    # The export, loaded without peft, gives the logits of the model in training.
    going_on = build_chat(replace(lora, init_from=str(done.export)))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = going_on.model.eval()(input_ids=ids).logits
        found = load(done.export, device="cpu")[0](input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # And so does the whole folder.
    whole = train_understanding(replace(lora, export="whole", output_dir=f"{lora.output_dir}-whole"))
    merged = state_of(whole.export)
    for name, tensor in state_of(done.export).items():
        torch.testing.assert_close(merged[name], tensor, msg=name)


def test_text_is_kept_as_the_language_model_has_it(lora, tmp_path):
    """Conversations without a picture pull back to the untouched model, not to their answers."""
    text = tmp_path / "text.jsonl"
    said = [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "blue blue blue blue"}]
    text.write_text(f"{json.dumps({'conversations': said})}\n" * 8)
    stage = replace(lora.instruct, sources=(str(text),), steps=30)
    learned = replace(lora, instruct=stage, lora=replace(lora.lora, lr=0.1))
    train_understanding(learned)
    kept = replace(learned, lora=replace(learned.lora, keep=1.0), output_dir=f"{lora.output_dir}-kept")
    train_understanding(kept)
    losses = [[line["loss"] for line in log_of(run) if "loss" in line] for run in (learned, kept)]
    assert losses[0][-1] < losses[0][0] - 0.1
    assert max(losses[1]) < 1e-6  # nothing has moved away
    # From one that has learned the answers, back.
    back = replace(kept, init_from=f"{learned.folder}/export", output_dir=f"{lora.output_dir}-back")
    train_understanding(back)
    losses = [line["loss"] for line in log_of(back) if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


def test_conversations_are_learned_by_heart(lora):
    stage = replace(lora.instruct, steps=100, batch_size=8, lr=2e-2)
    whole = replace(lora, instruct=stage, lora=LoraRecipe(), export="whole", mixed_precision="bf16")
    train_understanding(whole)
    losses = [line["loss"] for line in log_of(whole) if "loss" in line]
    assert losses[-1] < 0.1 * losses[0]


def test_evaluation_does_not_disturb(recipe, conversations):
    stage = replace(recipe.align, eval_sources=(str(conversations),))
    train_understanding(replace(recipe, align=stage, eval_every=2))
    losses = [line["eval_loss"] for line in log_of(recipe) if "eval_loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    plain = replace(recipe, output_dir=f"{recipe.output_dir}-plain")
    train_understanding(plain)
    assert [x for x in log_of(recipe) if "loss" in x] == [x for x in log_of(plain) if "loss" in x]


def test_patch_dropout_shows_a_part_of_each_picture(recipe, lora, conversations, monkeypatch):
    shown: dict[bool, set[int]] = {True: set(), False: set()}
    forward = LlavaForConditionalGeneration.forward

    def watched(model, **inputs):
        if "pixel_values" in inputs:
            shown[model.training].add(inputs["pixel_values"].shape[1])
        return forward(model, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", watched)
    stage = replace(lora.instruct, patch_dropout=0.75, eval_sources=(str(conversations),))
    part = replace(lora, instruct=stage, eval_every=2)
    train_understanding(part)
    assert shown == {True: {4}, False: {16}}  # measured with all of it
    again = replace(part, output_dir=f"{part.output_dir}-again")
    for _ in range(4):  # a step an invocation
        train_understanding(replace(again, max_minutes=0.0))
    assert log_of(again) == log_of(part)


# --- that it does not matter how


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_ends_in_a_checkpoint(recipe):
    recipe = replace(recipe, align=replace(recipe.align, steps=5_000), num_workers=2)
    done = terminated_run(train_understanding, recipe, Path(recipe.folder))
    assert done.stopped_by == "SIGTERM"
    assert log_of(recipe)[-1]["step"] == done.step
    assert done.export.exists()


def test_a_run_of_few_steps_has_a_log(recipe):
    train_understanding(replace(recipe, log_every=100))
    every = replace(recipe, output_dir=f"{recipe.output_dir}-every")
    train_understanding(every)
    (line,) = log_of(recipe)
    assert line["loss"] == pytest.approx(sum(x["loss"] for x in log_of(every)) / 4)


def test_a_stopped_run_goes_on_exactly(lora):
    stage = replace(lora.instruct, accumulation=2)
    lora = replace(lora, instruct=stage)
    whole = replace(lora, output_dir=f"{lora.output_dir}-whole", checkpoint_every=3)
    train_understanding(whole)
    for step in range(1, 5):  # a step an invocation
        done = train_understanding(replace(lora, max_minutes=0.0))
        assert done.step == step
    assert log_of(lora) == log_of(whole)
    once = state_of(Path(whole.folder) / "export")
    for name, tensor in state_of(Path(lora.folder) / "export").items():
        assert torch.equal(tensor, once[name]), name


def test_cache_and_accumulation_change_nothing(recipe):
    train_understanding(recipe)
    parts = replace(recipe.align, accumulation=4)
    other = replace(recipe, cache=None, align=parts, output_dir=f"{recipe.output_dir}-other")
    done = train_understanding(other)
    assert done.skipped == 1
    losses = [[line["loss"] for line in log_of(run) if "loss" in line] for run in (recipe, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_conversations_begin_with_is_computed_once(lora, monkeypatch):
    """The same losses and gradients from fewer positions."""
    positions, forward = [0], LlavaForConditionalGeneration.forward

    def watched(model, **inputs):
        positions[-1] += inputs["input_ids"].numel()
        return forward(model, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", watched)
    train_understanding(lora)
    positions.append(0)
    whole = replace(lora, output_dir=f"{lora.output_dir}-whole")
    monkeypatch.setattr("tokenflow.training.understanding.shared_beginning", lambda *_: 0)
    train_understanding(whole)
    assert positions[0] < 0.8 * positions[1]
    for key in ("loss", "grad_norm"):
        logs = [[line[key] for line in log_of(run)] for run in (lora, whole)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_only_pictures_that_will_be_seen_are_looked_at(recipe):
    def kept() -> int:
        return sum(len(load_file(file)["keys"]) for file in Path(recipe.cache).glob("*/*.safetensors"))

    train_understanding(replace(recipe, align=replace(recipe.align, steps=1, batch_size=2)))
    assert 0 < kept() <= 2
    train_understanding(replace(recipe, output_dir=f"{recipe.output_dir}-more"))
    assert kept() == len(COLOURS)


@pytest.mark.parametrize("strategy", ["last-semantic", "last-pixel", "all", "all-residual"])
def test_every_choice_of_features(recipe, strategy):
    stage = replace(recipe.align, steps=1)
    done = train_understanding(
        replace(recipe, align=stage, model=replace(recipe.model, feature_strategy=strategy))
    )
    model, _ = load(done.export, device="cpu")
    assert model.config.vision_config.feature_strategy == strategy


def test_an_ordinary_vision_model_as_the_tower(recipe, tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "clip")
    clip = replace(recipe, model=replace(recipe.model, tower=str(tmp_path / "clip")))
    cached = train_understanding(clip)
    plain = replace(clip, output_dir=f"{recipe.output_dir}-plain", align=replace(clip.align, steps=1))
    train_understanding(replace(plain, cache=None))
    first = [log_of(run)[0]["loss"] for run in (clip, plain)]
    assert first[0] == pytest.approx(first[1], rel=0.01)
    model, processor = load(cached.export, device="cpu")
    assert isinstance(ask(model, processor, Image.new("RGB", (30, 30)), "What?", max_new_tokens=2), str)


def test_processes_name_a_row_once(tmp_path):
    one, other = (Skipped(tmp_path / "skipped.txt") for _ in range(2))
    one.add(["row 4"])
    other.add(["row 4", "row 7", "row 7"])
    assert one.lines == {"row 4", "row 7"}
    assert (tmp_path / "skipped.txt").read_text() == "row 4\nrow 7\n"


# --- what is refused


def test_a_folder_of_another_model_is_refused(lora):
    train_understanding(replace(lora, instruct=replace(lora.instruct, steps=1)))
    for change, said in (
        ({"lora": replace(lora.lora, targets=("o_proj",))}, r"lora\.targets"),
        ({"lora": replace(lora.lora, rank=4)}, r"lora\.rank 2 -> 4"),
        ({"lora": LoraRecipe(), "export": "whole"}, r"lora\.rank 2 -> 0"),
        ({"model": replace(lora.model, feature_strategy="all")}, r"model\.feature_strategy last -> all"),
    ):
        with pytest.raises(UserError, match=rf"was begun otherwise \(.*{said}.*another --output-dir"):
            train_understanding(replace(lora, **change))
    train_understanding(replace(lora, lora=replace(lora.lora, lr=1e-3)))  # a rate may change
    (file,) = Path(lora.folder).glob("checkpoints/checkpoint-4/learned.safetensors")
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read .*learned\.safetensors.* to go back to an older one"):
        train_understanding(replace(lora, instruct=replace(lora.instruct, steps=5)))


def test_mistakes_are_one_line(recipe, lora, tmp_path):
    def fails(match: str, **changes) -> None:
        with pytest.raises(UserError, match=match):
            train_understanding(replace(recipe, **changes))

    fails("give --align.sources", align=replace(recipe.align, sources=()))
    fails("there is no .*/align/export to start from: run --stage align first", stage="instruct")
    fails("has no place for a language model that learned", stage="instruct", export="parts",
          init_from=lora.init_from)  # fmt: skip
    fails("batch size 3 is no multiple", align=replace(recipe.align, batch_size=3, accumulation=2))
    fails("cannot load language model", model=replace(recipe.model, language_model=str(tmp_path)))
    fails("set --lora.rank", stage="instruct", lora=LoraRecipe(keep=1.0))
    fails("wants whole weights", stage="instruct", lora=replace(lora.lora, keep=1.0), fsdp_config="fsdp.json")
    with pytest.raises(UserError, match=r"patch_dropout=1\.0 must be"):
        replace(recipe.align, patch_dropout=1.0)
    strange = replace(lora.lora, targets=("wq",))
    with pytest.raises(UserError, match="no layer of the language model is called wq"):
        train_understanding(replace(lora, lora=strange))
    broken = tmp_path / "broken.jsonl"
    row = {"image": "none.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    broken.write_text(json.dumps(row))
    fails("no conversation can be used", align=replace(recipe.align, sources=(str(broken),)))


def test_recipes_state_the_papers_values():
    for name in ("llava15-vicuna-13b", "cambrian-qwen2.5-14b"):
        r = UNDERSTANDING_RECIPES[name]()
        assert (r.align.lr, r.align.batch_size, r.align.template, r.align.resize_mode) == (
            1e-3, 256, "plain", "squash",
        )  # fmt: skip
        assert (r.instruct.lr, r.instruct.batch_size, r.instruct.resize_mode) == (2e-5, 128, "pad")
        assert (r.warmup, r.weight_decay, r.clip, r.max_length, r.lora.rank) == (0.03, 0.0, 1.0, 2048, 0)
    assert UNDERSTANDING_RECIPES["cambrian-qwen2.5-14b"]().instruct.labels == "released"


@pytest.mark.slow
def test_the_command_trains_both_stages(recipe, conversations, language_model, tmp_path):
    m = recipe.model
    common = [
        sys.executable, "-m", "tokenflow", "train", "understanding", "tokenflow-tiny-chat",
        "--model.tower", m.tower, "--model.language-model", m.language_model, "--model.package", "None",
        "--output-dir", str(tmp_path / "cli"), "--cache", str(tmp_path / "cache"), "--trackers",
        "--words.steps", "2",
    ]  # fmt: skip
    for stage in ("align", "instruct"):
        options = [f"--{stage}.sources", str(conversations), f"--{stage}.steps", "1"]
        done = subprocess.run(
            [*common, "--stage", stage, *options, f"--{stage}.batch-size", "4"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"the model: {tmp_path / 'cli' / stage / 'export'}" in done.stdout
        assert "1 conversation skipped" in done.stdout
    adapter = load_file(tmp_path / "cli" / "instruct" / "export" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7
