"""Which examples of a class show one thing: frames of one burst, one piece in several lights, one file saved twice.

Two examples are twins where their squared distance is at most a fifth of the usual one in their class. Of pairs of
different things that was less than one in ten thousand in photographs, and three in a thousand in characters; of pairs
of one tile in several lights three in four. Who is the twin of a twin is one as well. An example that looks like
another class, for its label may be wrong, does not count for what is usual. What a class shows but once, in
however many examples, is not noticed: nothing tells it from a class whose members are all alike. Knows nothing of
images or learners.
"""

from __future__ import annotations

import numpy as np

NEAR = 0.2  # of the median of squared distances within the class
SAME = 1e-5  # of a squared length: no more than rounding makes of two copies
STRANGE = 0.25  # of the usual distance to its class: who is so near to one of another class looks like that
LEAST_DIM = 16  # in fewer dimensions different things are near each other by chance
MOST = 500  # examples of a class; in one of more nobody looks


def units(features: np.ndarray, labels: np.ndarray, way: int) -> np.ndarray:
    """features [n, dim] of classes [n] -> the number of what each shows, [n], counted from 0 within its class.

    Without twins that is its place among the examples of its class.
    """
    counts = np.bincount(labels, minlength=way)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    order = np.argsort(labels, kind="stable")
    found = np.empty(len(labels), int)
    found[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    compared = []
    for size in np.unique(counts[(counts > 1) & (counts <= MOST)]):
        rows = order[starts[counts == size][:, None] + np.arange(size)]
        compared.append((rows, _distances(features[rows])))
    if not compared or features.shape[1] < LEAST_DIM:
        return found
    pairs = [distances[:, *np.triu_indices(rows.shape[1], 1)] for rows, distances in compared]
    usual = np.median(np.concatenate([of_size.ravel() for of_size in pairs]))
    same = SAME * float(np.mean(np.square(features)) * features.shape[1])
    for (rows, distances), of_size in zip(compared, pairs, strict=True):
        # Two examples have one distance, which says nothing of what is usual: that of all classes is taken.
        width = np.median(of_size, axis=1) if rows.shape[1] > 2 else np.full(len(rows), usual)
        near = np.maximum(NEAR * width, same)
        for group in np.flatnonzero((of_size <= near[:, None]).any(axis=1)):
            own = ~_strange(features, labels, rows[group], distances[group])
            those, among = rows[group][own], distances[group][np.ix_(own, own)]
            if 2 < len(those) < len(rows[group]):
                near[group] = max(NEAR * np.median(among[np.triu_indices(len(those), 1)]), same)
            shown = np.arange(len(own))
            shown[own] = np.flatnonzero(own)[_first(among <= near[group])]
            found[rows[group]] = np.unique(shown, return_inverse=True)[1]
    return found


def _strange(features: np.ndarray, labels: np.ndarray, rows: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Of the examples of a class, [n]: whether each is far nearer to one of another class than to its own as a rule."""
    others = np.flatnonzero(labels != labels[rows[0]])
    if not len(others):
        return np.zeros(len(rows), bool)
    x, y = features[rows], features[others]
    away = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    return np.asarray(away.min(axis=1) < STRANGE * np.median(distances, axis=1))


def _distances(x: np.ndarray) -> np.ndarray:
    """[classes, n, dim] -> squared distances within each class, [classes, n, n]."""
    products = x @ x.transpose(0, 2, 1)
    squares = np.diagonal(products, axis1=1, axis2=2)
    return np.asarray(np.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0))


def _first(near: np.ndarray) -> np.ndarray:
    """[n, n] -> for each the first of those that it is joined with, itself included, [n]."""
    near = near | np.eye(len(near), dtype=bool)
    first = np.arange(len(near))
    while True:
        further = np.where(near, first[None, :], len(near)).min(axis=1)
        if (further == first).all():
            return first
        first = further
