"""Ridge regression onto the labels, in closed form.

Bertinetto et al., "Meta-learning with differentiable closed-form solvers", 2019, https://arxiv.org/abs/1805.08136: the
inner loop is least squares, solved exactly in the space of the examples or of the features, whichever is the smaller;
what is learned is how strongly to regularise. Classes weigh the same, however many examples each has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device

from models.arrays import Array, each_own, fetch, one_hot
from models.episode import Support
from models.head import Affine
from models.learners.things import by_thing

MANY = 512  # examples of a class


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    log_scale: Array  # []
    log_penalty: Array  # []

    def adapt(self, support: Support) -> Affine:
        xp = array_namespace(support.features)
        belongs = one_hot(support.labels, support.way, support.features)
        weight = xp.exp(self.log_scale) * fit(support.features, belongs, self.log_penalty).T
        return Affine(weight, xp.zeros_like(weight[:, 0]))

    def leave_out(self, support: Support, things: np.ndarray) -> Array:
        """Logits [n, way] of each example by the map made without its thing [n], but for how much the penalty weighs,
        which is as with it; meaningless where its class shows no other."""
        xp = array_namespace(support.features)
        belongs = one_hot(support.labels, support.way, support.features)
        return xp.exp(self.log_scale) * left_out(
            support.features, belongs, self.log_penalty, fetch(support.labels), things
        )


def fit(features: Array, belongs: Array, log_penalty: Array) -> Array:
    """The map [dim, way] from features [n, dim] to how much each belongs to each class, [n, way] one in all or less."""
    xp = array_namespace(features)
    rows, targets, _ = _weighted(features, belongs)
    n, dim = features.shape
    penalty = xp.exp(log_penalty) * xp.eye(min(n, dim), dtype=features.dtype, device=device(features))
    # The same solution either way; the smaller system of equations is the faster one.
    if n <= dim:
        return rows.T @ xp.linalg.solve(rows @ rows.T + penalty, targets)
    return xp.linalg.solve(rows.T @ rows + penalty, rows.T @ targets)


def left_out(features: Array, belongs: Array, log_penalty: Array, labels: np.ndarray, things: np.ndarray) -> Array:
    """What `fit` without each thing says of its examples, [n, way]: from the fit to all, and no further one.

    Allen, "The Relationship between Variable Selection and Data Augmentation and a Method for Prediction", 1974: the
    error is that of the fit to all, over one less the example's leverage, or less those of all that are left out. What
    is left of its class then weighs as much as the class did: see `_of_class`.
    """
    xp = array_namespace(features)
    rows, targets, root = _weighted(features, belongs)
    n, dim = features.shape
    penalty = xp.exp(log_penalty)

    def unit(size: int) -> Array:
        return xp.eye(size, dtype=features.dtype, device=device(features))

    def at(places: np.ndarray, values: Array) -> Array:
        return xp.take(values, xp.asarray(places, device=device(features)), axis=0)

    if n <= dim:
        inverse = xp.linalg.inv(rows @ rows.T + penalty * unit(n))
        error = penalty * (inverse @ targets)
    else:
        turned = rows @ xp.linalg.inv(rows.T @ rows + penalty * unit(dim))  # [n, dim]
        error = targets - rows @ (turned.T @ targets)

    def of_class(own: np.ndarray) -> Array:
        if n > dim and len(own) > MANY:  # of so many what is left weighs hardly more

            def alone(rows: Array, turned: Array, error: Array) -> Array:
                return xp.linalg.solve(unit(rows.shape[1]) - rows @ xp.matrix_transpose(turned), error)

            return by_thing(things[own], alone, at(own, rows), at(own, turned), at(own, error))
        if n <= dim:
            return _of_class(penalty * at(own, at(own, inverse).T), at(own, error), things[own])
        return _of_class(unit(len(own)) - at(own, rows) @ at(own, turned).T, at(own, error), things[own])

    order = np.argsort(labels, kind="stable")
    classes = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    found = xp.concat([of_class(own) for own in classes], axis=0)
    return (targets - at(np.argsort(order), found)) / root


def _of_class(less: Array, error: Array, things: np.ndarray) -> Array:
    """The errors [k, way] of the rows of a class by fits without each of its things [k].

    `less` [k, k] is one less their leverages in the fit to all, `error` [k, way] what that leaves. Without a thing of
    `size` rows the others weigh k / (k - size) as much: all k are made to first, by Woodbury's identity, which for each
    size is another weight of the same eigenvectors.
    """
    xp, where = array_namespace(less), device(less)
    k = less.shape[0]
    values, vectors = xp.linalg.eigh(less)
    seen = vectors.T @ error
    _, number, sizes = np.unique(things, return_inverse=True, return_counts=True)
    orders, found = [], []
    for size in map(int, np.unique(sizes)):
        more = k / (k - size) if size < k else 1.0
        heavier = more - (more - 1) * values

        def alone(rows: Array, left: Array, weight: Array = values / heavier) -> Array:
            return xp.linalg.solve((rows * weight) @ xp.matrix_transpose(rows), left)

        own = np.flatnonzero(sizes[number] == size)
        rows = xp.take(vectors, xp.asarray(own, device=where), axis=0)
        found.append(by_thing(things[own], alone, rows, rows @ (seen / heavier[:, None])))
        orders.append(own)
    return xp.take(xp.concat(found, axis=0), xp.asarray(np.argsort(np.concatenate(orders)), device=where), axis=0)


def _weighted(features: Array, belongs: Array) -> tuple[Array, Array, Array]:
    """Rows and targets of the least squares, and the square root of what each row weighs [n, 1]."""
    xp = array_namespace(features)
    way = belongs.shape[1]
    counts = xp.sum(belongs, axis=0)
    each = xp.sum(belongs, axis=1)[:, None]
    root = xp.sqrt(each_own(belongs, xp.sum(counts) / (way * counts)))[:, None]
    targets = belongs / xp.maximum(each, xp.full_like(each, 1e-9)) - 1 / way
    return features * root, targets * root, root
