from __future__ import annotations

import numpy as np
import pytest

from models.episode import Support
from models.learners.whitened import whitening
from tests.models.learners.given import DIM, arrays, clusters, learner


def test_under_strong_shrinkage_it_is_the_nearest_mean() -> None:
    for seed in range(5):
        support, query, _ = clusters((1, 5, 2, 3), queries=20, noise=0.5, seed=seed)
        weight, bias = learner("whitened", log_shrink=np.float32(12), log_noise=np.float32(-40)).adapt(support)
        means = np.stack([support.features[support.labels == k].mean(axis=0) for k in range(4)])
        distances = ((query[:, None] - means[None]) ** 2).sum(axis=2)
        chosen = (query @ weight.T + bias).argmax(axis=1)
        assert np.mean(chosen == distances.argmin(axis=1)) > 0.97  # ties in float32 aside


def test_the_remembered_covariance_becomes_a_multiple_of_the_identity() -> None:
    learned = arrays("whitened")
    basis, spectrum = learned["basis"], learned["spectrum"]
    covariance = basis @ np.diag(spectrum) @ basis.T
    transform = whitening(basis, spectrum, np.float32(-20))
    np.testing.assert_allclose(transform.T @ covariance @ transform, np.eye(DIM), atol=1e-4)


@pytest.mark.parametrize("log_shrink", [-1, 0, 3])
def test_the_average_feature_keeps_about_its_length(log_shrink: float) -> None:
    support, _, _ = clusters((20,) * 20)
    learned = arrays("whitened")
    transform = whitening(learned["basis"], learned["spectrum"], np.float32(log_shrink))
    assert np.linalg.norm(support.features @ transform, axis=1).mean() == pytest.approx(1, rel=0.3)


def test_a_direction_in_which_classes_vary_anyway_counts_less() -> None:
    """Two classes differ by as much along a noisy axis as along a quiet one; the quiet one decides."""
    spectrum = np.full(DIM, 0.5, np.float32)
    spectrum[0] = 8
    quiet_says_0 = np.zeros((1, DIM), np.float32)
    quiet_says_0[0, :2] = 0.6, -0.6  # the noisy axis speaks for class 1
    features = np.zeros((2, DIM), np.float32)
    features[0, :2], features[1, :2] = (-0.7, -0.7), (0.7, 0.7)
    found = learner("whitened", basis=np.eye(DIM, dtype=np.float32), spectrum=spectrum)
    weight, bias = found.adapt(Support(features, np.array([0, 1]), 2))
    logits = (quiet_says_0 @ weight.T + bias)[0]
    assert logits[0] > logits[1]
