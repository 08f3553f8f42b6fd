"""Probes on features whose answer is known: separable is 1.0, noise is chance."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tokenflow.evaluation.probes import knn_accuracy, linear_probe_accuracy, zero_shot_accuracy


def labelled(count, classes=5, dims=12, spread=0.1, seed=0):
    """Rows around one random centre per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dims, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, dims, generator=generator), labels


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe_accuracy])
def test_separable_features_are_told_apart(accuracy):
    assert accuracy(*labelled(300), *labelled(50, seed=1)) == 1.0


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe_accuracy])
def test_noise_gives_chance(accuracy):
    train, train_labels = labelled(2000, spread=1e4)
    test, test_labels = labelled(1000, spread=1e4, seed=1)
    assert accuracy(train, train_labels, test, test_labels) == pytest.approx(1 / 5, abs=0.05)


def test_knn_equals_scikit_learn_where_no_vote_is_tied():
    train, train_labels = labelled(400, classes=2, spread=2.0)
    test, test_labels = labelled(200, classes=2, spread=2.0, seed=1)
    theirs = KNeighborsClassifier(19, metric="cosine").fit(train.numpy(), train_labels.numpy())
    ours = knn_accuracy(train, train_labels, test, test_labels, k=19, block=37)
    assert 0.5 < ours < 1.0
    assert ours == pytest.approx(theirs.score(test.numpy(), test_labels.numpy()))


def test_knn_looks_at_direction_not_at_length():
    train = torch.tensor([[1.0, 0], [100, 1], [0, 1], [1, 100]])
    labels = torch.tensor([0, 0, 1, 1])
    assert knn_accuracy(train, labels, torch.tensor([[0.01, 0], [0, 500]]), torch.tensor([0, 1]), k=2) == 1.0


def test_knn_counts_votes_before_similarities():
    angles = torch.tensor([0.0, 1.0, 1.1, 1.2])  # one very near row of class 0, three far ones of class 1
    train = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([0, 1, 1, 1])
    assert knn_accuracy(train, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), k=4) == 1.0
    # two against two: the more similar pair wins
    labels = torch.tensor([1, 1, 0, 0])
    assert knn_accuracy(train, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), k=4) == 1.0


def test_knn_with_fewer_rows_than_neighbours():
    train, labels = torch.eye(2), torch.tensor([0, 0])
    assert knn_accuracy(train, labels, torch.ones(1, 2), torch.tensor([0]), k=20) == 1.0


def test_linear_probe_does_not_care_for_scale_and_offset():
    train, train_labels = labelled(300, spread=1.0)
    test, test_labels = labelled(100, spread=1.0, seed=1)
    stretch = torch.logspace(-3, 3, train.shape[1])
    plain = linear_probe_accuracy(train, train_labels, test, test_labels)
    moved = linear_probe_accuracy(train * stretch + 5, train_labels, test * stretch + 5, test_labels)
    assert moved == pytest.approx(plain, abs=0.011)


def test_zero_shot_ranks_by_cosine():
    classes = torch.eye(6) * torch.arange(1, 7)[:, None]  # longer embeddings must not win
    features = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]])
    assert zero_shot_accuracy(features, torch.tensor([0, 4]), classes) == {"top-1": 0.5, "top-5": 1.0}
    assert zero_shot_accuracy(features, torch.tensor([1, 5]), classes) == {"top-1": 0.0, "top-5": 0.5}
    few = zero_shot_accuracy(features[:, :3], torch.tensor([0, 1]), classes[:3, :3])
    assert few == {"top-1": 0.5, "top-5": 1.0}
