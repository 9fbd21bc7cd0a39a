"""Prototypes, refined by unlabelled examples where there are any.

Snell, Swersky and Zemel, "Prototypical Networks for Few-shot Learning", 2017, https://arxiv.org/abs/1703.05175: a class
is the mean of its examples, a query belongs to the nearest mean; here by the cosine, which suits features of unit
length. Unlabelled examples move the means: see unlabelled.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device

from models.arrays import Array, class_means, each_own, normalise, one_hot
from models.episode import Support
from models.head import Affine
from models.learners.things import sums
from models.learners.unlabelled import shares, trust


def prototypes(support: Support, transform: Array | None = None) -> tuple[Array, Array]:
    """Class means [way, dim] and how many examples are behind each [way], unlabelled ones by their shares.

    transform [dim, dim] leads to the space in which unlabelled examples are compared; the means are in that of the
    features all the same.
    """
    features, unlabelled = support.features, support.unlabelled
    xp = array_namespace(features)
    labels = one_hot(support.labels, support.way, features)
    counts, sums = xp.sum(labels, axis=0), labels.T @ features
    if unlabelled is None or unlabelled.shape[0] == 0:
        return sums / counts[:, None], counts
    ours, theirs = (x if transform is None else x @ transform for x in (features, unlabelled))
    weights = shares(class_means(ours, labels), theirs) * trust(ours, theirs)  # [u, way]
    counts = counts + xp.sum(weights, axis=0)
    return (sums + weights.T @ unlabelled) / counts[:, None], counts


def others_of(own: Array, things: np.ndarray) -> Array:
    """[n]: how many others the class of each example [n, way] has that show something else; hardly any for none."""
    xp = array_namespace(own)
    _, number, sizes = np.unique(things, return_inverse=True, return_counts=True)
    same = xp.asarray(sizes[number], dtype=own.dtype, device=device(own))
    others = each_own(own, xp.sum(own, axis=0)) - same
    return xp.maximum(others, xp.full_like(others, 1e-6))


def left_out(features: Array, support: Support, things: np.ndarray) -> tuple[Array, Array, Array, Array]:
    """Classes of features [n, dim] one-hot [n, way], class means [way, dim], and for each example how many others its
    class has [n], see `others_of`, and their mean [n, dim], which means nothing where there are none."""
    xp = array_namespace(features)
    own = one_hot(support.labels, support.way, features)
    counts = xp.sum(own, axis=0)
    all_sums = own.T @ features
    others = others_of(own, things)
    without = xp.take(all_sums, support.labels, axis=0) - sums(things, features)
    return own, all_sums / counts[:, None], others, without / others[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Prototype:
    log_scale: Array  # []

    def adapt(self, support: Support) -> Affine:
        xp = array_namespace(support.features)
        scale = xp.exp(self.log_scale)
        weight = scale * normalise(prototypes(support)[0])
        return Affine(weight, xp.zeros_like(weight[:, 0]))

    def leave_out(self, support: Support, things: np.ndarray) -> Array:
        """Logits [n, way] of each example by the map made without its thing [n]; meaningless where its class shows no
        other."""
        features = support.features
        xp = array_namespace(features)
        own, means, _, without = left_out(features, support, things)
        rivals = features @ normalise(means).T
        mine = xp.sum(features * normalise(without), axis=-1)
        return xp.exp(self.log_scale) * (rivals * (1 - own) + mine[:, None] * own)
