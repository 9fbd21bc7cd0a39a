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
FEW = 100  # rows of which all pairs are looked at
DIRECTIONS, BESIDE = 4, 4


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
    size = np.einsum("nd,nd->n", features, features).mean()
    if not np.isfinite(size) or not size:
        return ()
    group = _near(features, SAME * size)
    several = [np.flatnonzero(group == number) for number in np.flatnonzero(np.bincount(group) > 1)]
    return tuple(tuple(rows.tolist()) for rows in several if (labels[rows] != labels[rows[0]]).any())


def _near(features: np.ndarray, most: float) -> np.ndarray:
    """The number of the first row that each is joined with, through rows whose squared distance is at most that.

    Of few rows all pairs are looked at; of many, those that lie side by side in one of some directions, for all pairs
    of a thousand would take as long as to learn from them.
    """
    n, dim = features.shape
    group = np.arange(n)
    if n <= FEW:
        squares = np.einsum("nd,nd->n", features, features)
        pairs = np.nonzero(np.triu(squares[:, None] + squares - 2 * features @ features.T <= most, 1))
        return _merged(group, *pairs)
    seen = features @ _directions(dim)
    for order in np.argsort(seen, axis=0, kind="stable").T:
        for step in range(1, BESIDE + 1):
            one, other = order[:-step], order[step:]
            close = (np.abs(seen[one] - seen[other]) <= 6 * math.sqrt(most)).all(axis=1)  # what is near is so in each
            close &= group[one] != group[other]
            one, other = one[close], other[close]
            same = ((features[one] - features[other]) ** 2).sum(axis=1) <= most
            if same.any():
                group = _merged(group, one[same], other[same])
    return group


def _merged(group: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The same with the rows of each pair joined as well, and all that they were joined with before."""
    while True:
        one, other = group[first], group[second]
        if (one == other).all():
            return group
        group = group.copy()
        np.minimum.at(group, np.maximum(one, other), np.minimum(one, other))  # only firsts move, and take theirs along
        while not np.array_equal(further := group[group], group):
            group = further


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
