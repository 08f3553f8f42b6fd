"""Figures of generated pictures against cases whose answer is known."""

from __future__ import annotations

import json

import pytest
import torch

from tokenflow import TokenFlowModel
from tokenflow.errors import UserError
from tokenflow.evaluation import generation
from tokenflow.evaluation.generation import BEST, REAL, SIMILARITY, TABLE_6, TOKENIZER, Rows
from tokenflow.evaluation.inception import GaussianStatistics, frechet_distance
from tokenflow.evaluation.judges import Judges, class_columns, frechet, hits
from tokenflow.training.classifier import EfficientNetLite


@pytest.fixture(scope="module")
def tokenizer(small_model_folder):
    return TokenFlowModel.from_pretrained(small_model_folder).eval()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    network = EfficientNetLite("lite0").eval().requires_grad_(False)
    network.image_size = 64
    return network


def colour_rows(count=6):
    """Plain pictures, red, green and blue in turn, and their labels."""
    labels = torch.arange(count) % 3
    pictures = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    pictures[torch.arange(count), labels] = 250
    return Rows([f"colour {i}" for i in labels.tolist()], pictures, labels)


def colour_scores(classifier, pictures):
    """A judge who knows red, green and blue: nearest of the three pictures' features."""
    from tokenflow.evaluation.judges import pooled_features

    known = pooled_features(classifier, pictures[:3], quiet=True)
    return lambda features: -torch.cdist(features, known)


def test_hits_count_the_best_and_the_five_best():
    scores = torch.arange(7.0).repeat(3, 1)
    found = hits(scores, torch.tensor([6, 2, 1]))
    assert found["top-1"].tolist() == [1, 0, 0]
    assert found["top-5"].tolist() == [1, 1, 0]


def test_frechet_distance_of_a_shift_is_its_square():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert frechet(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet(features, features + 2) == pytest.approx(16, rel=1e-5)


@pytest.mark.parametrize(("real", "fake"), [(50, 40), (5, 40), (5, 6)])
def test_frechet_distance_agrees_with_the_one_through_covariances(real, fake):
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(n, 8, generator=generator) * torch.arange(1, 9) + n for n in (real, fake)]
    gaussians = []
    for features in sets:
        statistics = GaussianStatistics(8)
        statistics.update(features)
        gaussians += statistics.mean_and_covariance()
    assert frechet(*sets) == pytest.approx(frechet_distance(*gaussians), rel=1e-6)


def test_a_perfect_and_a_useless_generator_stand_where_they_belong(tokenizer, classifier):
    rows = colour_rows()
    judges = Judges(
        classifier,
        colour_scores(classifier, rows.pictures),
        labels=torch.arange(3),
    )
    seen = []

    def perfect(prompts, labels, seeds, strategy):
        seen.append((prompts, labels.tolist(), seeds, strategy))
        return rows.pictures[: len(prompts)] if seeds[0] == 5 else rows.pictures[4:]

    metrics, shown = generation.evaluate_generation(perfect, tokenizer, rows, judges, seed=5, batch_size=4)
    assert seen == [
        (rows.prompts[:4], [0, 1, 2, 0], [5, 6, 7, 8], BEST),
        (rows.prompts[4:], [1, 2], [9, 10], BEST),
    ]
    assert metrics["top-1"]["generated"] == metrics["top-1"][REAL] == 1.0
    assert metrics["top-1"]["chance"] == pytest.approx(1 / 3)
    assert metrics["top-5"]["chance"] == 1.0
    distance = metrics["efficientnet-lite0 Frechet distance"]
    assert distance["generated"] == pytest.approx(0, abs=1e-4)
    assert distance[TOKENIZER] > 0
    assert "FID" not in json.dumps(metrics)
    assert torch.equal(shown[str(BEST)], rows.pictures)

    metrics, _ = generation.evaluate_generation(
        lambda prompts, *_: rows.pictures[:1].expand(len(prompts), -1, -1, -1), tokenizer, rows, judges
    )
    assert metrics["top-1"]["generated"] == pytest.approx(1 / 3)


