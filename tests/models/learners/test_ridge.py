from __future__ import annotations

import numpy as np
import pytest

from models.episode import Support
from tests.models.learners.given import DIM, clusters, learner


@pytest.mark.parametrize("shots", [(1, 5, 2), (4, 20, 8)])
def test_it_is_the_weighted_least_squares_solution_for_few_examples_and_for_many(shots: tuple[int, ...]) -> None:
    """Solved as a textbook would, in the space of features; with few examples the learner solves it in theirs."""
    support, _, _ = clusters(shots, noise=0.4)
    assert (len(support.labels) > DIM) == (sum(shots) == 32)
    counts = np.bincount(support.labels)
    weights = len(support.labels) / (3 * counts[support.labels])
    targets = np.eye(3)[support.labels] - 1 / 3
    x = support.features.astype(float)
    solution = np.linalg.solve(x.T @ (weights[:, None] * x) + 0.5 * np.eye(DIM), x.T @ (weights[:, None] * targets))
    np.testing.assert_allclose(learner("ridge").adapt(support).weight, 8 * solution.T, rtol=1e-3, atol=1e-4)


def test_a_larger_penalty_gives_a_smaller_map() -> None:
    support, _, _ = clusters((3, 3, 3))
    lengths = [
        np.linalg.norm(learner("ridge", log_penalty=np.float32(penalty)).adapt(support).weight)
        for penalty in (-2, 0, 2, 4)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1]


@pytest.mark.parametrize("copies", [1, 4])
def test_examples_that_are_alike_are_learned_from_where_the_penalty_says_next_to_nothing(copies: int) -> None:
    support, query, answers = clusters((8, 8, 8), queries=10, noise=0.05)
    alike = Support(np.tile(support.features, (copies, 1)), np.tile(support.labels, copies), support.way)
    weight, bias = learner("ridge", log_penalty=np.float32(-30)).adapt(alike)
    assert np.isfinite(weight).all()
    assert ((query @ weight.T + bias).argmax(axis=1) == answers).mean() > 0.9


@pytest.mark.parametrize("things", [1, 2])
@pytest.mark.parametrize("shots", [(3, 4, 5), (4, 20, 8)])
def test_what_is_left_of_a_class_weighs_as_much_as_the_class_did(shots: tuple[int, ...], things: int) -> None:
    support, _, _ = clusters(shots, noise=0.4)
    x, labels = support.features.astype(float), support.labels
    targets = np.eye(3)[labels] - 1 / 3
    rank = np.array([np.sum(labels[:k] == label) for k, label in enumerate(labels)])
    shown = labels * len(x) + rank // things
    found = learner("ridge").leave_out(support, shown)
    for index in range(len(x)):
        out = shown == shown[index]
        w = np.where(out, 0, len(x) / (3 * np.bincount(labels[~out])[labels]))[:, None]
        solution = np.linalg.solve(x.T @ (w * x) + 0.5 * np.eye(DIM), x.T @ (w * targets))
        np.testing.assert_allclose(found[index], 8 * x[index] @ solution, rtol=1e-3, atol=1e-3)


def test_of_very_many_what_is_left_weighs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    support, _, _ = clusters((40, 30), noise=0.4)
    shown = support.labels * 70 + np.arange(70) // 3
    exact = learner("ridge").leave_out(support, shown)
    monkeypatch.setattr("models.learners.ridge.MANY", 20)
    found = learner("ridge").leave_out(support, shown)
    np.testing.assert_allclose(found, exact, atol=0.1 * np.abs(exact).max())
    assert not np.array_equal(found, exact)
