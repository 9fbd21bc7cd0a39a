"""Ridge regression onto the labels, in closed form.

Bertinetto et al., "Meta-learning with differentiable closed-form solvers", 2019, https://arxiv.org/abs/1805.08136: the
inner loop is least squares, solved exactly in the space of the examples or of the features, whichever is the smaller;
what is learned is how strongly to regularise. Classes weigh the same, however many examples each has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device

from models.arrays import Array, each_own, one_hot
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
        """Logits [n, way] of each example by the map made without its thing [n], classes weighing as with it."""
        xp = array_namespace(support.features)
        belongs = one_hot(support.labels, support.way, support.features)
        return xp.exp(self.log_scale) * left_out(support.features, belongs, self.log_penalty, things)


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


def left_out(features: Array, belongs: Array, log_penalty: Array, things: np.ndarray) -> Array:
    """What `fit` without each thing says of its examples, [n, way], the others weighing as they do: no further fit.

    Allen, "The Relationship between Variable Selection and Data Augmentation and a Method for Prediction", 1974: the
    error is that of the fit to all, over one less the example's leverage, or less those of all that are left out.
    """
    xp = array_namespace(features)
    rows, targets, root = _weighted(features, belongs)
    n, dim = features.shape
    penalty = xp.exp(log_penalty) * xp.eye(min(n, dim), dtype=features.dtype, device=device(features))
    if n <= dim:
        inverse = xp.linalg.inv(rows @ rows.T + penalty)
        places = xp.arange(n, device=device(features))

        def among_few(places: Array, solved: Array) -> Array:
            block = places[:, :, None] * n + places[:, None, :]
            taken = xp.take(xp.reshape(inverse, (n * n,)), xp.reshape(block, (-1,)), axis=0)
            return xp.linalg.solve(xp.reshape(taken, block.shape), solved)

        error = by_thing(things, among_few, places, inverse @ targets)
    else:
        turned = rows @ xp.linalg.inv(rows.T @ rows + penalty)  # [n, dim]

        def among_many(rows: Array, turned: Array, error: Array) -> Array:
            unit = xp.eye(rows.shape[1], dtype=rows.dtype, device=device(rows))
            return xp.linalg.solve(unit - rows @ xp.matrix_transpose(turned), error)

        error = by_thing(things, among_many, rows, turned, targets - rows @ (turned.T @ targets))
    return (targets - error) / root


def _weighted(features: Array, belongs: Array) -> tuple[Array, Array, Array]:
    """Rows and targets of the least squares, and the square root of what each row weighs [n, 1]."""
    xp = array_namespace(features)
    way = belongs.shape[1]
    counts = xp.sum(belongs, axis=0)
    each = xp.sum(belongs, axis=1)[:, None]
    root = xp.sqrt(each_own(belongs, xp.sum(counts) / (way * counts)))[:, None]
    targets = belongs / xp.maximum(each, xp.full_like(each, 1e-9)) - 1 / way
    return features * root, targets * root, root