def test_table_6_is_judged_pairwise_on_the_same_seeds(tokenizer, classifier):
    rows = colour_rows()
    judges = Judges(classifier, colour_scores(classifier, rows.pictures), labels=torch.arange(3))
    seeds_of = {}

    def generate(prompts, labels, seeds, strategy):
        seeds_of.setdefault(strategy, []).extend(seeds)
        good = torch.tensor(seeds) < TABLE_6.index(strategy) + 2  # each strategy a picture better
        wrong = rows.pictures.roll(1, 0)
        return torch.where(good[:, None, None, None], rows.pictures, wrong)

    metrics, shown = generation.evaluate_generation(generate, tokenizer, rows, judges, ablation=True)
    assert all(seeds == list(range(6)) for seeds in seeds_of.values())
    table = metrics["sampling strategies (Tab. 6)"]["top-1"]
    assert list(table) == [str(strategy) for strategy in TABLE_6]
    assert list(table.values()) == pytest.approx([2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    verdict = metrics["does Tab. 6 hold?"]["top-1"]
    assert verdict["paper's order of 1, 2, 3 steps"] is True
    assert verdict["pairs of Tab. 6 in the paper's order"] == 1.0
    assert verdict["3 steps minus 1 step"] == pytest.approx(4 / 6)
    assert verdict["its standard error"] == pytest.approx(0.2108, abs=1e-4)
    assert len(shown) == 1 + 5
    sheet = generation.sheet(rows, shown, count=2)
    assert sheet.width > 7 * 128
    assert sheet.height > 2 * 128


def test_similarity_is_named_and_has_a_lower_bound(tokenizer):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from tokenflow.evaluation.judges import image_vectors

    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8, projection_dim=8,
    )  # fmt: skip
    teacher = CLIPVisionModelWithProjection(config).eval()
    rows = colour_rows()
    judges = Judges(teacher=teacher, texts=image_vectors(teacher, rows.pictures))
    metrics, _ = generation.evaluate_generation(
        lambda p, *_: rows.pictures[: len(p)], tokenizer, rows, judges
    )
    assert set(metrics) == {SIMILARITY}
    assert "not OpenAI CLIP" in SIMILARITY
    assert metrics[SIMILARITY]["generated"] == pytest.approx(1.0)
    assert metrics[SIMILARITY]["generated, prompts of other rows"] < 0.999


CLASSES = "index\twnid\tname\n0\tn01\ttench, Tinca tinca\n1\tn02\tcrane\n2\tn03\tCrane\n3\tn04\tDaisy\n"


def test_labels_find_their_classes_by_wnid_or_by_an_unmistakable_name(tmp_path):
    table = tmp_path / "classes.tsv"
    table.write_text(CLASSES)
    data = str(tmp_path)
    assert class_columns(data, {0: "tinca tinca", 4: "daisy"}, table) == [0, 3]
    assert class_columns(data, {0: "tench", 1: "crane"}, table) is None  # bird or machine?
    assert class_columns(data, {0: "tench", 1: "rose"}, table) is None
    (tmp_path / "classes.json").write_text('{"classes": [{"label": 7, "wnid": "n03"}]}')
    assert class_columns(data, {7: "crane"}, table) == [2]
    with pytest.raises(UserError, match=r"no\.tsv: cannot be read"):
        class_columns(data, {0: "tench"}, tmp_path / "no.tsv")
    table.write_text("name\ntench\n")
    with pytest.raises(UserError, match="columns index, wnid and name"):
        class_columns(data, {0: "tench"}, table)


def test_prompts_come_from_captions_then_from_names():
    assert generation.prompt_of({"captions": ["a cat", "cats"], "label_name": "cat"}, "s") == "a cat"
    assert generation.prompt_of({"caption": "a cat"}, "s") == "a cat"
    assert generation.prompt_of({"captions": None, "label_name": "cat"}, "s") == "a photo of a cat"
    with pytest.raises(UserError, match="s: needs a column 'captions'"):
        generation.prompt_of({"label": 1}, "s")
