"""Ridge regression onto the labels, in closed form.

Bertinetto et al., "Meta-learning with differentiable closed-form solvers", 2019, https://arxiv.org/abs/1805.08136: the
inner loop is least squares, solved exactly in the space of the examples or of the features, whichever is the smaller;
what is learned is how strongly to regularise. Classes weigh the same, however many examples each has.
"""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace, device

from models.arrays import Array, each_own, one_hot
from models.episode import Support
from models.head import Affine


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    log_scale: Array  # []
    log_penalty: Array  # []

    def adapt(self, support: Support) -> Affine:
        xp = array_namespace(support.features)
        belongs = one_hot(support.labels, support.way, support.features)
        weight = xp.exp(self.log_scale) * fit(support.features, belongs, self.log_penalty).T
        return Affine(weight, xp.zeros_like(weight[:, 0]))

    def leave_one_out(self, support: Support) -> Array:
        """Logits [n, way] of each example by the map made without it, classes weighing as they do with it."""
        xp = array_namespace(support.features)
        belongs = one_hot(support.labels, support.way, support.features)
        return xp.exp(self.log_scale) * left_out(support.features, belongs, self.log_penalty)


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


def left_out(features: Array, belongs: Array, log_penalty: Array) -> Array:
    """What `fit` without each of the examples says of it, [n, way], the others weighing as they do: no further fit.

    Allen, "The Relationship between Variable Selection and Data Augmentation and a Method for Prediction", 1974: the
    error is that of the fit to all, over one less the example's leverage.
    """
    xp = array_namespace(features)
    rows, targets, root = _weighted(features, belongs)
    n, dim = features.shape
    penalty = xp.exp(log_penalty) * xp.eye(min(n, dim), dtype=features.dtype, device=device(features))
    if n <= dim:
        inverse = xp.linalg.inv(rows @ rows.T + penalty)
        error = (inverse @ targets) / xp.linalg.diagonal(inverse)[:, None]
    else:
        solved = rows @ xp.linalg.inv(rows.T @ rows + penalty)  # [n, dim]
        leverage = xp.sum(rows * solved, axis=1)
        error = (targets - rows @ (solved.T @ targets)) / (1 - leverage)[:, None]
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
