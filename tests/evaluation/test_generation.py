"""Figures of generated pictures against cases whose answer is known."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tokenflow import TokenFlowModel
from tokenflow.data.sources import Source
from tokenflow.errors import UserError
from tokenflow.evaluation import generation, report
from tokenflow.evaluation.generation import BEST, FRECHET, REAL, SIMILARITY, TABLE_6, TOKENIZER, Rows
from tokenflow.evaluation.inception import GaussianStatistics, frechet_distance
from tokenflow.evaluation.judges import (
    Judges,
    class_columns,
    frechet,
    hits,
    label_names,
    pooled_features,
    probe_scores,
)
from tokenflow.evaluation.options import GenerationEval
from tokenflow.generation.class_conditional import TokenFlowClassToImageConfig, TokenFlowForClassToImage
from tokenflow.training.classifier import EfficientNetLite, load_classifier


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
    table = metrics["Tab. 6"]["top-1"]
    assert list(table) == [str(strategy) for strategy in TABLE_6]
    assert list(table.values()) == pytest.approx([2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    verdict = metrics["order of Tab. 6"]["top-1"]
    assert verdict["1 < 2 < 3 steps"] is True
    assert verdict["pairs as in the paper"] == 1.0
    assert verdict["3 steps - 1 step"] == pytest.approx(4 / 6)
    assert verdict["standard error"] == pytest.approx(0.2108, abs=1e-4)
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


# from files to files
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A labelled set of plain pictures, and judges: classifier and class table, teacher, text encoder."""
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    from small_pipeline import byte_tokenizer

    folder = tmp_path_factory.mktemp("judges")
    rows, classes = colour_rows(9), ["tench", "rose", "daisy"]
    for split in ("train", "val"):
        table = []
        for picture, label in zip(rows.pictures, rows.labels.tolist(), strict=True):
            file = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "png")
            image = {"bytes": file.getvalue(), "path": None}
            table.append({"image": image, "label": label, "label_name": classes[label]})
        (folder / "colours").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), folder / "colours" / f"{split}.parquet")
    torch.manual_seed(0)
    torch.save(EfficientNetLite("lite0").state_dict(), folder / "lite0.pth")
    known = "".join(f"{i}\tn{i:02}\t{name}, Plant\n" for i, name in enumerate(classes))
    (folder / "classes.tsv").write_text("index\twnid\tname\n" + known)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)
    CLIPVisionModelWithProjection(tower).save_pretrained(folder / "teacher")
    text = byte_tokenizer()
    text.pad_token = "</s>"
    text.save_pretrained(folder / "texts")
    BertModel(BertConfig(vocab_size=len(text), **sizes)).save_pretrained(folder / "texts")
    return folder


def judged_by(files, **options):
    return GenerationEval(data=str(files / "colours"), **options)


def test_a_pipeline_is_judged_from_files_to_a_file_and_a_sheet(small_pipeline_folder, files, tmp_path):
    options = judged_by(
        files,
        model=str(small_pipeline_folder),
        limit=4,
        classifier=str(files / "lite0.pth"),
        classifier_names=str(files / "classes.tsv"),
        teacher=str(files / "teacher"),
        text_encoder=str(files / "texts"),
        seed=3,
        out=str(tmp_path / "r.json"),
        sheet=str(tmp_path / "s.png"),
    )
    result = generation.run(options)
    assert report.read(tmp_path / "r.json") == result
    assert set(result["metrics"]) == {"top-1", "top-5", SIMILARITY, FRECHET}
    assert set(result["metrics"]["top-1"]) == {"generated", TOKENIZER, REAL, "chance"}
    fingerprint = result["fingerprint"]
    assert fingerprint["reference"]["pictures"] == 4
    assert fingerprint["agreement"] == "the classifier's own 3 classes of the set"
    assert "not OpenAI CLIP" in fingerprint["similarity"]
    assert fingerprint["seed"] == 3
    assert result["sampling"]["guidance_scale"] == 7.5
    assert Image.open(tmp_path / "s.png").height > 4 * 128
    again = generation.run(dataclasses.replace(options, batch_size=1, classifier=None, out=None, sheet=None))
    drawn, before = again["metrics"][SIMILARITY], result["metrics"][SIMILARITY]
    assert drawn["generated"] == before["generated"]
    assert drawn[TOKENIZER] == pytest.approx(before[TOKENIZER], abs=1e-3)  # a batch may move a pixel by one
    assert again["fingerprint"].items() <= fingerprint.items()


def test_a_set_that_the_classifier_does_not_know_is_judged_by_a_probe(files):
    network = load_classifier(files / "lite0.pth")
    network.image_size = 64
    source = Source(str(files / "colours"), split="train")
    assert label_names(source) == {0: "tench", 1: "rose", 2: "daisy"}
    scores = probe_scores(network, source, 32, [0, 1, 2, 7])
    found = scores(pooled_features(network, colour_rows(3).pictures))
    assert found[:, :3].argmax(1).tolist() == [0, 1, 2]
    assert bool((found[:, 3] == float("-inf")).all())


def test_a_class_conditional_model_draws_from_the_labels(tokenizer, small_model_folder, files, tmp_path):
    torch.manual_seed(0)
    config = TokenFlowClassToImageConfig(depth=1, codebook_size=64, scales=[1, 2, 4], num_classes=3)
    model = TokenFlowForClassToImage(config)
    model.set_codebooks(tokenizer)
    model.save_pretrained(tmp_path / "var")
    shutil.copytree(small_model_folder, tmp_path / "var" / "tokenizer")
    teacher = {"teacher": str(files / "teacher"), "text_encoder": str(files / "texts")}
    result = generation.run(judged_by(files, model=str(tmp_path / "var"), limit=3, **teacher))
    assert set(result["metrics"]) == {SIMILARITY}
    _, _, generate = generation.load_generator(judged_by(files, model=str(tmp_path / "var")))
    made = generate(["a", "b"], torch.tensor([0, 2]), [1, 2], BEST)
    expected = model.eval().generate_indices(
        torch.tensor([0, 2]), seed=[1, 2], guidance_scale=7.5, top_k=BEST.top_k, top_p=BEST.top_p
    )
    assert torch.equal(made, generation.decoded(tokenizer, expected))
    with pytest.raises(UserError, match="has no labels"):
        generate(["a"], None, [1], BEST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to judge by; give --classifier FILE"),
        ({"teacher": "x"}, "--teacher and --text-encoder only mean something together"),
        ({"classifier": "none.pth"}, "classifier none.pth: expected one .pth file"),
        ({"teacher": "{files}/texts", "text_encoder": "{files}/teacher"}, "cannot load teacher"),
        ({"classifier": "{files}/lite0.pth", "guidance_scale": -1.0}, "guidance_scale must be"),
        ({"classifier": "{files}/lite0.pth", "model": "{files}/texts"}, "no image tokenizer in tokenizer/"),
        ({"classifier": "{files}/lite0.pth", "model": "no-such"}, "unknown model 'no-such'"),
    ],
)
def test_mistakes_are_one_line(small_pipeline_folder, files, options, message):
    given = {name: v.format(files=files) if isinstance(v, str) else v for name, v in options.items()}
    with pytest.raises(UserError, match=message) as error:
        generation.run(judged_by(files, **{"model": str(small_pipeline_folder), "limit": 2, **given}))
    assert "\n" not in str(error.value)
