from __future__ import annotations

import dataclasses
import io
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPVisionModelWithProjection

from tokenflow.errors import UserError
from tokenflow.training import teacher, teacher_batches, teacher_model
from tokenflow.training.classifier import EfficientNetLite, load_classifier
from tokenflow.training.teacher_cache import build_cache, embed_texts, read_square
from tokenflow.training.teacher_recipe import TeacherRecipe

WORDS = ["a", "photo", "of", "red", "green", "blue", "lilac", "rose", "cat", "dog", "bird", "on", "grass"]


def _write_pack(folder, colours, names=None, captions=None):
    """Pictures of one colour each; labels skip every odd number, as packs with missing classes do."""
    folder.mkdir()
    rows = []
    for i, colour in enumerate(colours):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 32), colour).save(buffer, "PNG")
        row = {"image": {"bytes": buffer.getvalue(), "path": None}, "label": None, "label_name": None}
        row["captions"] = captions[i] if captions else []
        if names:
            row |= {"label": 2 * (i % len(names)), "label_name": names[i % len(names)]}
        rows.append(row)
    schema = pa.schema(
        {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "label": pa.int64(),
            "label_name": pa.string(),
            "captions": pa.list_(pa.string()),
        }
    )
    for split in ("train", "val"):
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two packs of twelve pictures, an untrained classifier and an untrained sentence encoder."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("teacher")
    _write_pack(
        root / "flowers", [(200, 30, 30), (30, 200, 30), (30, 30, 200)] * 2, ["rose", "grass", "lilac"]
    )
    captions = [[f"a {w} on grass", f"photo of a {w}", "a a"] for w in ("cat", "dog", "bird", "rose")]
    _write_pack(root / "captioned", [(i * 60, 90, 90) for i in range(4)], captions=captions)

    torch.save(EfficientNetLite("lite0").state_dict(), root / "lite0.pth")
    names = "\n".join(f"{i}\tn{i}\t{WORDS[i % len(WORDS)]}, other name" for i in range(1000))
    (root / "names.tsv").write_text(f"index\twnid\tname\n{names}\n")

    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / "text")
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(root / "text")
    return TeacherRecipe(
        packs=[str(root / "flowers"), str(root / "captioned")],
        classifier=str(root / "lite0.pth"),
        classifier_names=str(root / "names.tsv"),
        text_encoder=str(root / "text"),
        output_dir=str(root / "run"),
        image_size=32,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        cache_size=36,
        batch_size=5,
        steps=4,
        warmup_steps=1,
        log_every=1,
        bf16=False,
    )


@pytest.fixture(scope="module")
def cache(recipe):
    return build_cache(recipe)


def test_cache_holds_pictures_features_and_texts(recipe, cache):
    assert cache.images.shape == (10, 3, 36, 36)
    assert cache.images[0, :, 18, 18].tolist() == [200, 30, 30]
    assert cache.features.shape == (10, 320, 7, 7)
    assert np.abs(cache.features.astype(np.float32)).sum((1, 2, 3)).min() > 0
    flowers, captioned = cache.sources
    assert (flowers.class_ids, flowers.class_names) == ([0, 2, 4], ["rose", "grass", "lilac"])
    assert flowers.labels.tolist() == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(flowers.texts[:, 0], embed_texts(recipe.text_encoder, ["a photo of a rose",
        "a photo of a grass", "a photo of a lilac"]), atol=2e-2, rtol=0)  # fmt: skip
    assert captioned.texts.shape == (4, 3, 16)
    assert captioned.labels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(captioned.texts.norm(dim=-1), torch.ones(4, 3))


def test_two_processes_fill_one_cache(recipe, cache, tmp_path):
    shared = dataclasses.replace(recipe, output_dir=str(tmp_path))
    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=build_cache, args=(shared, r, 2, barrier.wait)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = build_cache(shared)
    assert np.array_equal(again.images, cache.images)
    np.testing.assert_allclose(again.features.astype(np.float32), cache.features, atol=1e-2)


