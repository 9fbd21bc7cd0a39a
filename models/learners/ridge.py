"""Ridge regression onto the labels, in closed form.

Bertinetto et al., "Meta-learning with differentiable closed-form solvers", 2019, https://arxiv.org/abs/1805.08136: the
inner loop is least squares, solved exactly in the space of the examples or of the features, whichever is the smaller;
what is learned is how strongly to regularise. Classes weigh the same, however many examples each has.
"""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace, device

from models.arrays import Array, one_hot
from models.episode import Support
from models.head import Affine


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    log_scale: Array  # []
    log_penalty: Array  # []

    def adapt(self, support: Support) -> Affine:
        features = support.features
        xp = array_namespace(features)
        labels = one_hot(support.labels, support.way, features)
        n = features.shape[0]
        counts = xp.sum(labels, axis=0)
        root = xp.sqrt(labels @ (n / (support.way * counts)))[:, None]  # [n, 1], square root of the weights
        weighted = features * root
        targets = (labels - 1 / support.way) * root
        dim = features.shape[1]
        penalty = xp.exp(self.log_penalty) * xp.eye(min(n, dim), dtype=features.dtype, device=device(features))
        # The same solution either way; the smaller system of equations is the faster one.
        if n <= dim:
            solution = weighted.T @ xp.linalg.solve(weighted @ weighted.T + penalty, targets)  # [dim, way]
        else:
            solution = xp.linalg.solve(weighted.T @ weighted + penalty, weighted.T @ targets)
        weight = xp.exp(self.log_scale) * solution.T
        return Affine(weight, xp.zeros_like(weight[:, 0]))
