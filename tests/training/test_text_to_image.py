"""train text-to-image: what it learns from, that a stopped run goes on exactly, what it leaves behind."""

from __future__ import annotations

import io
import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from terminated_run import terminated_run

from tokenflow import TokenFlowForTextToImage, TokenFlowModel, TokenFlowTextToImageConfig
from tokenflow.data.sources import Source
from tokenflow.data.token_shards import ShardInfo, write_shard
from tokenflow.errors import UserError
from tokenflow.generation.pipeline import TextToImagePipeline
from tokenflow.recipes.text_to_image import GENERATION_RECIPES
from tokenflow.tokenizer.token_file import tokenizer_fingerprint
from tokenflow.training import text_to_image
from tokenflow.training.generation_data import GenerationRows, first_sentence
from tokenflow.training.text_to_image import noisy_codes, train_text_to_image
from tokenflow.training.text_to_image_recipe import (
    ClassModelRecipe,
    ClassToImageRecipe,
    GenerationData,
    GenerationOptimizer,
    LanguageModelRecipe,
    TextToImageRecipe,
)
from tokenflow.training.text_tokenizer import train_text_tokenizer

COLOURS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, small_model_folder):
    """Token shards of 12 pictures: the codes follow the class, and so do the captions."""
    model = TokenFlowModel.from_pretrained(small_model_folder)
    config = model.config
    info = ShardInfo("small", tokenizer_fingerprint(model), 64, list(config.scales), config.image_size)
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 64, config.num_tokens).tolist() for _ in COLOURS]
    folder = tmp_path_factory.mktemp("tokens") / "squares"
    for split, count in (("train", 12), ("val", 4)):
        rows = [
            {
                "codes": codes[i % 4],
                "captions": [f"A {COLOURS[i % 4]} square. It is small.", f"{COLOURS[i % 4]}"],
                "label": i % 4,
                "label_name": COLOURS[i % 4],
                "row": i,
            }
            for i in range(count)
        ]
        write_shard(folder / f"{split}-00000-of-00001.parquet", rows, info)
    return folder


@pytest.fixture
def recipe(shards, small_model_folder, tmp_path):
    return TextToImageRecipe(
        model=LanguageModelRecipe(
            tokenizer=str(small_model_folder),
            max_text_tokens=8,
            text_vocabulary=300,
            hidden_size=32,
            intermediate_size=64,
            layers=2,
            heads=2,
        ),
        data=GenerationData(sources=(str(shards),), eval_sources=(str(shards),), batch_size=4),
        optimizer=GenerationOptimizer(
            kind="muon", lr=1e-2, muon_lr=1e-2, schedule="cosine", warmup_steps=2, ema_decay=0.9
        ),
        output_dir=str(tmp_path / "run"),
        steps=6,
        mixed_precision="no",
        checkpoint_every=100,
        log_every=1,
        eval_every=100,
        sample_every=100,
        trackers=(),
    )


def log_of(recipe) -> list[dict]:
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def weights_of(recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.output_dir) / "export" / "model.safetensors")


# --- what is learned from


def rows_of(shards, **options):
    return GenerationRows([Source(str(shards))], 32, train=True, **options)


def test_captions_are_chosen_shortened_and_dropped_at_the_stated_rates(shards):
    rows = rows_of(shards, caption_dropout=0.3, first_sentence=0.5)
    captions = [rows[draw]["caption"] for draw in rows.draws(1000)]
    assert 0.25 < np.mean([caption == "" for caption in captions]) < 0.35
    kept = [caption for caption in captions if caption]
    assert 0.4 < np.mean(["square" in caption for caption in kept]) < 0.6
    long = [caption for caption in kept if "square" in caption]
    assert 0.4 < np.mean([caption.endswith("square.") for caption in long]) < 0.6
    again = [rows[draw]["caption"] for draw in rows.draws(1000)]
    assert again == captions
    assert first_sentence("It costs 3.50 now! Yes.") == "It costs 3.50 now!"
    assert first_sentence("no end") == "no end"


def test_rows_with_a_class_name_have_captions_beside_their_own(shards):
    templates = ("a picture of {a} {name}", "{name}")
    rows = rows_of(shards, extra_templates=templates)
    captions = [rows[draw]["caption"] for draw in rows.draws(300)]
    share = np.mean([caption.startswith("a picture of a") for caption in captions])
    assert 0.2 < share < 0.46  # one of three: two of its own, of which one is the bare name, too
    seen = GenerationRows([Source(str(shards))], 32, train=False, extra_templates=templates)
    assert not any(caption.startswith("a picture") for caption in seen.all_captions())


