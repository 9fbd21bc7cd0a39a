"""Filling the external memory: what learners remember of earlier classes.

Slots are centroids of the features of each training class, or of all of them where classes mean little; the covariance
is that of examples around their class, and tells which directions differ within any class. Knows nothing of learners.
"""

from __future__ import annotations

import numpy as np


def centroids(features: np.ndarray, count: int, *, seed: int, rounds: int = 20) -> np.ndarray:
    """Spherical k-means of unit-length [n, dim] -> [count, dim] of unit length (fewer rows give fewer slots)."""
    rng = np.random.default_rng(seed)
    count = min(count, len(features))
    centres = features[rng.choice(len(features), count, replace=False)]
    for _ in range(rounds):
        nearest = np.concatenate([(part @ centres.T).argmax(axis=1) for part in np.array_split(features, 64)])
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, features)
        empty = np.bincount(nearest, minlength=count) == 0
        sums[empty] = features[rng.choice(len(features), int(empty.sum()))]
        centres = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return centres.astype(np.float32)


def class_slots(features: np.ndarray, labels: np.ndarray, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots [slots, dim] of unit length and the class of each [slots]: as many of every class, at most `count` in all.

    Raises ValueError where there are more classes than slots.
    """
    ways = int(labels.max()) + 1
    if ways > count:
        raise ValueError(f"{count} slots cannot hold {ways} classes")
    parts = [centroids(features[labels == label], count // ways, seed=seed) for label in range(ways)]
    return np.concatenate(parts), np.repeat(np.arange(ways), [len(part) for part in parts])


def within_class(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors [dim, dim] (columns) and eigenvalues [dim], over their mean, of the within-class covariance."""
    ways = int(labels.max()) + 1
    sums = np.zeros((ways, features.shape[1]))
    np.add.at(sums, labels, features)
    means = sums / np.maximum(np.bincount(labels, minlength=ways), 1)[:, None]
    residual = features - means[labels]
    covariance = (residual.T @ residual) / len(residual)
    spectrum, basis = np.linalg.eigh(covariance)
    spectrum = np.clip(spectrum, 0, None)
    return basis.astype(np.float32), (spectrum / spectrum.mean()).astype(np.float32)
