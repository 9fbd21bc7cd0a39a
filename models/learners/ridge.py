"""Ridge regression onto the labels, in closed form.

Bertinetto et al., "Meta-learning with differentiable closed-form solvers", 2019, https://arxiv.org/abs/1805.08136: the
inner loop is least squares, solved exactly in the space of the examples or of the features, whichever is the smaller;
what is learned is how strongly to regularise. Classes weigh the same, however many examples each has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

from models.arrays import Array, each_own, fetch, inverse, one_hot
from models.episode import Support
from models.head import Affine
from models.learners.things import by_thing

MANY = 512  # examples of a class
LEAST = 1e-6  # of the mean of the diagonal


class Fit(NamedTuple):
    rows: Array  # [n, dim] of the least squares
    targets: Array  # [n, way]
    root: Array  # [n, 1]: the square root of what each row weighs
    penalty: Array  # []
    inverse: Array  # of the system that is solved: [n, n] or [dim, dim], whichever is the smaller


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    log_scale: Array  # []
    log_penalty: Array  # []

    def adapt(self, support: Support) -> Affine:
        return self._map(self._fit(support))

    def leave_out(self, support: Support, things: np.ndarray) -> Array:
        """Logits [n, way] of each example by the map made without its thing [n], but for how much the penalty weighs,
        which is as with it; meaningless where its class shows no other."""
        return self._left_out(support, self._fit(support), things)

    def adapt_and_leave_out(self, support: Support, things: np.ndarray) -> tuple[Affine, Array]:
        """Both, from one fit."""
        fit = self._fit(support)
        return self._map(fit), self._left_out(support, fit, things)

    def _fit(self, support: Support) -> Fit:
        belongs = one_hot(support.labels, support.way, support.features)
        return fit(support.features, belongs, self.log_penalty)

    def _map(self, fit: Fit) -> Affine:
        xp = array_namespace(fit.rows)
        weight = xp.exp(self.log_scale) * solution(fit).T
        return Affine(weight, xp.zeros_like(weight[:, 0]))

    def _left_out(self, support: Support, fit: Fit, things: np.ndarray) -> Array:
        xp = array_namespace(fit.rows)
        return xp.exp(self.log_scale) * left_out(fit, fetch(support.labels), things)


def fit(features: Array, belongs: Array, log_penalty: Array) -> Fit:
    """Of features [n, dim] to how much each belongs to each class, [n, way] one in all or less."""
    xp = array_namespace(features)
    rows, targets, root = _weighted(features, belongs)
    n, dim = features.shape
    # The least part keeps the factor of alike examples from failing where the penalty says next to nothing.
    penalty = xp.exp(log_penalty) + LEAST * xp.sum(rows * rows) / min(n, dim)
    # The same solution either way; the smaller system of equations is the faster one.
    scatter = rows @ rows.T if n <= dim else rows.T @ rows
    return Fit(rows, targets, root, penalty, inverse(scatter + penalty * _unit(min(n, dim), rows)))


def solution(fit: Fit) -> Array:
    """The map [dim, way] from features to classes."""
    n, dim = fit.rows.shape
    if n <= dim:
        return fit.rows.T @ (fit.inverse @ fit.targets)
    return fit.inverse @ (fit.rows.T @ fit.targets)


def left_out(fit: Fit, labels: np.ndarray, things: np.ndarray) -> Array:
    """What a fit without each thing says of its examples, [n, way]: from the fit to all, and no further one.

    Allen, "The Relationship between Variable Selection and Data Augmentation and a Method for Prediction", 1974: the
    error is that of the fit to all, over one less the example's leverage, or less those of all that are left out. What
    is left of its class then weighs as much as the class did: see `_of_classes`.
    """
    rows, targets = fit.rows, fit.targets
    xp, where = array_namespace(rows), device(rows)
    n, dim = rows.shape

    def at(places: np.ndarray, values: Array) -> Array:
        """[...] rows of [n, k] -> [..., k]."""
        return xp.reshape(xp.take(values, xp.asarray(places.ravel(), device=where), axis=0), (*places.shape, -1))

    if n <= dim:
        error = fit.penalty * (fit.inverse @ targets)
    else:
        turned = rows @ fit.inverse  # [n, dim]
        error = targets - rows @ (turned.T @ targets)

    def of_classes(own: np.ndarray) -> Array:
        """Of classes of one size, whose rows are own [classes, size]."""
        if n <= dim:
            flat = xp.asarray((own[:, :, None] * n + own[:, None, :]).ravel(), device=where)
            less = fit.penalty * xp.reshape(xp.take(xp.reshape(fit.inverse, (-1,)), flat), (*own.shape, -1))
            return _of_classes(less, at(own, error), things[own])
        mine, back = at(own, rows), xp.matrix_transpose(at(own, turned))
        if own.shape[1] <= MANY:
            return _of_classes(_unit(own.shape[1], rows) - mine @ back, at(own, error), things[own])

        def alone(rows: Array, turned: Array, error: Array) -> Array:  # of so many what is left weighs hardly more
            return xp.linalg.solve(_unit(rows.shape[1], rows) - rows @ xp.matrix_transpose(turned), error)

        own = own.ravel()
        return by_thing(things[own], alone, at(own, rows), at(own, turned), at(own, error))

    counts = np.bincount(labels)
    order, sizes = np.lexsort((labels, counts[labels])), np.sort(counts[counts > 0])
    found, start = [], 0
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        found.append(of_classes(order[start : start + size * count].reshape(count, size)))
        start += size * count
    return (targets - at(np.argsort(order), xp.concat(found, axis=0))) / fit.root


def _of_classes(less: Array, error: Array, things: np.ndarray) -> Array:
    """The errors [classes * k, way] of the rows of classes of one size by fits without each of their things.

    `less` [classes, k, k] is one less their leverages in the fit to all, `error` [classes, k, way] what that leaves.
    Without a thing of `size` rows the others weigh k / (k - size) as much: all k are made to first, by Woodbury's
    identity, which for each size is another weight of the same eigenvectors.
    """
    xp, where = array_namespace(less), device(less)
    k = less.shape[1]
    values, vectors = xp.linalg.eigh(less)
    seen = xp.matrix_transpose(vectors) @ error
    _, number, sizes = np.unique(things.ravel(), return_inverse=True, return_counts=True)
    orders, found = [], []

    def alone(rows: Array, weight: Array, left: Array) -> Array:
        return xp.linalg.solve((rows * weight) @ xp.matrix_transpose(rows), left)

    for size in map(int, np.unique(sizes)):
        more = k / (k - size) if size < k else 1.0
        heavier = more - (more - 1) * values  # [classes, k]
        own = np.flatnonzero(sizes[number] == size)
        mine = xp.asarray(own, device=where)
        each = (
            vectors,
            xp.broadcast_to((values / heavier)[:, None, :], vectors.shape),
            vectors @ (seen / heavier[:, :, None]),
        )
        picked = (xp.take(xp.reshape(part, (-1, part.shape[2])), mine, axis=0) for part in each)
        found.append(by_thing(things.ravel()[own], alone, *picked))
        orders.append(own)
    return xp.take(xp.concat(found, axis=0), xp.asarray(np.argsort(np.concatenate(orders)), device=where), axis=0)


def _unit(size: int, like: Array) -> Array:
    return array_namespace(like).eye(size, dtype=like.dtype, device=device(like))


def _weighted(features: Array, belongs: Array) -> tuple[Array, Array, Array]:
    """Rows and targets of the least squares, and the square root of what each row weighs [n, 1]."""
    xp = array_namespace(features)
    way = belongs.shape[1]
    counts = xp.sum(belongs, axis=0)
    each = xp.sum(belongs, axis=1)[:, None]
    root = xp.sqrt(each_own(belongs, xp.sum(counts) / (way * counts)))[:, None]
    targets = belongs / xp.maximum(each, xp.full_like(each, 1e-9)) - 1 / way
    return features * root, targets * root, root
