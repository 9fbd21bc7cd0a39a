from __future__ import annotations

import numpy as np
import pytest

from models.episode import Support
from models.learners.whitened import whitening
from tests.models.learners.given import DIM, arrays, clusters, learner

METHOD = "discriminant"


def test_with_one_example_a_class_it_is_whitened_prototypes() -> None:
    support, _, _ = clusters((1, 1, 1), noise=0.4)
    found, expected = learner(METHOD).adapt(support), learner("whitened").adapt(support)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.bias, expected.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shots", [(2, 5, 3), (9, 20, 4)])
def test_it_is_the_textbook_discriminant_under_both_covariances(shots: tuple[int, ...]) -> None:
    """In the space of features, whichever system the learner solves."""
    support, _, _ = clusters(shots, noise=0.4)
    given = {name: value.astype(float) for name, value in arrays(METHOD).items()}
    transform = whitening(given["basis"], given["spectrum"], given["log_shrink"])
    x, counts = support.features.astype(float) @ transform, np.array(shots)
    means = np.stack([x[support.labels == k].mean(axis=0) for k in range(3)])
    away = x - means[support.labels]
    precision = np.linalg.inv(np.eye(DIM) + 0.7 * away.T @ away)
    bias = -0.5 * np.einsum("kd,de,ke->k", means, precision, means) * counts / (counts + np.exp(given["log_noise"]))
    found = learner(METHOD).adapt(support)
    np.testing.assert_allclose(found.weight, 8 * means @ precision @ transform.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.bias, 8 * bias, rtol=1e-3, atol=1e-3)


def test_a_direction_in_which_the_task_scatters_counts_less() -> None:
    """Two classes that differ in two directions alike, in one of which their examples scatter widely."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    features = 0.05 * rng.standard_normal((40, DIM))
    features[:, 0] += np.where(labels, 0.5, -0.5)
    features[:, 1] += np.where(labels, 0.5, -0.5) + 0.6 * rng.standard_normal(40)
    plain = {"basis": np.eye(DIM, dtype=np.float32), "spectrum": np.ones(DIM, np.float32)}
    support = Support(features.astype(np.float32), labels, 2)
    differences = {
        method: np.abs(np.diff(learner(method, **plain).adapt(support).weight, axis=0))[0]
        for method in (METHOD, "whitened")
    }
    assert differences["whitened"][0] < 2 * differences["whitened"][1]
    assert differences[METHOD][0] > 5 * differences[METHOD][1]


def test_unlabelled_examples_move_the_means_as_they_do_those_of_whitened_prototypes() -> None:
    gains = []
    for seed in range(20):
        support, query, answers = clusters((1, 1, 1), queries=30, unlabelled=60, noise=0.35, seed=seed)
        alone = Support(support.features, support.labels, support.way)
        found = [learner(METHOD).adapt(each) for each in (alone, support)]
        right = [((query @ weight.T + bias).argmax(axis=1) == answers).mean() for weight, bias in found]
        gains.append(right[1] - right[0])
    assert np.mean(gains) > 0.02
