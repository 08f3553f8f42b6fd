"""Fixtures for every room: a random-weight model of a few thousand values, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_model import save_small_model
from small_pipeline import save_small_class_pipeline, save_small_pipeline


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` say so where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def small_model_folder(tmp_path_factory) -> Path:
    """Folder of the small model, seed 0."""
    return save_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory) -> Path:
    """The same architecture with other weights: its tokens mean something else."""
    return save_small_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def small_pipeline_folder(tmp_path_factory, small_model_folder) -> Path:
    """Folder of the small text-to-image pipeline, around the small model."""
    return save_small_pipeline(tmp_path_factory.mktemp("models") / "small-t2i", small_model_folder)


@pytest.fixture(scope="session")
def small_class_folder(tmp_path_factory, small_model_folder) -> Path:
    """Folder of the small class-conditional pipeline, around the small model."""
    return save_small_class_pipeline(tmp_path_factory.mktemp("models") / "small-var", small_model_folder)
