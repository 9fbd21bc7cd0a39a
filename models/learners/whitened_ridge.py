"""Ridge regression in the metric of a remembered covariance.

A penalty that is the same in all directions says that before an example is seen, any direction is as likely to tell the
classes apart as any other. Earlier tasks know better: directions in which examples of one class differ anyway are not
worth much. Penalised in the metric of the within-class covariance that is remembered (Tikhonov's general form; Hoerl
and Kennard, "Ridge Regression", 1970), one example a class gives whitened prototypes, and with each further one the
task's own examples say more. So it has what whitened.py has at one shot, and what a fit to the task has at many.
"""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace

from models.arrays import Array, class_means, one_hot
from models.episode import Support
from models.head import Affine
from models.learners.ridge import fit, left_out
from models.learners.unlabelled import shares, trust
from models.learners.whitened import whitening


@dataclass(frozen=True, slots=True, eq=False)
class WhitenedRidge:
    basis: Array  # [dim, dim]; see `whitening`
    spectrum: Array  # [dim]
    log_shrink: Array  # []
    log_scale: Array  # []
    log_penalty: Array  # []

    def adapt(self, support: Support) -> Affine:
        xp = array_namespace(support.features)
        transform = whitening(self.basis, self.spectrum, self.log_shrink)
        features = support.features @ transform
        belongs = one_hot(support.labels, support.way, features)
        if support.unlabelled is not None and support.unlabelled.shape[0]:
            others = support.unlabelled @ transform
            weights = shares(class_means(features, belongs), others) * trust(features, others)
            features, belongs = xp.concat([features, others]), xp.concat([belongs, weights])
        weight = xp.exp(self.log_scale) * (transform @ fit(features, belongs, self.log_penalty)).T
        return Affine(weight, xp.zeros_like(weight[:, 0]))

    def leave_one_out(self, support: Support) -> Array:
        """Logits [n, way] of each example by the map made without it, classes weighing as they do with it."""
        xp = array_namespace(support.features)
        features = support.features @ whitening(self.basis, self.spectrum, self.log_shrink)
        belongs = one_hot(support.labels, support.way, features)
        return xp.exp(self.log_scale) * left_out(features, belongs, self.log_penalty)
