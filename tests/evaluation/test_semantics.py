"""Pooled features of a real (random) model, and the judgement over them."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tokenflow import TokenFlowModel
from tokenflow.errors import UserError
from tokenflow.evaluation import pictures, report, semantics
from tokenflow.evaluation.options import SemanticsEval
from tokenflow.tokenizer.semantic import SemanticTeacher, VisionTower

TEACHER_ENCODER = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def model(small_model_folder):
    return TokenFlowModel.from_pretrained(small_model_folder).eval()


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(3)
    return SemanticTeacher(VisionTower(TEACHER_ENCODER), torch.nn.Linear(16, 24, bias=False))


def batches(count=40, classes=4, seed=0):
    """Plain coloured pictures with a little noise: trivially separable."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])[:classes]
    labels = torch.arange(count) % classes
    noise = 0.1 * torch.randn(count, 3, 32, 32, generator=generator)
    pixels = (colours[labels][:, :, None, None] * 0.8 + noise).clamp(-1, 1)
    return list(zip(pixels.split(16), labels.split(16), strict=True))


def test_pooled_features_are_means_of_the_models_own_outputs(model, teacher):
    pixels, _ = batches(4)[0]
    with torch.inference_mode():
        pooled = semantics.pooled_features(model, pixels, teacher)
        quantized = model.encode(pixels).quantized
        decoded = model.decode(quantized).semantic
    assert {name: value.shape[1] for name, value in pooled.items()} == {
        "semantic": 32,
        "pixel": 8,
        "both": 40,
        "semantic decoder": 24,
        "teacher": 24,
    }
    torch.testing.assert_close(pooled["semantic"], quantized[:, :32].mean((2, 3)))
    torch.testing.assert_close(pooled["pixel"], quantized[:, 32:].mean((2, 3)))
    torch.testing.assert_close(pooled["both"], torch.cat([pooled["semantic"], pooled["pixel"]], 1))
    torch.testing.assert_close(pooled["semantic decoder"], decoded.mean(1))
    torch.testing.assert_close(pooled["teacher"], teacher(pixels).mean(1))


