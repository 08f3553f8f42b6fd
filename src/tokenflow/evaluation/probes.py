"""Classifiers that judge frozen features: nearest neighbours, a linear probe, and zero-shot by text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

NEIGHBOURS = 20
PROBE_STRENGTH = 0.01  # scikit-learn's `C`, the inverse of the l2 penalty
PROBE_ITERATIONS = 200  # of L-BFGS at most; the loss changes little after them


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = NEIGHBOURS,
    block: int = 1024,
) -> float:
    """Share of test rows whose `k` most cosine-similar train rows vote for their label.

    Every neighbour has one vote; equal counts go to the label with the larger sum of similarities.

    Args:
        train, test: features [N, D] and [M, D], any float dtype; computed in fp32.
        train_labels, test_labels: int64 [N] and [M], counted from 0.
        block: test rows compared at a time (memory: block * N values).
    """
    k = min(k, len(train))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    base = F.normalize(train.float(), dim=1)
    hits = 0
    for rows, labels in zip(test.split(block), test_labels.split(block), strict=True):
        similarity, nearest = (F.normalize(rows.float(), dim=1) @ base.T).topk(k, dim=1)
        # A similarity adds at most 1 / (k + 1), so k of them never outweigh one more vote.
        votes = torch.zeros(len(rows), classes, dtype=torch.float64)
        votes.scatter_add_(1, train_labels[nearest], 1 + (similarity.double() + 1) / (2 * (k + 1)))
        hits += int((votes.argmax(1) == labels).sum())
    return hits / len(test)


def fit_linear_probe(
    train: Tensor,
    train_labels: Tensor,
    inverse_strength: float = PROBE_STRENGTH,
    iterations: int = PROBE_ITERATIONS,
) -> Pipeline:
    """Multinomial logistic regression (scikit-learn, L-BFGS) on features [N, D] standardised by `train`.

    Args:
        inverse_strength: scikit-learn's `C`.
        iterations: of L-BFGS at most.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_strength, max_iter=iterations, tol=1e-3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is part of the definition
        return probe.fit(train.float().numpy(), train_labels.numpy())


def linear_probe_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    inverse_strength: float = PROBE_STRENGTH,
    iterations: int = PROBE_ITERATIONS,
) -> float:
    """Accuracy on `test` [M, D] of `fit_linear_probe` on `train` [N, D]."""
    probe = fit_linear_probe(train, train_labels, inverse_strength, iterations)
    return float(probe.score(test.float().numpy(), test_labels.numpy()))


def zero_shot_accuracy(features: Tensor, labels: Tensor, class_embeddings: Tensor) -> dict[str, float]:
    """Top-1 and top-5 share of rows whose label's text embedding is (among) the most cosine-similar.

    Args:
        features: [M, T], in the space of the embeddings.
        labels: int64 [M], rows of `class_embeddings`.
        class_embeddings: [C, T].
    """
    scores = F.normalize(features.float(), dim=1) @ F.normalize(class_embeddings.float(), dim=1).T
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {"top-1": float(best[:, 0].float().mean()), "top-5": float(best.any(1).float().mean())}
