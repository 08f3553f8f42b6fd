"""Results on disk and side by side."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from tokenflow.errors import UserError
from tokenflow.evaluation import report

RESULT = {
    "kind": "reconstruction",
    "metrics": {"PSNR (dB)": 21.5, "codebook usage": {"overall": 0.97, "per scale": {"1x1": 0.5}}},
    "fingerprint": {"image_size": 128, "reference": {"name": "flickr8k", "sha256": "a" * 64}},
    "model": {"name": "first", "parameters": 3, "sha256": "b" * 64},
    "command": "tokenflow eval reconstruction",
    "seconds": 1.0,
}


def changed(**fingerprint):
    other = copy.deepcopy(RESULT)
    other["model"]["name"] = "second"
    other["fingerprint"] |= fingerprint
    return other


def shown(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_round_trip_through_a_file(tmp_path):
    report.write(RESULT, tmp_path / "r.json")
    assert report.read(tmp_path / "r.json") == RESULT


def test_a_result_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write(RESULT | {"metrics": {"PSNR (dB)": float("nan")}}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "no fingerprint, kind, metrics, model")]
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        report.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        report.read(tmp_path / "missing.json")


def test_equal_fingerprints_stand_side_by_side():
    text = shown(report.compare([RESULT, changed()]))
    assert "first" in text
    assert "second" in text
    assert "codebook usage / per scale / 1x1" in text
    assert "image_size 128" in text


def test_different_fingerprints_are_refused_in_one_line_that_names_the_fields():
    other = changed(image_size=256, reference={"name": "flickr8k", "sha256": "c" * 64})
    with pytest.raises(UserError) as caught:
        report.compare([RESULT, other])
    message = str(caught.value)
    assert "\n" not in message
    assert "image_size (128 / 256)" in message
    assert "reference / sha256 (aaaa" in message
    assert "name" not in message.split("differ in")[1]


def test_a_field_that_one_side_lacks_counts_as_different():
    with pytest.raises(UserError, match=r"crop \(absent / pad\)"):
        report.compare([RESULT, changed(crop="pad")])


def test_values_that_differ_late_in_a_long_text_are_seen():
    a, b = changed(note="x" * 80 + "1"), changed(note="x" * 80 + "2")
    with pytest.raises(UserError, match="differ in note"):
        report.compare([a, b])


def test_different_kinds_are_refused():
    with pytest.raises(UserError, match="different things"):
        report.compare([RESULT, RESULT | {"kind": "semantics"}])
    with pytest.raises(UserError, match="nothing to compare"):
        report.compare([])


def test_model_fingerprint_sees_every_tensor():
    model = nn.BatchNorm1d(3)
    before = report.model_fingerprint(model, "m")
    assert before == report.model_fingerprint(copy.deepcopy(model), "m")
    assert before["parameters"] == 6
    model.running_mean[1] = 1e-7
    assert report.model_fingerprint(model, "m")["sha256"] != before["sha256"]
    half = report.model_fingerprint(nn.Linear(2, 2).to(torch.bfloat16), "half")
    assert len(half["sha256"]) == 64


def test_command_line_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/somewhere/bin/tokenflow", "eval", "reconstruction", "--data", "my photos"]
    )
    assert report.command_line() == "tokenflow eval reconstruction --data 'my photos'"


def test_json_is_readable_by_anything(tmp_path):
    report.write(RESULT, tmp_path / "deep" / "r.json")
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["metrics"]["PSNR (dB)"] == 21.5
