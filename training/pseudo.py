"""Classes without labels: clusters of features, coarse or fine, without those that hold together worst.

Hsu, Levine and Finn, "Unsupervised Learning via Meta-Learning", 2018, https://arxiv.org/abs/1810.02334, make few-shot
tasks of clusters instead of classes. A cluster is not a class, and the thinnest are the least so: their images lie
farthest from their centre and are given no class at all. Knows nothing of images or networks.
"""

from __future__ import annotations

import numpy as np

from training.memory import centroids

THIN = 0.1  # share of the images that get no class
FINE, COARSE = 15, 60  # images a cluster has on average
UNNAMED = -1


def clusters(features: np.ndarray, size: int, *, seed: int, thin: float = THIN) -> np.ndarray:
    """Pseudo-classes [n] of unit-length features [n, dim], about `size` images in each; UNNAMED where thin.

    The classes are 0, 1, 2, ... without a gap, and each has two images at least.
    """
    centres = centroids(features, max(2, round(len(features) / size)), seed=seed)
    named, closeness = nearest(features, centres)
    counts = np.bincount(named, minlength=len(centres))
    density = np.bincount(named, closeness, minlength=len(centres)) / np.maximum(counts, 1)
    # Cluster after cluster, the thinnest first, and in the one that is cut through the farthest images first.
    order = np.lexsort((closeness, named, density[named]))
    named[order[: int(thin * len(features))]] = UNNAMED
    alone = np.flatnonzero(np.bincount(named[named >= 0], minlength=len(centres)) < 2)
    named[np.isin(named, alone)] = UNNAMED
    kept = named >= 0
    named[kept] = np.unique(named[kept], return_inverse=True)[1]
    return named


def nearest(features: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the centres [k, dim] is the nearest to each of the features [n, dim], and the cosine: [n] and [n]."""
    parts = [part @ centres.T for part in np.array_split(features, max(1, len(features) // 4096))]
    return np.concatenate([part.argmax(axis=1) for part in parts]), np.concatenate([part.max(axis=1) for part in parts])
