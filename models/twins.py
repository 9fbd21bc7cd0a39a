"""Which examples of a class show one thing: frames of one burst, one piece in several lights, one file saved twice.

They are told by their features alone: two examples of a class are twins where their squared distance is at most what
the artifact names, a quarter of what hardly any two different ones of its validation classes are nearer than. Who is
the twin of a twin is one as well. So how a class is made up says nothing, nor how many of it are alike; but what looks
alike to the extractor is taken for one thing, as two plates of one make would be. Knows nothing of images or learners.
"""

from __future__ import annotations

import numpy as np

MOST = 1000  # examples of a class; in one of more nobody looks


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
    """features [n, dim] of classes [n] -> the rows that are the same, bit for bit, though they are of several classes.

    One file that was sent under two labels is: no learner can tell which of them it is.
    """
    sums, where = np.unique(features.sum(axis=1), return_inverse=True)
    if len(sums) == len(features):  # as nearly always
        return ()
    groups: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(np.bincount(where)[where] > 1).tolist():
        groups.setdefault(features[row].tobytes(), []).append(row)
    return tuple(tuple(rows) for rows in groups.values() if len({int(labels[row]) for row in rows}) > 1)


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
