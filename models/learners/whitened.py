"""Whitened prototypes: linear discriminant analysis with a remembered covariance.

Fisher's discriminant with the within-class covariance of earlier tasks, shrunk towards a multiple of the identity:
directions in which examples of one class differ anyway count less. From a few examples a covariance cannot be
estimated; from the training classes it can, and it holds for classes and domains never seen. (Compare Bateni et al.,
"Improved Few-Shot Visual Classification", 2020, https://arxiv.org/abs/1912.03432, which estimates it per task.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace

from models.arrays import Array, square_sum
from models.episode import Support
from models.head import Affine
from models.learners.once import Once
from models.learners.prototype import left_out, prototypes


def whitening(basis: Array, spectrum: Array, log_shrink: Array) -> Array:
    """[dim, dim] map under which the remembered within-class covariance is near the identity.

    basis [dim, dim] and spectrum [dim] are its eigenvectors (columns) and eigenvalues over their mean; the map is
    scaled so that a feature of unit length keeps about its length.
    """
    xp = array_namespace(basis)
    shrink = xp.exp(log_shrink)
    return basis * xp.sqrt((1 + shrink) / (spectrum + shrink))[None, :]


def offset(means: Array, counts: Array, log_noise: Array) -> Array:
    """What the length of each mean [way, dim] counts against its class, [way]; counts are the shots behind it.

    Half its square, as in a distance, would be right for the true mean. A mean of few examples is longer than that by
    chance, so it counts as shots / (shots + noise): hardly for one shot, almost wholly for many.
    """
    xp = array_namespace(means)
    return -0.5 * square_sum(means) * counts / (counts + xp.exp(log_noise))


@dataclass(frozen=True, slots=True, eq=False)
class Whitened(Once):
    basis: Array  # [dim, dim]
    spectrum: Array  # [dim]
    log_shrink: Array  # []
    log_scale: Array  # []
    log_noise: Array  # []; see `offset`

    def work_out(self) -> Array:
        return whitening(self.basis, self.spectrum, self.log_shrink)

    def adapt(self, support: Support) -> Affine:
        xp = array_namespace(support.features)
        scale = xp.exp(self.log_scale)
        transform = self.worked_out
        means, counts = prototypes(support, transform)
        means = means @ transform  # [way, dim]
        weight = scale * (means @ transform.T)
        return Affine(weight, scale * offset(means, counts, self.log_noise))

    def leave_out(self, support: Support, things: np.ndarray) -> Array:
        """Logits [n, way] of each example by the map made without its thing [n]; meaningless where its class shows no
        other."""
        xp = array_namespace(support.features)
        scale = xp.exp(self.log_scale)
        features = support.features @ self.worked_out
        own, means, others, without = left_out(features, support, things)
        rivals = features @ means.T + offset(means, xp.sum(own, axis=0), self.log_noise)[None, :]
        mine = xp.sum(features * without, axis=-1) + offset(without, others, self.log_noise)
        return scale * (rivals * (1 - own) + mine[:, None] * own)
