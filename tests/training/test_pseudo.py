from __future__ import annotations

import numpy as np
import pytest

from training import pseudo


def clouds(count: int = 8, each: int = 20, *, noise: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(count), each)
    features = rng.standard_normal((count, 12))[labels] / 3.5 + noise * rng.standard_normal((len(labels), 12))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), labels


def purity(named: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images that have a class whose most frequent true one is theirs."""
    right = sum(np.bincount(labels[named == label]).max() for label in np.unique(named[named >= 0]))
    return float(right / (named >= 0).sum())


def test_clusters_are_classes_without_a_gap_and_of_two_at_least() -> None:
    features, _ = clouds()
    named = pseudo.clusters(features, 5, seed=0)
    counts = np.bincount(named[named >= 0])
    assert counts.min() >= 2
    assert 10 < len(counts) <= 32
    assert 16 <= (named == pseudo.UNNAMED).sum() < 40  # a tenth, and whoever is alone


def test_clusters_of_the_size_of_the_classes_are_nearly_the_classes() -> None:
    features, labels = clouds()
    assert purity(pseudo.clusters(features, 10, seed=0), labels) > 0.9
    shuffled = np.random.default_rng(0).permutation(labels)
    assert purity(pseudo.clusters(features, 10, seed=0), shuffled) < 0.5


def test_coarse_clusters_are_fewer_than_fine_ones() -> None:
    features, _ = clouds()
    fine, coarse = (pseudo.clusters(features, size, seed=0).max() + 1 for size in (5, 20))
    assert coarse < fine / 2


def test_the_thinnest_are_left_out() -> None:
    """One of the clouds is far wider than the others: whoever is left out is of it."""
    dense, _ = clouds(count=9, each=10, noise=0.03)
    wide = np.random.default_rng(5).standard_normal((10, 12)).astype(np.float32)
    features = np.concatenate([dense, wide / np.linalg.norm(wide, axis=1, keepdims=True)])
    out = pseudo.clusters(features, 10, seed=0) == pseudo.UNNAMED
    assert out[90:].mean() >= 0.4
    assert out[:90].mean() < 0.1
    assert (pseudo.clusters(dense, 10, seed=0, thin=0) == pseudo.UNNAMED).mean() < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides(seed: int) -> None:
    features, _ = clouds()
    assert np.array_equal(pseudo.clusters(features, 5, seed=seed), pseudo.clusters(features, 5, seed=seed))
    assert not np.array_equal(pseudo.clusters(features, 5, seed=seed), pseudo.clusters(features, 5, seed=seed + 1))