def test_features_do_not_depend_on_the_batches(model):
    whole = semantics.collect(model, batches())
    single = semantics.collect(
        model, [(p[i : i + 1], y[i : i + 1]) for p, y in batches() for i in range(len(p))]
    )
    assert torch.equal(whole.labels, single.labels)
    for name, value in whole.by_name.items():
        torch.testing.assert_close(value, single.by_name[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="evaluation set is empty"):
        semantics.collect(model, [])


def test_coloured_pictures_are_told_apart(model, teacher):
    train = semantics.collect(model, batches(80), teacher)
    val = semantics.collect(model, batches(20, seed=1), teacher)
    metrics = semantics.judge(train, val, class_embeddings=torch.randn(4, 24))
    assert metrics["k-NN"]["teacher"] == 1.0
    assert metrics["linear probe"]["teacher"] == 1.0
    assert metrics["linear probe"]["both"] > 0.5  # random encoders see colours dimly
    assert metrics["k-NN, share of the teacher's"]["semantic"] == metrics["k-NN"]["semantic"]
    assert set(metrics["zero-shot"]) == {"semantic decoder", "teacher"}
    assert all(0 <= value["top-1"] <= value["top-5"] == 1.0 for value in metrics["zero-shot"].values())


def test_without_teacher_and_names_only_accuracies_remain(model):
    train = semantics.collect(model, batches())
    assert set(semantics.judge(train, train)) == {"k-NN", "linear probe"}


def embeddings_file(path, rows=3, names=("cat", "dog", "car")):
    save_file({"embeddings": torch.randn(rows, 24)}, path, metadata={"names": json.dumps(list(names))})
    return path


def test_class_embeddings_are_read_with_their_names(tmp_path):
    embeddings, names = semantics.read_class_embeddings(embeddings_file(tmp_path / "c.safetensors"))
    assert embeddings.shape == (3, 24)
    assert names == ["cat", "dog", "car"]


def test_the_classes_of_one_set_are_read_from_a_teachers_file(tmp_path):
    birds, cars = torch.randn(2, 24), torch.randn(3, 24)
    metadata = {
        "birds": json.dumps({"ids": [0, 1], "names": ["owl", "duck"]}),
        "cars": json.dumps({"ids": [2, 0, 1], "names": ["van", "jeep", "limousine"]}),
    }
    save_file({"birds": birds, "cars": cars}, tmp_path / "c.safetensors", metadata=metadata)
    embeddings, names = semantics.read_class_embeddings(tmp_path / "c.safetensors", "cars")
    assert names == ["jeep", "limousine", "van"]  # in the order of the labels
    assert torch.equal(embeddings, cars[[1, 2, 0]])
    with pytest.raises(UserError, match="not a class embedding file"):
        semantics.read_class_embeddings(tmp_path / "c.safetensors", "planes")


def test_files_that_are_no_class_embeddings_are_refused(tmp_path):
    with pytest.raises(UserError, match="3 names for embeddings"):
        semantics.read_class_embeddings(embeddings_file(tmp_path / "a.safetensors", rows=2))
    save_file({"embeddings": torch.zeros(1, 2)}, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no header")
    for name in "bc":
        with pytest.raises(UserError, match="not a class embedding file"):
            semantics.read_class_embeddings(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        semantics.read_class_embeddings(tmp_path / "missing.safetensors")


def write_pack(path, count, labels=True):
    """A parquet pack of plain coloured pictures, labelled by colour."""
    rows = []
    for pixels, batch_labels in batches(count):
        for pixel, label in zip(pixels, batch_labels, strict=True):
            file = io.BytesIO()
            array = ((pixel + 1) * 127.5).permute(1, 2, 0).numpy().astype(np.uint8)
            Image.fromarray(array).save(file, "png")
            row = {"image": {"bytes": file.getvalue(), "path": None}}
            rows.append(
                row
                | (
                    {"label": int(label), "label_name": f"colour {label}"}
                    if labels
                    else {"caption": "a colour"}
                )
            )
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    from transformers import AutoConfig, CLIPImageProcessorPil, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    config = AutoConfig.for_model(**TEACHER_ENCODER, projection_dim=24)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil(size=32, crop_size=32).save_pretrained(folder)
    return folder


def test_a_model_is_judged_from_parquet_to_a_file(small_model_folder, teacher_folder, tmp_path, monkeypatch):
    data = tmp_path / "colours"
    data.mkdir()
    write_pack(data / "train.parquet", 60)
    write_pack(data / "val.parquet", 18)
    options = SemanticsEval(
        data=str(data),
        model=str(small_model_folder),
        teacher=str(teacher_folder),
        class_embeddings=str(embeddings_file(tmp_path / "c.safetensors", 4, "abcd")),
        out=str(tmp_path / "s.json"),
    )
    result = semantics.run(options)
    assert report.read(tmp_path / "s.json") == result
    metrics, fingerprint = result["metrics"], result["fingerprint"]
    assert metrics["k-NN"]["teacher"] == 1.0
    assert metrics["chance"] == 0.25
    assert set(metrics["zero-shot"]["semantic decoder"]) == {"top-1", "top-5"}
    assert fingerprint["reference"]["pictures"] == 18
    assert fingerprint["train"]["pictures"] == 60
    assert len(fingerprint["teacher_sha256"]) == 64

    monkeypatch.setattr(pictures, "readers_for", lambda device: 2)  # as beside a GPU
    again = semantics.run(options)
    assert {**again, "seconds": None} == {**result, "seconds": None}


def test_pictures_are_read_by_other_processes_for_a_gpu_alone(monkeypatch):
    assert pictures.readers_for(torch.device("cpu")) == 0
    for cores, readers in ((None, 1), (1, 1), (4, 3), (64, 8)):
        monkeypatch.setattr(pictures.os, "cpu_count", lambda cores=cores: cores)
        assert pictures.readers_for(torch.device("cuda")) == readers


def test_a_models_own_class_embeddings_are_the_default_for_the_set_they_name(small_model_folder, tmp_path):
    data, mine = tmp_path / "colours", shutil.copytree(small_model_folder, tmp_path / "mine")
    data.mkdir()
    write_pack(data / "train.parquet", 60)
    write_pack(data / "val.parquet", 18)
    options = SemanticsEval(data=str(data), model=str(mine))
    assert "zero-shot" not in semantics.run(options)["metrics"]
    own = embeddings_file(
        mine / "class_embeddings.safetensors", 4, ["colour 0", "colour 1", "colour 2", "colour 3"]
    )
    result = semantics.run(options)
    assert "zero-shot" in result["metrics"]
    assert result["fingerprint"]["class_embeddings_sha256"] == report.file_sha256(own)
    embeddings_file(own, 4, "abcd")  # classes of another set: no figure is better than a meaningless one
    assert "zero-shot" not in semantics.run(options)["metrics"]


def test_sets_without_labels_and_with_too_many_are_refused(small_model_folder, tmp_path):
    data = tmp_path / "colours"
    data.mkdir()
    write_pack(data / "train.parquet", 8, labels=False)
    write_pack(data / "val.parquet", 8)
    options = SemanticsEval(data=str(data), model=str(small_model_folder))
    with pytest.raises(UserError, match=r"needs a column 'label' of integers.*columns are caption"):
        semantics.run(options)
    write_pack(data / "train.parquet", 8)
    with pytest.raises(UserError, match="no model folder at /no/teacher"):
        semantics.run(SemanticsEval(data=str(data), model=str(small_model_folder), teacher="/no/teacher"))
    few = embeddings_file(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="3 class embeddings for labels up to 3"):
        semantics.run(SemanticsEval(data=str(data), model=str(small_model_folder), class_embeddings=str(few)))
