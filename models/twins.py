"""Which examples of a class show one thing: frames of one burst, one piece in several lights, one file saved twice.

They are told by their features alone: two examples of a class are twins where their squared distance is at most what
the artifact names, a quarter of what hardly any two different ones of its validation classes are nearer than. Who is
the twin of a twin is one as well. So how a class is made up says nothing, nor how many of it are alike; but what looks
alike to the extractor is taken for one thing, as two plates of one make would be. Knows nothing of images or learners.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

MOST = 1000  # examples of a class; in one of more nobody looks
SAME = 1e-5  # of the squared length of features: what two of one picture differ by at most, seen in other batches
DIRECTIONS = 4


def units(features: np.ndarray, labels: np.ndarray, way: int, *, near: float) -> np.ndarray:
    """features [n, dim] of classes [n] -> the number of what each shows, [n], counted from 0 within its class.

    Without twins, and where `near` is 0, that is its place among the examples of its class.
    """
    counts = np.bincount(labels, minlength=way)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    order = np.argsort(labels, kind="stable")
    found = np.empty(len(labels), int)
    found[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    if not near:
        return found
    for size in np.unique(counts[(counts > 1) & (counts <= MOST)]):
        rows = order[starts[counts == size][:, None] + np.arange(size)]
        alike = (_distances(features[rows]) <= near) | np.eye(size, dtype=bool)  # also where they are no numbers
        for group in np.flatnonzero(alike.sum(axis=(1, 2)) > size):  # more than each with itself
            found[rows[group]] = _joined(alike[group])
    return found


def doubles(features: np.ndarray, labels: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """features [n, dim] of classes [n] -> the rows that are the same though they are of several classes.

    One file that was sent under two labels is: no learner can tell which of them it is. The same but for what float16
    and the order of sums make of it, for a file is not always seen in the same batch.
    """
    n, dim = features.shape
    size = np.einsum("nd,nd->n", features, features).mean()
    if not np.isfinite(size) or not size:
        return ()
    # What is near is near in every direction: a few are enough to find who may be, without looking at all pairs.
    seen = features @ _directions(dim)
    near = 6 * math.sqrt(SAME * size)
    order = np.argsort(seen[:, 0], kind="stable")
    counts = np.searchsorted(seen[order, 0], seen[order, 0] + near, side="right") - np.arange(n) - 1
    first = np.repeat(np.arange(n), counts)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    first, second = order[first], order[second]
    close = (np.abs(seen[first] - seen[second]) <= near).all(axis=1)
    first, second = first[close], second[close]
    same = ((features[first] - features[second]) ** 2).sum(axis=1) <= SAME * size
    groups: dict[int, set[int]] = {}
    for one, other in zip(first[same].tolist(), second[same].tolist(), strict=True):
        joined = groups.get(one, {one}) | groups.get(other, {other})
        groups.update(dict.fromkeys(joined, joined))
    found = {min(rows): tuple(sorted(rows)) for rows in groups.values() if len({int(labels[row]) for row in rows}) > 1}
    return tuple(found[row] for row in sorted(found))


@cache
def _directions(dim: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (dim, DIRECTIONS)).astype(np.float32)


def _distances(x: np.ndarray) -> np.ndarray:
    """[classes, n, dim] -> squared distances within each class, [classes, n, n]."""
    products = x @ x.transpose(0, 2, 1)
    squares = np.diagonal(products, axis1=1, axis2=2)
    return np.asarray(np.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0))


def _joined(alike: np.ndarray) -> np.ndarray:
    """[n, n] -> the number of the component of each, by where it first appears."""
    first = np.arange(len(alike))
    while True:
        further = np.where(alike, first[None, :], len(alike)).min(axis=1)
        further = further[further]
        if (further == first).all():
            return np.asarray(np.unique(first, return_inverse=True)[1])
        first = further
