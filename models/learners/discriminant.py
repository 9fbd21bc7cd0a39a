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

import numpy as np
from array_api_compat import array_namespace, device

from models import arrays
from models.arrays import Array, class_means, each_own, one_hot
from models.episode import Support
from models.head import Affine
from models.learners import prototype
from models.learners.once import Once
from models.learners.things import by_thing, sums
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

    def leave_out(self, support: Support, things: np.ndarray) -> Array:
        """Logits [n, way] of each example by the map made without its thing [n]; meaningless where its class shows no
        other."""
        return self._left_out(support, self._fit(support), things)

    def adapt_and_leave_out(self, support: Support, things: np.ndarray) -> tuple[Affine, Array]:
        """Both, from one fit."""
        fit = self._fit(support)
        return self._map(support, fit), self._left_out(support, fit, things)

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

    def _left_out(self, support: Support, fit: Fit, things: np.ndarray) -> Array:
        xp = array_namespace(support.features)
        others = prototype.others_of(fit.own, things)
        means, turned = fit.means, fit.apart(fit.away)
        towards = fit.apart(means)
        part = (1 / others)[:, None]
        mine = Centres(
            xp.take(means, support.labels, axis=0) - part * sums(things, fit.away),
            xp.take(towards, support.labels, axis=0) - part * sums(things, turned),
            self._sure(others),
        )
        rivals = Centres(means, towards, self._sure(xp.sum(fit.own, axis=0)))
        return xp.exp(self.log_scale) * scores_left_out(
            things, fit.features, fit.own, fit.away, turned, self.log_own, rivals, mine
        )

    def _sure(self, counts: Array) -> Array:
        """See whitened.offset."""
        xp = array_namespace(counts)
        return counts / (counts + xp.exp(self.log_noise))


def scores_left_out(
    things: np.ndarray,
    features: Array,
    own: Array,
    away: Array,
    turned: Array,
    log_own: Array,
    rivals: Centres,
    mine: Centres,
) -> Array:
    """Scores [n, way] of each example as if its thing had not been there; meaningless where its class shows no other.

    Without it its class has another centre, `mine` [n, ...] where those of all are `rivals` [way, ...], and the scatter
    is less by as many products of two vectors as the thing has rows, so that its inverse is known (Woodbury, 1950).
    `turned` is `away` times the inverse of the scatter of all.
    """
    xp = array_namespace(features)
    share, counts = xp.exp(log_own), each_own(own, xp.sum(own, axis=0))
    lengths = xp.sum(rivals.towards * rivals.at, axis=1)

    def scores(gain: Array, seen: Array, score: Array, cross: Array, length: Array, sure: Array) -> Array:
        """From what the map of all says, to what one with the lesser scatter says: [m, size, k] for k centres."""
        gained = gain @ cross
        return score + seen @ gained - 0.5 * sure * (length + xp.sum(cross * gained, axis=1, keepdims=True))

    def of_things(
        x: Array, own: Array, away: Array, turned: Array, counts: Array, score: Array, cross: Array, *centre: Array
    ) -> Array:
        size = x.shape[1]
        unit = xp.eye(size, dtype=x.dtype, device=device(x))
        # A thing that is all of its class would leave nothing to divide by.
        left = (1 + 1e-6) * unit - 1 / counts[:, :, None] - share * (away @ xp.matrix_transpose(turned))
        gain, seen = share * xp.linalg.inv(left), x @ xp.matrix_transpose(turned)
        theirs = scores(gain, seen, score, cross, lengths, rivals.sure)
        at, towards, sure = (part[:, :1] for part in centre)  # that of its class is the same for each row of a thing
        my_score, my_cross = (rows @ xp.matrix_transpose(to) for rows, to in ((x, towards), (turned, at)))
        length = xp.sum(towards * at, axis=2, keepdims=True)
        return theirs * (1 - own) + scores(gain, seen, my_score, my_cross, length, sure[:, :, None]) * own

    all_scores, across = features @ rivals.towards.T, turned @ rivals.at.T  # [n, way]
    return by_thing(things, of_things, features, own, away, turned, counts, all_scores, across, *mine)


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
