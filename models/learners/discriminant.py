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
from models.arrays import Array, class_means, one_hot
from models.episode import Support
from models.head import Affine
from models.learners import prototype
from models.learners.once import Once
from models.learners.whitened import whitening


class Fit(NamedTuple):
    transform: Array  # [dim, dim]
    features: Array  # [n, dim], transformed
    own: Array  # [n, way], classes one-hot
    means: Array  # [way, dim], of the labelled ones
    away: Array  # [n, dim], from the mean of the class
    apart: Callable[[Array], Array]  # see `inverse`


class Centres(NamedTuple):
    """What examples are compared with."""

    at: Array  # [k, dim]
    towards: Array  # [k, dim]: times the inverse of the scatter
    sure: Array  # [k]: how much of the length counts; see whitened.offset


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
        own = one_hot(support.labels, support.way, features)
        means = class_means(features, own)
        away = features - own @ means
        return Fit(transform, features, own, means, away, inverse(away, self.log_own))

    def _map(self, support: Support, fit: Fit) -> Affine:
        xp = array_namespace(support.features)
        if support.unlabelled is None or support.unlabelled.shape[0] == 0:
            means, counts = fit.means, xp.sum(fit.own, axis=0)
        else:
            means, counts = prototype.prototypes(support, fit.transform)
            means = means @ fit.transform
        weight = fit.apart(means)
        bias = -0.5 * xp.sum(weight * means, axis=1) * self._sure(counts)
        return Affine(xp.exp(self.log_scale) * (weight @ fit.transform.T), xp.exp(self.log_scale) * bias)

    def _left_out(self, support: Support, fit: Fit) -> Array:
        xp = array_namespace(support.features)
        counts = xp.sum(fit.own, axis=0)
        others = prototype.others_of(fit.own)
        means, turned = fit.means, fit.apart(fit.away)
        towards = fit.apart(means)
        part = (1 / others)[:, None]
        mine = Centres(
            xp.take(means, support.labels, axis=0) - part * fit.away,
            xp.take(towards, support.labels, axis=0) - part * turned,
            self._sure(others),
        )
        rivals = Centres(means, towards, self._sure(counts))
        return xp.exp(self.log_scale) * scores_left_out(
            fit.features, fit.own, fit.away, turned, self.log_own, rivals, mine
        )

    def _sure(self, counts: Array) -> Array:
        """See whitened.offset."""
        xp = array_namespace(counts)
        return counts / (counts + xp.exp(self.log_noise))


def scores_left_out(
    features: Array, own: Array, away: Array, turned: Array, log_own: Array, rivals: Centres, mine: Centres
) -> Array:
    """Scores [n, way] of each example as if it had not been there; meaningless where its class has no other.

    Without it its class has another centre, `mine` [n, ...] where those of all are `rivals` [way, ...], and the scatter
    is less by one product of a vector with itself, so that its inverse is known (Sherman and Morrison, 1950). `turned`
    is `away` times the inverse of the scatter of all.
    """
    xp = array_namespace(features)
    others = prototype.others_of(own)
    added = xp.exp(log_own) * (others + 1) / others
    factor = added / xp.maximum(1 - added * xp.sum(away * turned, axis=1), xp.full_like(added, 1e-6))
    seen = xp.sum(features * turned, axis=1)  # [n]

    def scores(factor: Array, seen: Array, score: Array, cross: Array, length: Array, sure: Array) -> Array:
        """From what the map of all says, to what one with the lesser scatter says."""
        return score + factor * seen * cross - 0.5 * sure * (length + factor * cross * cross)

    lengths = xp.sum(rivals.towards * rivals.at, axis=1)
    all_scores, across = features @ rivals.towards.T, turned @ rivals.at.T  # [n, way]
    theirs = scores(factor[:, None], seen[:, None], all_scores, across, lengths[None, :], rivals.sure[None, :])
    my_score, my_cross = xp.sum(features * mine.towards, axis=1), xp.sum(turned * mine.at, axis=1)
    ours = scores(factor, seen, my_score, my_cross, xp.sum(mine.towards * mine.at, axis=1), mine.sure)
    return theirs * (1 - own) + ours[:, None] * own


def inverse(away: Array, log_own: Array) -> Callable[[Array], Array]:
    """Rows [k, dim] times the inverse of identity plus scatter of `away` [n, dim]; by the smaller of its systems."""
    xp = array_namespace(away)
    n, dim = away.shape
    share = xp.exp(log_own)

    def unit(size: int) -> Array:
        return xp.eye(size, dtype=away.dtype, device=device(away))

    if n <= dim:
        inner = share * arrays.inverse(unit(n) + share * (away @ away.T))
        return lambda rows: rows - (rows @ away.T) @ inner @ away
    outer = arrays.inverse(unit(dim) + share * (away.T @ away))
    return lambda rows: rows @ outer