def test_missing_pack_is_named(recipe, tmp_path):
    broken = dataclasses.replace(recipe, packs=[str(tmp_path / "nothing")], output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"nothing: no train\.parquet"):
        build_cache(broken)


def test_read_square_takes_the_centre():
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 255
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    assert read_square(buffer.getvalue(), 10).min() == 255


def test_patch_tokens_are_the_projected_hidden_states(recipe):
    model = teacher_model.build_model(recipe, 16).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = model.vision_model(pixels).last_hidden_state[:, 1:]
        expected = model.visual_projection(model.vision_model.post_layernorm(hidden))
        torch.testing.assert_close(teacher_model.patch_tokens(model, pixels), expected)
        order = torch.stack([torch.randperm(16), torch.randperm(16)])
        shuffled = teacher_model.patch_tokens(model, pixels, order)
    torch.testing.assert_close(shuffled, expected.gather(1, order[..., None].expand(-1, -1, 16)))


def test_crops_stay_inside_and_treat_pictures_and_maps_alike():
    theta = teacher_batches.random_crops(256, 0.3, torch.Generator().manual_seed(0))
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]]) @ theta.transpose(1, 2)
    assert corners.abs().max() <= 1 + 1e-6
    assert 0.2 < (theta[:, 0, 0] < 0).float().mean() < 0.8
    ramp = torch.linspace(-1, 1, 64).expand(256, 2, 64, 64).clone()
    ramp[:, 1] = ramp[:, 1].transpose(1, 2)
    picture = teacher_batches.sample_crops(ramp, theta, 32)
    coarse = teacher_batches.sample_crops(torch.nn.functional.avg_pool2d(ramp, 4), theta, 8)
    pooled = torch.nn.functional.avg_pool2d(picture, 4)
    torch.testing.assert_close(coarse[..., 2:-2, 2:-2], pooled[..., 2:-2, 2:-2], atol=0.05, rtol=0)


def test_an_epoch_shows_each_picture_once_over_all_processes(recipe, cache):
    two = dataclasses.replace(recipe, batch_size=5)
    classifier = load_classifier(recipe.classifier)
    ranks = [teacher_batches.Batches(two, cache, classifier, rank, 2) for rank in range(2)]
    assert sorted(np.concatenate([r.rows(3) for r in ranks])) == list(range(10))
    assert not np.array_equal(ranks[0].rows(3), ranks[0].rows(4))


def test_batches_repeat_and_pair_pictures_with_their_texts(recipe, cache):
    batches = teacher_batches.Batches(recipe, cache, load_classifier(recipe.classifier))
    batch, again = batches(1, 0.5), batches(1, 0.5)
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    assert batch["kept"].shape == (5, 8)
    assert batch["features"].shape == (5, 16, 320)
    assert batch["logits"].shape == (5, 1000)
    rows = batches.rows(1)
    seen = []
    for mine, texts, positives in batch["banks"]:
        source = cache.sources[0] if len(texts) == 3 else cache.sources[1]
        assert source.labels[rows[mine.numpy()] - source.start].tolist() == positives.tolist()
        seen += mine.tolist()
    assert sorted(seen) == list(range(5))


