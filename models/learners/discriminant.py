"""Discriminant analysis with a remembered covariance and the task's own: as whitened.py, but the task may differ.

Directions in which examples of one class differ count less, and which those are is known from earlier tasks. Where a
task is of another kind than those, its own examples tell, the better the more there are: the scatter about their class
means is added to the remembered covariance, as in the posterior under an inverse Wishart prior. (Friedman,
"Regularized Discriminant Analysis", 1989, mixes the two covariances likewise; compare Bateni et al., "Improved Few-Shot
Visual Classification", 2020, https://arxiv.org/abs/1912.03432.) With one example a class there is no scatter, and this
is whitened.py, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from array_api_compat import array_namespace, device

from models import arrays
from models.arrays import Array, class_means, each_own, one_hot
from models.episode import Support
from models.head import Affine
from models.learners import prototype
from models.learners.once import Once
from models.learners.whitened import whitening


class Fit(NamedTuple):
    transform: Array  # [dim, dim]
    features: Array  # [n, dim], transformed
    means: Array  # [way, dim], of the labelled ones
    counts: Array  # [way]
    away: Array  # [n, dim], from the mean of the class
    apart: Callable[[Array], Array]  # see `inverse`


@dataclass(frozen=True, slots=True, eq=False)
class Discriminant(Once):
    basis: Array  # [dim, dim]; see `whitening`
    spectrum: Array  # [dim]
    log_shrink: Array  # []
    log_scale: Array  # []
    log_noise: Array  # []; see whitened.offset
    log_own: Array  # []; how much the task's scatter counts

    def work_out(self) -> Array:
        return whitening(self.basis, self.spectrum, self.log_shrink)

    def adapt(self, support: Support) -> Affine:
        return self._map(support, self._fit(support))

    def leave_one_out(self, support: Support) -> Array:
        """Logits [n, way] of each example by the map made without it; meaningless where its class has no other."""
        return self._left_out(support, self._fit(support))

    def adapt_and_leave_one_out(self, support: Support) -> tuple[Affine, Array]:
        """Both, from one fit."""
        fit = self._fit(support)
        return self._map(support, fit), self._left_out(support, fit)

    def _fit(self, support: Support) -> Fit:
        transform = self.worked_out
        features = support.features @ transform
        belongs = one_hot(support.labels, support.way, features)
        means = class_means(features, belongs)
        away = features - belongs @ means
        counts = array_namespace(belongs).sum(belongs, axis=0)
        return Fit(transform, features, means, counts, away, inverse(away, self.log_own))

    def _map(self, support: Support, fit: Fit) -> Affine:
        xp = array_namespace(support.features)
        if support.unlabelled is None or support.unlabelled.shape[0] == 0:
            means, counts = fit.means, fit.counts
        else:
            means, counts = prototype.prototypes(support, fit.transform)
            means = means @ fit.transform
        weight = fit.apart(means)
        bias = -0.5 * xp.sum(weight * means, axis=1) * self._sure(counts)
        return Affine(xp.exp(self.log_scale) * (weight @ fit.transform.T), xp.exp(self.log_scale) * bias)

    def _left_out(self, support: Support, fit: Fit) -> Array:
        """Without an example its class has another mean, and the scatter is less by one product of a vector with
        itself, so that its inverse is known (Sherman and Morrison, 1950)."""
        xp = array_namespace(support.features)
        features, away, apart = fit.features, fit.away, fit.apart
        own, means, others, _ = prototype.left_out(features, support)
        counts = xp.sum(own, axis=0)
        turned, towards = apart(away), apart(means)  # [n, dim], [way, dim]
        own_scatter = xp.sum(away * turned, axis=1)  # [n]
        seen = xp.sum(features * turned, axis=1)  # [n]
        across = turned @ means.T  # [n, way]
        added = xp.exp(self.log_own) * (others + 1) / others
        factor = added / xp.maximum(1 - added * own_scatter, xp.full_like(added, 1e-6))

        def logits(score: Array, cross: Array, length: Array, sure: Array) -> Array:
            """From what the map of all says, to what one with the lesser scatter says."""
            f = factor[:, None]
            return score + f * seen[:, None] * cross - 0.5 * sure * (length + f * cross * cross)

        scores, lengths = features @ towards.T, xp.sum(towards * means, axis=1)
        rivals = logits(scores, across, lengths[None, :], self._sure(counts))
        part = 1 / others
        mine_across = xp.sum(across * own, axis=1) - part * own_scatter
        mine_score = xp.sum(scores * own, axis=1) - part * seen
        mine_length = each_own(own, lengths) - 2 * part * xp.sum(across * own, axis=1)
        mine_length = mine_length + part * part * own_scatter
        mine = logits(mine_score[:, None], mine_across[:, None], mine_length[:, None], self._sure(others)[:, None])
        return xp.exp(self.log_scale) * (rivals * (1 - own) + mine * own)

    def _sure(self, counts: Array) -> Array:
        """See whitened.offset."""
        xp = array_namespace(counts)
        return counts / (counts + xp.exp(self.log_noise))


def inverse(away: Array, log_own: Array) -> Callable[[Array], Array]:
    """Rows [k, dim] times the inverse of identity plus scatter of `away` [n, dim]; by the smaller of its systems."""
    xp = array_namespace(away)
    n, dim = away.shape
    share = xp.exp(log_own)
    if n <= dim:
        inner = xp.eye(n, dtype=away.dtype, device=device(away)) + share * (away @ away.T)

        def apart(rows: Array) -> Array:
            return rows - share * (xp.linalg.solve(inner, away @ rows.T).T @ away)

    else:
        outer = arrays.inverse(xp.eye(dim, dtype=away.dtype, device=device(away)) + share * (away.T @ away))

        def apart(rows: Array) -> Array:
            return rows @ outer

    return apart
