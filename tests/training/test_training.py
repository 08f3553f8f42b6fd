"""The training loop in one process: it learns, stops, skips bad steps, leaves frozen parts alone."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import log_lines, prepare, tiny_recipe

from tokenflow import TokenFlowModel
from tokenflow.errors import UserError
from tokenflow.recipes import RECIPES, recipe
from tokenflow.training.averaging import WeightAverage
from tokenflow.training.loop import Trainer, train_tokenizer
from tokenflow.training.loss_config import LossConfig
from tokenflow.training.progress import LogFile, StopRequest, lr_factor
from tokenflow.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainRecipe
from tokenflow.training.teacher_recipe import TeacherRecipe
from tokenflow.training.text_to_image_recipe import GenerationData, TextToImageRecipe
from tokenflow.training.tokenizer import (
    build_config,
    build_losses,
    build_model,
    build_teacher,
    parse_source,
)
from tokenflow.training.understanding_recipe import StageRecipe, UnderstandingRecipe


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def trained(files):
    """A finished run of 4 steps, to start others from."""
    recipe = tiny_recipe(files, "trained", steps=4)
    train_tokenizer(recipe)
    return recipe


class SameBatch:
    """A loader of one batch only."""

    def __init__(self, trainer: Trainer):
        self.batch = next(trainer.loader)

    def __next__(self):
        return self.batch

    def state_dict(self):
        return {}


# ------------------------------------------------------------------------------------------------- it learns
def test_one_batch_is_learned_by_heart(files):
    optimizer = OptimizerRecipe(lr=3e-3, ema_decay=0.0)
    losses = LossConfig(perceptual="none", discriminator="none")
    trainer = Trainer(tiny_recipe(files, steps=80, optimizer=optimizer, loss=losses))
    trainer.model.quantizer.drop = 0.0
    trainer.loader = SameBatch(trainer)
    course = []
    for _ in range(80):
        trainer.train_step()
        course.append(trainer.means())
    assert course[-1]["reconstruction"] < 0.3 * course[0]["reconstruction"]
    assert course[-1]["semantic"] < 0.5 * course[0]["semantic"]
    assert all(math.isfinite(value) for means in course for value in means.values())


def test_a_run_writes_its_log_its_samples_its_model_and_tensorboard(files):
    recipe = tiny_recipe(
        files, "full", steps=3, sample_every=2, mixed_precision="bf16", trackers=("tensorboard",)
    )
    result = train_tokenizer(recipe)
    assert (result.step, result.stopped_by) == (3, "steps")
    lines = log_lines(recipe)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"total", "reconstruction", "semantic", "vq", "commitment", "lr", "gradient_norm", "usage"} <= set(
        lines[-1]
    )
    assert {"usage_scale/1", "usage_scale/2", "usage_scale/4", "skipped_steps", "skipped_images"} <= set(
        lines[-1]
    )
    assert "adversarial" not in lines[1]  # the discriminator starts at step 2
    assert "discriminator" in lines[2]
    sheets = sorted((Path(recipe.output_dir) / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000002.png", "step-00000003.png"]
    assert Image.open(sheets[0]).size == (8 * 32, 4 * 32)  # originals, 3 scales, 2, 1
    events = next(Path(recipe.output_dir).rglob("events.out.tfevents*"))
    assert events.stat().st_size > 3000  # numbers and pictures
    image = torch.zeros(1, 3, 32, 32)
    assert TokenFlowModel.from_pretrained(result.export).encode(image).indices.shape == (1, 21)


def test_a_run_with_more_steps_goes_on_where_it_ended(files):
    recipe = tiny_recipe(files, "longer", steps=2)
    train_tokenizer(recipe)
    assert train_tokenizer(recipe).step == 2  # nothing left to do
    assert train_tokenizer(replace(recipe, steps=3)).step == 3
    assert [line["step"] for line in log_lines(recipe)] == [1, 2, 3]


def test_a_run_that_goes_on_with_another_recipe_says_what_changed(files, caplog):
    recipe = tiny_recipe(files, "changed", steps=1)
    train_tokenizer(recipe)
    train_tokenizer(replace(recipe, steps=2, log_every=2, keep=3))
    assert "another recipe" not in caplog.text
    train_tokenizer(replace(recipe, steps=3, optimizer=replace(recipe.optimizer, lr=0.5), max_bad_steps=9))
    assert "goes on with another recipe: optimizer.lr 0.001 -> 0.5, max_bad_steps 20 -> 9" in caplog.text


def test_the_end_of_a_run_is_logged_and_the_line_of_the_whole_interval_stays_whole(files):
    optimizer = OptimizerRecipe(lr=1e-3, ema_decay=0.99)  # a schedule would depend on `steps`
    whole = tiny_recipe(files, "whole", steps=4, log_every=4, optimizer=optimizer)
    train_tokenizer(whole)
    parts = replace(whole, output_dir=str(files / "parts"))
    train_tokenizer(replace(parts, steps=3))
    assert [line["step"] for line in log_lines(parts)] == [3]
    train_tokenizer(parts)
    assert log_lines(parts)[1:] == log_lines(whole)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(files):
    def gradients(accumulation: int) -> dict[str, torch.Tensor]:
        recipe = tiny_recipe(files, loss=LossConfig(perceptual="none", discriminator="none"))
        recipe = replace(recipe, data=replace(recipe.data, accumulation=accumulation))
        trainer = Trainer(recipe)
        trainer.model.quantizer.drop = 0.0
        found: dict[str, torch.Tensor] = {}

        def look(optimizer, norm) -> bool:
            found.update(
                {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
            )
            return True

        trainer.gate = look
        trainer.train_step()
        return found

    whole, parts = gradients(1), gradients(4)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------------- it stops
def test_no_time_left_means_one_step_and_a_checkpoint(files):
    recipe = tiny_recipe(files, "no-time", steps=50, max_minutes=0.0)
    result = train_tokenizer(recipe)
    assert (result.step, result.stopped_by) == (1, "max_minutes")
    assert TokenFlowModel.from_pretrained(result.export).config.codebook_size == 64


def test_ctrl_c_ends_the_run_after_the_step_with_a_checkpoint(files, monkeypatch):
    recipe = tiny_recipe(files, "interrupted", steps=50)
    step = Trainer.train_step

    def interrupted(self) -> None:
        step(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    result = train_tokenizer(recipe)
    assert (result.step, result.stopped_by) == (2, "SIGINT")
    assert (Path(recipe.output_dir) / "checkpoints" / "step-00000002").is_dir()


def test_a_second_ctrl_c_ends_at_once_and_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT)

    def press_twice() -> None:
        with StopRequest(None) as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == "SIGINT"
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_step_whose_gradient_is_not_finite_changes_nothing(files):
    trainer = Trainer(tiny_recipe(files, max_bad_steps=2))
    trainer.train_step()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    poison = trainer.model.pixel_decoder.network.conv_out.bias.register_hook(lambda g: g * torch.nan)
    trainer.train_step()
    assert trainer.skipped_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    with pytest.raises(UserError, match="not finite for 2 steps in a row"):
        trainer.train_step()
    poison.remove()
    trainer.train_step()
    assert trainer.bad_in_a_row == 0
    assert not torch.equal(trainer.model.pixel_decoder.head.bias, before["pixel_decoder.head.bias"])


# ----------------------------------------------------------------------------------------------- frozen parts
def test_decoder_training_changes_the_pixel_decoder_only_and_no_index(files, trained):
    start = Path(trained.output_dir) / "export"
    recipe = tiny_recipe(files, "decoder", steps=3)
    recipe = replace(recipe, model=ModelRecipe(preset=str(start), init_from=str(start), trainable="decoder"))
    result = train_tokenizer(recipe)
    old, new = TokenFlowModel.from_pretrained(start), TokenFlowModel.from_pretrained(result.export)
    changed = {n for n, t in new.state_dict().items() if not torch.equal(t, old.state_dict()[n])}
    assert changed == {n for n in new.state_dict() if n.startswith("pixel_decoder.network.")}
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    assert torch.equal(new.eval().encode(images).indices, old.eval().encode(images).indices)
    assert "semantic" not in log_lines(recipe)[-1]


def test_a_wider_decoder_starts_fresh_on_given_codes(files, trained, tmp_path):
    start = Path(trained.output_dir) / "export"
    config = build_config(ModelRecipe(preset=str(start)))
    config.pixel_decoder["width"], config.pixel_decoder["blocks"] = 64, 2
    config.save_pretrained(tmp_path)
    model = ModelRecipe(preset=str(tmp_path), init_from=str(start), trainable="decoder")
    with pytest.raises(UserError, match=r"differs from this model in \d+ weights.*--model.init-except"):
        build_model(model, config, None)
    wide = build_model(replace(model, init_except=("pixel_decoder.network.",)), config, None)
    narrow = TokenFlowModel.from_pretrained(start)
    assert wide.pixel_decoder.network.conv_out.weight.shape[1] == 64
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(wide.eval().encode(images).indices, narrow.eval().encode(images).indices)


def test_the_semantic_encoder_starts_from_the_teacher_unless_told_otherwise(files):
    recipe = ModelRecipe(preset=str(files / "config"), teacher=str(files / "teacher"))
    config = build_config(recipe)
    teacher = build_teacher(recipe, config)
    weight = "embeddings.patch_embedding.weight"
    taught = teacher.tower.model.state_dict()[weight]

    def student(recipe):
        return build_model(recipe, config, teacher).encoders["semantic"].tower.model.state_dict()[weight]

    assert torch.equal(student(recipe), taught)
    assert not torch.equal(student(replace(recipe, semantic_init=False)), taught)


def test_a_discriminator_that_never_counts_is_not_built(files):
    config = build_config(ModelRecipe(preset=str(files / "config")))
    late = tiny_recipe(files, steps=2)
    late = replace(late, model=replace(late.model, trainable="decoder"))
    assert build_losses(late, config, None).discriminator_network is None
    soon = build_losses(replace(late, steps=3), config, None)
    assert soon.discriminator_network is not None


# ------------------------------------------------------------------------------------------------ small parts
def test_learning_rate_warms_up_and_follows_the_cosine():
    optimizer = OptimizerRecipe(schedule="cosine", warmup_steps=4, final_lr=0.1)
    run = TrainRecipe(optimizer=optimizer, steps=104)
    rates = [lr_factor(step, run) for step in range(105)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    constant = replace(run, optimizer=replace(optimizer, schedule="constant"))
    assert {lr_factor(step, constant) for step in range(4, 104)} == {1.0}


def test_a_cosine_may_follow_the_clock():
    optimizer = OptimizerRecipe(schedule="cosine-minutes", warmup_steps=1, final_lr=0.1)
    run = TrainRecipe(optimizer=optimizer, max_minutes=2.0)
    assert lr_factor(0, run, 0.0) == pytest.approx(0.5)
    assert lr_factor(7, run, 60.0) == pytest.approx(0.55)
    assert lr_factor(7, run, 500.0) == pytest.approx(0.1)
    with pytest.raises(UserError, match="needs max_minutes"):
        TrainRecipe(optimizer=optimizer)


def test_the_average_forgets_its_start_and_can_be_put_in_and_out():
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
        average = WeightAverage(layer, decay=0.9)
        layer.weight.fill_(1.0)
    average.update()  # decay 2/11
    assert average.averages["weight"].item() == pytest.approx(9 / 11)
    for _ in range(200):
        average.update()
    with average.applied():
        assert layer.weight.item() == pytest.approx(1.0)
        layer.weight.data.fill_(5.0)
    assert layer.weight.item() == 1.0
    assert WeightAverage(layer, decay=0.0).full_state({"weight": layer.weight})["weight"] is layer.weight


def test_the_log_drops_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    LogFile(path, step=2).write({"step": 3, "again": True})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


@pytest.mark.parametrize(
    ("text", "path", "weight", "only"),
    [
        ("a/b.parquet", "a/b.parquet", 1.0, None),
        ("a@2.5", "a", 2.5, None),
        ("crops.parquet[label_name=photo]", "crops.parquet", 1.0, "label_name=photo"),
        ("crops.parquet[label_name=photo]@3", "crops.parquet", 3.0, "label_name=photo"),
        ("shards/[ab]*.tar@2", "shards/[ab]*.tar", 2.0, None),
    ],
)
def test_sources_are_named_in_one_word(text, path, weight, only):
    source = parse_source(text)
    assert (source.path_or_name, source.weight, source.only) == (path, weight, only)


# ------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DataRecipe(sources=())}, "at least one source of images"),
        ({"data": DataRecipe(sources=("nowhere.parquet",), batch_size=8)}, "nowhere.parquet"),
        (
            {"data": DataRecipe(sources=("x",), batch_size=9, accumulation=2)},
            "batch_size 9 is not a multiple",
        ),
        ({"model": ModelRecipe(preset="tokenflow-b-225")}, "did you mean 'tokenflow-b-2"),
        ({"model": ModelRecipe(preset="tokenflow-b-224", flows=("pixels",))}, "has no flow 'pixels'"),
        (
            {"model": ModelRecipe(preset="tokenflow-tiny", teacher="./no/teacher")},
            "no teacher at ./no/teacher",
        ),
        (
            {"model": ModelRecipe(preset="tokenflow-tiny", teacher="runs/no-teacher/export")},
            "no teacher at runs/no-teacher/export: make one with `tokenflow train teacher tokenflow-tiny-tea",
        ),
        (  # a folder without a model stands for a hub that cannot be reached
            {"model": ModelRecipe(preset="tokenflow-tiny", teacher="/")},
            r"cannot load the teacher / \(.+\): make one with .+ or give --model.teacher FOLDER",
        ),
        ({"model": ModelRecipe(preset="tokenflow-tiny")}, "the semantic loss needs a teacher"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(files, change, message):
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer(tiny_recipe(files, "mistake", **change))
    assert "\n" not in str(caught.value)


def test_a_count_below_one_is_refused_before_the_run():
    for kind in (TrainRecipe, TextToImageRecipe, UnderstandingRecipe, TeacherRecipe):
        with pytest.raises(UserError, match="log_every=0 must be at least 1"):
            kind(log_every=0)
    for part in (DataRecipe, GenerationData, StageRecipe):
        with pytest.raises(UserError, match="accumulation=0 must be at least 1"):
            part(accumulation=0)


def test_a_teacher_of_another_width_is_refused(files):
    model = ModelRecipe(preset="tokenflow-tiny", teacher=str(files / "teacher"))
    with pytest.raises(UserError, match="gives 24 channels; the semantic decoder gives 384"):
        build_teacher(model, build_config(model))


# ------------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_describe_models_that_can_be_built(name):
    config = build_config(recipe(name).model)
    assert config.num_tokens == sum(side * side for side in config.scales)
    assert recipe(name).output_dir == f"runs/{name}"


def test_the_tiny_tokenizer_has_its_teacher_in_the_box():
    small = recipe("tokenflow-tiny").model
    teacher = build_teacher(small, build_config(small))
    assert teacher(torch.zeros(1, 3, 128, 128)).shape == (1, 64, 384)


def test_recipes_are_read_without_torch():
    code = "import sys, tokenflow.recipes as r; [make() for make in r.RECIPES.values()]"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_papers_recipes_have_the_papers_settings():
    b, xl = recipe("tokenflow-b-224"), recipe("tokenflow-xl")
    assert (b.optimizer.lr, b.data.batch_size, b.steps, b.optimizer.clip) == (1e-4, 256, 1_000_000, 1.0)
    assert (xl.optimizer.lr, xl.data.batch_size, xl.steps) == (1e-4, 256, 500_000)
    assert b.optimizer.betas == (0.9, 0.95)
    assert (b.loss.discriminator_weight, b.loss.discriminator_start) == (0.5, 20_000)
    config = build_config(b.model)
    assert (config.codebook_size, config.commitment_weight) == (32768, 0.25)


def test_the_rows_of_table_5_differ_as_the_paper_says():
    names = ("1-single-codebook", "2-shared-mapping", "3-multi-scale", "4-pretrained-init")
    rows = [recipe(f"ablation-{name}").model for name in names]
    configs = [build_config(row) for row in rows]
    assert [[flow["name"] for flow in c.flows] for c in configs] == [
        ["semantic"],
        *[["semantic", "pixel"]] * 3,
    ]
    assert [c.scales for c in configs[:2]] == [[8], [8]]
    assert configs[2].scales == configs[3].scales == [1, 2, 3, 4, 5, 6, 8]
    assert [row.semantic_init for row in rows] == [False, False, False, True]


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'tokenflow-b-224'"):
        recipe("tokenflow-b-24")
