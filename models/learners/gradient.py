"""Gradient descent from the prototypes, with learned step sizes: the inner loop of MAML and Reptile on a head.

Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017, https://arxiv.org/abs/1703.03400, and Li et al.,
"Meta-SGD", 2017, https://arxiv.org/abs/1707.09835: a few steps on the support set, from a start and with step sizes
that the outer loop learned. On frozen features a learned start shared by all classes cancels in the softmax, so the
start is the prototypes. The gradient of a linear softmax classifier is in closed form, so serving needs no autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace

from models.arrays import Array, each_own, normalise, one_hot, softmax
from models.episode import Support
from models.head import Affine
from models.learners.prototype import prototypes


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    log_scale: Array  # []
    log_steps: Array  # [steps]

    def adapt(self, support: Support) -> Affine:
        features = support.features
        xp = array_namespace(features)
        scale = xp.exp(self.log_scale)
        labels = one_hot(support.labels, support.way, features)
        # Every class weighs the same, however many examples it has.
        share = each_own(labels, 1 / (support.way * xp.sum(labels, axis=0)))  # [n]
        weight = scale * normalise(prototypes(support)[0])
        bias = xp.zeros_like(weight[:, 0])
        steps = xp.exp(self.log_steps)
        for step in range(self.log_steps.shape[0]):
            error = (softmax(features @ weight.T + bias) - labels) * share[:, None]  # [n, way]
            weight = weight - steps[step] * support.way * (error.T @ features)
            bias = bias - 0.1 * steps[step] * support.way * xp.sum(error, axis=0)
        return Affine(weight, bias)
