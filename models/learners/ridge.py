"""Ridge regression onto the labels, in closed form.

Bertinetto et al., "Meta-learning with differentiable closed-form solvers", 2019, https://arxiv.org/abs/1805.08136: the
inner loop is least squares, solved exactly in the space of the examples, so a few examples of many features cost
little; what is learned is how strongly to regularise. Classes weigh the same, however many examples each has.
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
        eye = xp.eye(n, dtype=features.dtype, device=device(features))
        gram = weighted @ weighted.T + xp.exp(self.log_penalty) * eye
        solution = weighted.T @ xp.linalg.solve(gram, targets)  # [dim, way]
        weight = xp.exp(self.log_scale) * solution.T
        return Affine(weight, xp.zeros_like(weight[:, 0]))
