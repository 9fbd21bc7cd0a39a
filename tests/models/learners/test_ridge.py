from __future__ import annotations

import numpy as np
import pytest

from models.episode import Support
from models.learners.whitened import whitening
from tests.models.learners.given import DIM, arrays, clusters, learner


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


def transform() -> np.ndarray:
    given = arrays("whitened-ridge")
    return whitening(given["basis"], given["spectrum"], given["log_shrink"]).astype(float)


@pytest.mark.parametrize("shots", [(3, 2, 4), (4, 20, 8)])
@pytest.mark.parametrize("method", ["ridge", "whitened-ridge"])
def test_each_example_is_left_out_of_the_same_least_squares(method: str, shots: tuple[int, ...]) -> None:
    support, _, _ = clusters(shots, noise=0.4)
    x = support.features.astype(float) @ (transform() if method == "whitened-ridge" else np.eye(DIM))
    weights = len(x) / (3 * np.bincount(support.labels)[support.labels])
    targets = np.eye(3)[support.labels] - 1 / 3
    found = learner(method).leave_one_out(support)
    for index in range(len(x)):
        w = np.where(np.arange(len(x)) == index, 0, weights)[:, None]
        solution = np.linalg.solve(x.T @ (w * x) + 0.5 * np.eye(DIM), x.T @ (w * targets))
        np.testing.assert_allclose(found[index], 8 * x[index] @ solution, rtol=1e-3, atol=1e-3)


def test_in_the_metric_of_the_memory_it_is_ridge_on_whitened_features() -> None:
    support, _, _ = clusters((2, 5, 3), noise=0.4)
    whitened = Support((support.features @ transform()).astype(np.float32), support.labels, support.way)
    expected = learner("ridge").adapt(whitened).weight @ transform().T
    np.testing.assert_allclose(learner("whitened-ridge").adapt(support).weight, expected, rtol=1e-3, atol=1e-3)


def test_with_one_example_a_class_and_a_large_penalty_it_points_where_whitened_prototypes_do() -> None:
    support, _, _ = clusters((1, 1, 1), noise=0.4)
    found = learner("whitened-ridge", log_penalty=np.float32(12)).adapt(support).weight
    expected = learner("whitened").adapt(support).weight
    expected = expected - expected.mean(axis=0)  # what is common to all classes does not count
    cosines = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.999


def test_unlabelled_examples_of_the_classes_improve_the_map_and_strangers_hardly_move_it() -> None:
    gains, moves = [], []
    for seed in range(20):
        support, query, answers = clusters((1, 1, 1), queries=30, unlabelled=60, noise=0.35, seed=seed)
        alone = Support(support.features, support.labels, support.way)
        strangers = np.random.default_rng(seed).standard_normal((60, DIM)).astype(np.float32) * 0.01 + query[:1] * -1
        found = [
            learner("whitened-ridge").adapt(each)
            for each in (alone, support, Support(support.features, support.labels, support.way, strangers))
        ]
        right = [((query @ weight.T + bias).argmax(axis=1) == answers).mean() for weight, bias in found]
        gains.append(right[1] - right[0])
        moves.append(right[2] - right[0])
    assert np.mean(gains) > 0.02
    assert np.mean(moves) > -0.01