def test_live_targets_are_of_the_very_crops_that_the_tower_sees(recipe, cache, tmp_path):
    live = dataclasses.replace(recipe, live_targets=True, output_dir=str(tmp_path))
    fresh = build_cache(live)
    assert fresh.features is None
    classifier = load_classifier(recipe.classifier)
    batch = teacher_batches.Batches(live, fresh, classifier)(1, 0.0)
    crops = torch.nn.functional.interpolate(batch["pixel_values"], (224, 224), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(classifier(crops), batch["logits"], atol=0.02, rtol=0.02)
    assert batch["features"].shape == (5, 16, 320)
    assert sum(len(rows) for rows, _, _ in batch["banks"]) == 5


def test_mixed_crops_have_no_text(recipe, cache):
    mixed = dataclasses.replace(recipe, live_targets=True, mix=1.0)
    batches = teacher_batches.Batches(mixed, cache, load_classifier(recipe.classifier))
    batch, pure = batches(1, 0.0), teacher_batches.Batches(recipe, cache, batches.classifier)(1, 0.0)
    assert batch["banks"] == []
    assert not torch.allclose(batch["pixel_values"], pure["pixel_values"])
    assert torch.isfinite(
        teacher.TeacherObjective(teacher_model.build_model(recipe, 16), 320)(**batch)["text"]
    )
    with pytest.raises(UserError, match="needs live_targets"):
        dataclasses.replace(recipe, mix=0.5)


def test_kept_text_vectors_replace_the_text_encoder(recipe, cache, tmp_path):
    (kept,) = Path(recipe.output_dir).glob("texts-*.safetensors")
    shutil.copy(kept, tmp_path)
    gone = str(tmp_path / "not-there" / Path(recipe.text_encoder).name)
    again = build_cache(dataclasses.replace(recipe, output_dir=str(tmp_path), text_encoder=gone))
    assert torch.equal(again.classifier_texts, cache.classifier_texts)


def test_training_starts_from_an_exported_tower(recipe, cache, tmp_path):
    model, other = (teacher_model.build_model(recipe, 16) for _ in range(2))
    teacher_model.export_teacher(model, cache.sources, tmp_path / "export")
    teacher_model.load_start(other, str(tmp_path / "export"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match=r"nowhere: no model\.safetensors"):
        teacher_model.load_start(other, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="size mismatch"):
        teacher_model.load_start(teacher_model.build_model(recipe, 24), str(tmp_path / "export"))


def test_one_batch_can_be_learned(recipe, cache):
    torch.manual_seed(0)
    batch = teacher_batches.Batches(recipe, cache, load_classifier(recipe.classifier))(0, 0.0)
    objective = teacher.TeacherObjective(teacher_model.build_model(recipe, 16), 320)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        parts = objective(**batch)
        losses.append({name: value.item() for name, value in parts.items()})
        sum(parts.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1]["text"] < 0.5 * losses[0]["text"]
    assert losses[-1]["features"] < losses[0]["features"]


def test_patch_embedding_starts_white(recipe):
    torch.manual_seed(0)
    model = teacher_model.build_model(recipe, 16)
    smooth = torch.nn.functional.interpolate(torch.randn(64, 3, 8, 8), size=32, mode="bilinear")
    teacher_model.whiten_patch_embedding(model, smooth)
    tokens = model.vision_model.embeddings.patch_embedding(smooth).flatten(2).transpose(1, 2).flatten(0, 1)
    covariance = torch.cov(tokens.T)
    assert covariance.diagonal().min() > 0.5
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-3


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = TeacherRecipe(warmup_steps=10)
    assert teacher.learning_rate_share(recipe, 0, 0.0) == pytest.approx(0.1)
    assert teacher.learning_rate_share(recipe, 100, 0.5) == pytest.approx(0.5)
    assert teacher.learning_rate_share(recipe, 100, 1.2) == 0


def test_resuming_gives_the_same_weights(recipe, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "learning_rate_share", lambda *args: 0.5)
    monkeypatch.setattr(teacher, "build_cache", lambda *args: cache)
    plain = dataclasses.replace(recipe, drop_patches=0.0)
    whole = teacher.train_teacher(dataclasses.replace(plain, output_dir=str(tmp_path / "whole")))
    for steps in (2, 4):
        parts = teacher.train_teacher(
            dataclasses.replace(plain, steps=steps, output_dir=str(tmp_path / "parts"))
        )
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_export_serves_evaluation(recipe, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "build_cache", lambda *args: cache)
    minutes = dataclasses.replace(recipe, output_dir=str(tmp_path), max_minutes=60.0)
    folder = teacher.train_teacher(minutes)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "export",
        "log.jsonl",
        "recipe.json",
    ]
    model = CLIPVisionModelWithProjection.from_pretrained(folder)
    assert model.config.projection_dim == 16
    with safe_open(folder / "class_embeddings.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("flowers"), cache.sources[0].texts[:, 0])
        classes = json.loads(file.metadata()["flowers"])
    assert classes == {"ids": [0, 2, 4], "names": ["rose", "grass", "lilac"]}
