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

    def less(places: np.ndarray) -> Array:
        """One less the leverages of these rows on each other."""
        if n <= dim:
            return penalty * at(places, at(places, inverse).T)
        return unit(len(places)) - at(places, rows) @ at(places, turned).T

    order = np.argsort(labels, kind="stable")
    classes = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    found = [_of_class(less(own), at(own, error), things[own]) for own in classes]
    return (targets - at(np.argsort(order), xp.concat(found, axis=0))) / root


def _of_class(less: Array, error: Array, things: np.ndarray) -> Array:
    """The errors [k, way] of the rows of a class by fits without each of its things [k].

    `less` [k, k] is one less their leverages in the fit to all, `error` [k, way] what that leaves. Without a thing of
    `size` rows the others weigh k / (k - size) as much: all k are made to first, by Woodbury's identity.
    """
    xp, where = array_namespace(less), device(less)
    k = less.shape[0]
    _, number, sizes = np.unique(things, return_inverse=True, return_counts=True)
    orders, found = [], []
    for size in map(int, np.unique(sizes)):
        more = k / (k - size) if size < k else 1.0
        heavier = more * xp.eye(k, dtype=less.dtype, device=where) - (more - 1) * less
        solved = xp.linalg.solve(heavier, xp.concat([less, error], axis=1))

        def alone(places: Array, left: Array, solved: Array = solved) -> Array:
            block = xp.reshape(places[:, :, None] * k + places[:, None, :], (-1,))
            taken = xp.take(xp.reshape(solved[:, :k], (-1,)), block, axis=0)
            return xp.linalg.solve(xp.reshape(taken, (*places.shape, places.shape[1])), left)

        own = np.flatnonzero(sizes[number] == size)
        places = xp.asarray(own, device=where)
        found.append(by_thing(things[own], alone, places, xp.take(solved[:, k:], places, axis=0)))
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
