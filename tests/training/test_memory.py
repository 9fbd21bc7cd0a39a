from __future__ import annotations

import numpy as np
import pytest

from training.memory import centroids, class_slots, within_class


def unit(n: int, dim: int = 6, *, seed: int = 0) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(n, dim))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def corners(each: int = 40) -> np.ndarray:
    """Unit-length features close to one of five axes."""
    rows = np.repeat(np.eye(5, 8), each, axis=0) + 0.05 * np.random.default_rng(1).normal(size=(5 * each, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 7, 50])
def test_centroids_have_unit_length(count: int) -> None:
    found = centroids(unit(300), count, seed=0)
    assert found.shape == (count, 6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_fewer_rows_give_fewer_slots() -> None:
    features = unit(4)
    found = centroids(features, 256, seed=0)
    np.testing.assert_allclose(sorted(found.tolist()), sorted(features.tolist()), atol=1e-6)


def test_centroids_are_the_directions_of_the_means_of_what_is_nearest_to_them() -> None:
    features = unit(400)
    found = centroids(features, 5, seed=3, rounds=200)  # to the end, where nothing moves
    nearest = (features @ found.T).argmax(axis=1)
    means = np.stack([features[nearest == k].sum(axis=0) for k in range(5)])
    np.testing.assert_allclose(found, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5)


def test_rounds_bring_centroids_closer_to_the_features() -> None:
    features = unit(500, 16)

    def closeness(rounds: int) -> float:
        return float((features @ centroids(features, 20, seed=0, rounds=rounds).T).max(axis=1).mean())

    # Without a round, 20 of the features are centroids of themselves.
    assert closeness(0) < closeness(1) < closeness(20)


def test_clusters_that_stand_apart_are_all_found() -> None:
    found = centroids(corners(), 5, seed=2)
    assert (found @ np.eye(5, 8).T).max(axis=0).min() > 0.95


def test_the_seed_decides() -> None:
    features = unit(300)
    assert np.array_equal(centroids(features, 10, seed=4), centroids(features, 10, seed=4))
    assert not np.array_equal(centroids(features, 10, seed=4), centroids(features, 10, seed=5))


def test_a_slot_that_nothing_is_near_to_moves_to_a_feature() -> None:
    """Most features are one point, so most of the slots drawn at first are the same and win nothing."""
    features = np.concatenate([np.repeat(unit(1), 200, axis=0), unit(5, seed=9)])
    found = centroids(features, 20, seed=0)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def by_hand(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    total = np.zeros((features.shape[1],) * 2)
    for label in np.unique(labels):
        rows = features[labels == label].astype(np.float64)
        total += len(rows) * np.cov(rows.T, bias=True)
    return total / len(features)


def test_the_parts_put_together_are_the_covariance_within_classes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), [3, 30, 12, 15]))
    features = (rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)) + 5 * labels[:, None]).astype(np.float32)
    basis, spectrum = within_class(features, labels)
    covariance = by_hand(features, labels)
    rebuilt = basis @ np.diag(spectrum * np.trace(covariance) / 6) @ basis.T
    np.testing.assert_allclose(rebuilt, covariance, rtol=1e-3, atol=1e-3 * np.abs(covariance).max())
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-5)
    assert spectrum.mean() == pytest.approx(1, abs=1e-5)
    assert (spectrum >= 0).all()
    assert basis.dtype == spectrum.dtype == np.float32


def test_where_classes_lie_does_not_matter() -> None:
    labels = np.repeat(np.arange(5), 20)
    features = unit(100)
    moved = features + 10 * unit(5, seed=3)[labels]
    np.testing.assert_allclose(within_class(features, labels)[1], within_class(moved, labels)[1], rtol=1e-2, atol=1e-4)


def test_a_direction_in_which_no_class_varies_has_nothing_and_never_less() -> None:
    features = unit(100)
    features[:, 5] = np.repeat(np.arange(5), 20)
    _, spectrum = within_class(features, np.repeat(np.arange(5), 20))
    assert spectrum[0] == pytest.approx(0, abs=1e-6)
    assert spectrum[0] >= 0
    assert spectrum[1] > 0.1


@pytest.mark.parametrize(("count", "each"), [(5, 1), (9, 1), (10, 2), (24, 4)])
def test_every_class_has_as_many_slots_near_its_own_features(count: int, each: int) -> None:
    features, labels = corners(), np.repeat(np.arange(5), 40)
    slots, owners = class_slots(features, labels, count, seed=0)
    assert np.bincount(owners).tolist() == [each] * 5
    assert np.array_equal(slots[:, :5].argmax(axis=1), owners)  # the axes are the classes
    np.testing.assert_allclose(np.linalg.norm(slots, axis=1), 1, atol=1e-5)


def test_fewer_slots_than_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="4 slots cannot hold 5 classes"):
        class_slots(corners(), np.repeat(np.arange(5), 40), 4, seed=0)
