"""Names of bundled models, folders and hub names."""

from __future__ import annotations

import pytest

from tokenflow import UserError, bundled
from tokenflow.bundled import bundled_names, bundled_path, resolve


@pytest.fixture
def two_models(tmp_path, monkeypatch):
    for name in ("tokenflow-tiny", "tokenflow-other"):
        (tmp_path / "shipped" / name).mkdir(parents=True)
        (tmp_path / "shipped" / name / "config.json").write_text("{}")
    monkeypatch.setattr(bundled, "_HERE", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shipped"


def test_bundled_names_come_first_even_beside_a_folder_of_that_name(two_models, tmp_path):
    (tmp_path / "tokenflow-tiny").mkdir()
    assert bundled_names() == ["tokenflow-other", "tokenflow-tiny"]
    assert bundled_path("tokenflow-tiny") == two_models / "tokenflow-tiny"
    assert resolve("tokenflow-tiny") == str(two_models / "tokenflow-tiny")


def test_folders_and_hub_names_pass_through(two_models, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenflow.hub.silence", lambda: None)
    (tmp_path / "mine").mkdir()
    assert resolve("mine") == "mine"
    assert resolve(tmp_path / "mine") == str(tmp_path / "mine")
    assert resolve("someone/tokenflow-b") == "someone/tokenflow-b"


def test_a_hub_name_counts_if_the_hub_answers_or_there_is_a_copy(two_models, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenflow.hub.silence", lambda: "no network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot load model someone/tokenflow-b: .*: no network"):
        resolve("someone/tokenflow-b")
    (tmp_path / "models--someone--tokenflow-b").mkdir()
    assert resolve("someone/tokenflow-b") == "someone/tokenflow-b"


@pytest.mark.parametrize("name", ["tokenflow-tny", "tokenflowtiny", "tokenflow_tiny"])
def test_a_misspelt_name_suggests_the_nearest(two_models, name):
    with pytest.raises(UserError, match=f"unknown model '{name}'; did you mean 'tokenflow-tiny'"):
        resolve(name)
    with pytest.raises(UserError, match="did you mean 'tokenflow-tiny'"):
        bundled_path(name)


def test_a_preset_without_weights_says_where_to_get_them(two_models, tmp_path):
    with pytest.raises(
        UserError, match=r"'tokenflow-b-256' has no weights here.*tokenflow convert FILE FOLDER"
    ):
        resolve("tokenflow-b-256")
    (tmp_path / "tokenflow-b-256").mkdir()  # what `convert` made
    assert resolve("tokenflow-b-256") == "tokenflow-b-256"


@pytest.mark.parametrize("path", ["./missing", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_named(two_models, path):
    with pytest.raises(UserError, match=f"no model folder at {path}"):
        resolve(path)