def test_draws_follow_the_weights_and_do_not_depend_on_their_number(shards):
    sources = [Source(str(shards), weight=3), Source(str(shards), split="val")]
    rows = GenerationRows(sources, 32, train=True)
    draws = list(rows.draws(400))
    assert 0.7 < np.mean([draw.source == 0 for draw in draws]) < 0.8
    assert list(rows.draws(40)) == draws[:40]
    first = [draw.row for draw in draws if draw.source == 0][:12]
    assert sorted(first) == list(range(12))  # each row once an epoch


def test_mixed_kinds_of_sources_and_foreign_tokens_are_refused(recipe, shards, other_model_folder, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has images, other sources have tokens"):
        GenerationRows([Source(str(shards)), Source(str(tmp_path))], 32, train=True)
    with pytest.raises(UserError, match=r"made by tokenizer 'small' \(fingerprint .*not by .*fingerprint"):
        train_text_to_image(replace(recipe, model=replace(recipe.model, tokenizer=str(other_model_folder))))
    with pytest.raises(UserError, match="at least one source"):
        train_text_to_image(replace(recipe, data=replace(recipe.data, sources=())))
    with pytest.raises(UserError, match="batch size 3 is no multiple"):
        train_text_to_image(replace(recipe, data=replace(recipe.data, batch_size=3, accumulation=2)))


def test_own_text_tokenizer_is_deterministic_and_encodes_anything():
    texts = ["a red square", "a green square"] * 5
    tokenizer = train_text_tokenizer(texts, 290)
    assert tokenizer.get_vocab() == train_text_tokenizer(list(texts), 290).get_vocab()
    assert len(tokenizer) <= 290
    assert len(tokenizer.encode("<img>", add_special_tokens=False)) == 1
    ids = tokenizer.encode("A RED ünïcode 漢")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a red ünïcode 漢"


def test_token_noise_replaces_up_to_the_stated_share():
    torch.manual_seed(0)
    codes = torch.zeros(400, 100, dtype=torch.int64)
    changed = (noisy_codes(codes, 0.4, 1000) != codes).float().mean(dim=1)
    assert 0.17 < changed.mean() < 0.23
    assert changed.max() < 0.6
    assert torch.equal(noisy_codes(codes, 0.0, 1000), codes)


# --- runs


def test_a_run_learns_and_exports_a_pipeline(recipe):
    recipe = replace(
        recipe,
        steps=60,
        eval_every=60,
        sample_every=60,
        data=replace(recipe.data, caption_dropout=0.0, batch_size=8, accumulation=2),
        text_loss=True,
    )
    done = train_text_to_image(recipe)
    assert (done.step, done.stopped_by) == (60, "steps")
    log = log_of(recipe)
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.25 * losses[0]
    (measured,) = [line for line in log if "eval_bits_per_token" in line]
    assert measured["eval_bits_per_token"] < 1
    assert set(measured) > {"eval_bits_scale/1", "eval_bits_scale/2", "eval_bits_scale/4"}
    parts = [measured[f"eval_bits_scale/{s}"] * s * s for s in (1, 2, 4)]
    assert sum(parts) / 21 == pytest.approx(measured["eval_bits_per_token"])
    folder = Path(recipe.output_dir)
    assert Image.open(folder / "samples" / "step-00000060.png").size == (4 * 32, 32)
    assert (folder / "samples" / "prompts.txt").read_text().startswith("A red square.")
    pipe = TextToImagePipeline.from_pretrained(done.export)
    codes = pipe("blue", seed=0, guidance_scale=0, temperature=0).codes
    assert codes.shape == (1, 21)
    wanted = GenerationRows([Source(recipe.data.sources[0])], 32, train=False)
    assert (codes[0].numpy() == wanted[wanted.in_order(None)[2]]["codes"]).mean() > 0.9
    assert train_text_to_image(recipe).step == 60  # finished: nothing more to do


def test_the_export_holds_the_averaged_weights(recipe):
    train_text_to_image(replace(recipe, steps=3))
    exported = weights_of(recipe)
    folder = Path(recipe.output_dir) / "checkpoints" / "checkpoint-3"
    averages, last = (load_file(folder / f"{name}.safetensors") for name in ("averages", "model"))
    assert exported.keys() == last.keys()
    for name, average in averages.items():
        assert torch.equal(exported[name], average), name
        assert not torch.equal(last[name], average), name


def test_a_compiled_model_trains_as_an_eager_one(recipe, tmp_path, monkeypatch):
    """Forward and backward as graphs; aot_eager runs them without the C++ compiler that inductor needs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers = partial(text_to_image.compile_layers, backend="aot_eager")
    eager = replace(recipe, steps=3, data=replace(recipe.data, eval_sources=()))
    train_text_to_image(eager)
    monkeypatch.setattr(text_to_image, "compile_layers", compile_layers)
    compiled = replace(eager, compile=True, output_dir=str(tmp_path / "compiled"))
    train_text_to_image(compiled)
    for ours, theirs in zip(log_of(eager), log_of(compiled), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)
    assert weights_of(compiled).keys() == weights_of(eager).keys()  # no `_orig_mod.` in the names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_the_attention_of_a_recipe(recipe):
    config = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 300}

    def wanted(device: str, attention: str = "auto", **changes) -> str:
        long = TokenFlowTextToImageConfig(
            text_config=config, image_open_ids=[1], image_close_ids=[2], **changes
        )
        with torch.device("meta"):
            model = TokenFlowForTextToImage(long)
        return text_to_image.attention_for(replace(recipe, attention=attention), model, torch.device(device))

    assert wanted("cpu") == "sdpa"
    assert wanted("cuda") == "flex_attention"  # 128 + 680 positions
    assert wanted("cuda", scales=[1, 2, 3, 4, 5, 6, 8], max_text_tokens=32) == "sdpa"
    assert wanted("cuda", "sdpa") == "sdpa"
    with pytest.raises(UserError, match="FlexAttention learns on CUDA devices only; use --attention sdpa"):
        train_text_to_image(replace(recipe, attention="flex_attention"))


def test_a_cosine_over_minutes_ends_with_them(recipe):
    optimizer = replace(recipe.optimizer, schedule="cosine-minutes", warmup_steps=1)
    data = replace(recipe.data, eval_sources=())
    timed = replace(recipe, optimizer=optimizer, data=data, max_minutes=0.08, steps=100_000)
    result = train_text_to_image(timed)
    assert result.stopped_by == "max_minutes"
    rates = [line["learning_rate"] for line in log_of(timed) if "learning_rate" in line]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1 * max(rates)
    again = train_text_to_image(timed)  # its time is over
    assert again.step <= result.step + 1
    with pytest.raises(UserError, match="needs max_minutes, where the cosine ends"):
        replace(timed, max_minutes=None)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"compile": True}, {"attention": "flex_attention"}])
def test_a_run_on_a_gpu(recipe, options):
    model = replace(recipe.model, hidden_size=64, heads=2)
    data = replace(recipe.data, num_workers=2)
    run = replace(recipe, model=model, data=data, mixed_precision="bf16", steps=3, eval_every=2, **options)
    result = train_text_to_image(replace(run, sample_every=3))
    assert result.step == 3
    log = log_of(run)
    assert all(np.isfinite(line["loss"]) for line in log if "loss" in line)
    assert any("eval_bits_per_token" in line for line in log)
    assert all(weights.isfinite().all() for weights in weights_of(run).values())
    pipe = TextToImagePipeline.from_pretrained(result.export, dtype=torch.bfloat16).to("cuda")
    assert pipe("a red square", seed=0).images[0].size == (32, 32)


def test_a_stopped_run_goes_on_exactly(recipe, tmp_path):
    recipe = replace(recipe, data=replace(recipe.data, token_noise=0.5, accumulation=2, batch_size=8))
    whole = replace(recipe, output_dir=str(tmp_path / "whole"), checkpoint_every=3)
    train_text_to_image(whole)
    halves = replace(recipe, max_minutes=0.0)
    for step in range(1, 7):  # a step an invocation
        done = train_text_to_image(halves)
        assert done.step == step
    assert log_of(halves)[:6] == log_of(whole)[:6]
    for name, weights in weights_of(whole).items():
        assert torch.equal(weights, weights_of(halves)[name]), name
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert folders == ["checkpoint-5", "checkpoint-6"]


def test_a_half_written_checkpoint_is_passed_over(recipe, tmp_path):
    train_text_to_image(replace(recipe, steps=2))
    broken = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{")
    assert train_text_to_image(replace(recipe, steps=4)).step == 4
    assert [line["step"] for line in log_of(recipe) if "loss" in line] == [1, 2, 3, 4]


def test_a_run_keeps_its_image_tokenizer_and_its_sizes(recipe, other_model_folder):
    recipe = replace(recipe, steps=1, data=replace(recipe.data, eval_sources=()))
    export = train_text_to_image(recipe).export.resolve()
    other = replace(recipe.model, tokenizer=str(other_model_folder))
    with pytest.raises(UserError, match=r"codes of another image tokenizer .*other --output-dir starts anew"):
        train_text_to_image(replace(recipe, steps=2, model=other))
    for steps, sizes, what in (
        (2, {"layers": 1}, "num_hidden_layers 2, not 1"),
        (1, {"layers": 1}, "num_hidden_layers 2, not 1"),  # though there is nothing left to do
        (2, {"hidden_size": 48, "heads": 3}, "hidden_size 32, not 48"),
        (2, {"heads": 4}, "num_attention_heads 2, not 4"),
    ):
        with pytest.raises(UserError, match=f"{what}; another --output-dir starts anew"):
            train_text_to_image(replace(recipe, steps=steps, model=replace(recipe.model, **sizes)))
    by_class = ClassToImageRecipe(
        model=ClassModelRecipe(tokenizer=recipe.model.tokenizer, depth=1, num_classes=4),
        data=recipe.data,
        output_dir=recipe.output_dir,
    )
    with pytest.raises(UserError, match="model_type tokenflow_text_to_image, not tokenflow_class_to_image"):
        train_text_to_image(by_class)
    assert (Path(recipe.output_dir) / "export").resolve() == export


def test_ctrl_c_stops_with_a_checkpoint(recipe, monkeypatch):
    original = text_to_image.noisy_codes
    monkeypatch.setattr(
        text_to_image, "noisy_codes", lambda *a: (signal.raise_signal(signal.SIGINT), original(*a))[1]
    )
    done = train_text_to_image(replace(recipe, data=replace(recipe.data, token_noise=0.1)))
    assert (done.step, done.stopped_by) == (1, "SIGINT")
    assert done.export.exists()


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_ends_in_a_checkpoint(recipe):
    recipe = replace(recipe, steps=100_000, data=replace(recipe.data, num_workers=2))
    done = terminated_run(train_text_to_image, recipe, Path(recipe.output_dir))
    assert done.stopped_by == "SIGTERM"
    assert log_of(recipe)[-1]["step"] == done.step
    assert train_text_to_image(replace(recipe, steps=done.step + 1)).step == done.step + 1


def test_images_are_tokenized_on_the_fly(recipe, tmp_path):
    rows = []
    for i in range(6):
        data = io.BytesIO()
        Image.new("RGB", (36, 40), (40 * i, 100, 200)).save(data, "PNG")
        rows.append({"bytes": b"broken" if i == 2 else data.getvalue(), "path": f"{i}.png"})
    pq.write_table(pa.table({"image": rows, "label_name": ["oak"] * 6}), tmp_path / "train.parquet")
    data = replace(recipe.data, sources=(str(tmp_path / "train.parquet"),), eval_sources=())
    done = train_text_to_image(replace(recipe, steps=2, data=data, optimizer=GenerationOptimizer(lr=1e-3)))
    assert TextToImagePipeline.from_pretrained(done.export)("a photo of an oak", seed=0).images[0].size == (
        32,
        32,
    )
    on_the_fly = GenerationRows([Source(str(tmp_path / "train.parquet"))], 32, train=False)
    items = [on_the_fly[draw] for draw in on_the_fly.in_order(None)]
    assert np.array_equal(items[2]["pixels"], items[3]["pixels"])  # the next one in place of the broken one
    assert items[2]["caption"] == ""  # no templates given here


def test_a_start_from_a_model_of_another_kind_is_refused(recipe, small_model_folder):
    name = str(small_model_folder)
    message = "cannot start from .*: its config says model_type 'tokenflow', not 'tokenflow_{}_to_image'"
    with pytest.raises(UserError, match=message.format("text")):
        train_text_to_image(replace(recipe, model=replace(recipe.model, init_from=name)))
    by_class = ClassModelRecipe(tokenizer=name, init_from=name)
    with pytest.raises(UserError, match=message.format("class")):
        train_text_to_image(
            ClassToImageRecipe(model=by_class, data=recipe.data, output_dir=recipe.output_dir)
        )


def test_going_on_from_a_language_model_or_a_bundled_one(recipe, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    text = train_text_tokenizer(["a red square"] * 3, 280)
    text.save_pretrained(tmp_path / "llama")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(text), **sizes)).save_pretrained(tmp_path / "llama")
    llama = replace(recipe.model, language_model=str(tmp_path / "llama"))
    done = train_text_to_image(replace(recipe, steps=1, model=llama))
    assert TextToImagePipeline.from_pretrained(done.export).model.config.text_config.hidden_size == 16
    again = replace(recipe, steps=1, output_dir=str(tmp_path / "second"))
    shutil.copytree(done.export, tmp_path / "bundled" / "mine")
    monkeypatch.setattr("tokenflow.bundled._HERE", tmp_path / "bundled")
    done = train_text_to_image(replace(again, model=replace(recipe.model, init_from="mine")))
    assert TextToImagePipeline.from_pretrained(done.export).model.config.text_config.hidden_size == 16
    nowhere = replace(recipe.model, language_model=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"cannot load language model .*nowhere"):
        train_text_to_image(replace(recipe, model=nowhere, output_dir=str(tmp_path / "third")))


def test_class_conditional_run(recipe, small_model_folder, tmp_path):
    from tokenflow.generation.class_conditional import TokenFlowForClassToImage

    by_class = ClassToImageRecipe(
        model=ClassModelRecipe(tokenizer=str(small_model_folder), depth=1, num_classes=4),
        data=recipe.data,
        optimizer=recipe.optimizer,
        output_dir=str(tmp_path / "classes"),
        steps=30,
        eval_every=30,
        sample_every=30,
        log_every=1,
        trackers=(),
    )
    done = train_text_to_image(by_class)
    losses = [line["loss"] for line in log_of(by_class) if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    model = TokenFlowForClassToImage.from_pretrained(done.export)
    assert model.generate_indices(torch.tensor([0, 3]), seed=0).shape == (2, 21)
    few = replace(by_class, model=replace(by_class.model, num_classes=2), output_dir=str(tmp_path / "few"))
    with pytest.raises(UserError, match=r"a row has label \d; this model learns classes 0 to 1"):
        train_text_to_image(few)


@pytest.mark.parametrize(
    ("name", "value"),
    [("caption_dropout", -1), ("first_sentence", 7), ("token_noise", -3), ("token_noise", float("nan"))],
)
def test_shares_are_from_0_to_1(name, value):
    with pytest.raises(UserError, match=f"{name}={value} is a share; it must be from 0 to 1"):
        GenerationData(**{name: value})


def test_edges_of_the_shares():
    GenerationData(caption_dropout=1, first_sentence=1, token_noise=0.99)
    with pytest.raises(UserError, match="token_noise=1 must be less than 1"):
        GenerationData(token_noise=1)
    with pytest.raises(UserError, match="class_dropout=2 is a share"):
        ClassModelRecipe(class_dropout=2)


def test_recipes_state_the_papers_values():
    seven, one = GENERATION_RECIPES["llama2-7b"](), GENERATION_RECIPES["tinyllama-1b"]()
    assert one.steps == 2 * seven.steps == 4 * 60_000_000 // 512
    o = seven.optimizer
    assert (o.kind, o.lr, o.weight_decay, o.warmup_steps, o.clip) == ("adamw", 5e-4, 0.1, 5000, 0.5)
    assert (seven.data.caption_dropout, seven.data.first_sentence) == (0.1, 0.2)
    assert (seven.model.max_text_tokens, seven.text_loss) == (128, False)


def test_the_bundled_model_has_the_stated_size():
    from tokenflow.training.generation_models import load_image_tokenizer, new_language_model

    recipe = GENERATION_RECIPES["tokenflow-tiny-t2i"]().model
    text = train_text_tokenizer(["a photo"] * 3, 270)
    model = new_language_model(recipe, load_image_tokenizer("tokenflow-tiny"), text)
    stored = sum(tensor.numel() for tensor in model.state_dict().values())
    stored += 2 * recipe.hidden_size * (recipe.text_vocabulary - len(text))  # rows of embedding and head
    assert stored == 16_681_472  # 33.4 MB in half precision
