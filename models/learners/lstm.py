"""LSTM meta-learner with an external memory: one cell, shared by all classes, that corrects the prototypes.

Ravi and Larochelle, "Optimization as a Model for Few-Shot Learning", 2017, let an LSTM learn the update of a
classifier; Santoro et al., 2016, https://arxiv.org/abs/1605.06065, give a network a memory of earlier experience. Here
one LSTM state per class looks several times at the class's own examples, at the other classes and at the memory, and
then moves the whitened prototype towards or away from what it read. All outputs start at zero, so before training this
*is* the whitened prototype classifier. Reads are attention-weighted sums: the order of examples does not matter. The
cell is shared: no learned array has a `way` axis, and classes may be permuted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from array_api_compat import array_namespace, device

from models.arrays import Array, normalise, one_hot, sigmoid
from models.episode import Support
from models.head import Affine
from models.learners.memory import attend
from models.learners.prototype import prototypes
from models.learners.whitened import offset, whitening

READS = 4


@dataclass(frozen=True, slots=True, eq=False)
class LSTM:
    # The memory: the covariance of earlier classes and slots of their features.
    basis: Array  # [dim, dim]
    spectrum: Array  # [dim]
    log_shrink: Array  # []
    slots: Array  # [slots, dim]
    # The base classifier.
    log_scale: Array  # []
    log_noise: Array  # []
    # The cell. `hidden` is the length of its state, `small` that of projected features.
    project: Array  # [dim, small]
    ask: Array  # [hidden, 2 * small]: the state's part in the questions to the support and to the memory
    log_focus: Array  # [2]: how sharply the two are attended to
    inputs: Array  # [4 * small + 2, 4 * hidden]
    recur: Array  # [hidden, 4 * hidden]
    offset: Array  # [4 * hidden]
    # What is written; zero at the start.
    gates: Array  # [hidden, 5]
    free: Array  # [hidden, dim]

    def adapt(self, support: Support) -> Affine:
        features = support.features
        xp = array_namespace(features)
        way, hidden, small = support.way, self.recur.shape[0], self.project.shape[1]
        scale = xp.exp(self.log_scale)
        transform = whitening(self.basis, self.spectrum, self.log_shrink)
        examples = features @ transform  # [n, dim]
        slots = self.slots @ transform  # [slots, dim]
        means, counts = prototypes(support, transform)
        means = means @ transform  # [way, dim]

        labels = one_hot(support.labels, way, features)
        own_mask = labels.T  # [way, n]
        other_mask = 1 - xp.eye(way, dtype=features.dtype, device=device(features))

        example_keys = normalise(examples) @ self.project  # [n, small]
        slot_keys = normalise(slots) @ self.project
        mean_keys = normalise(means) @ self.project
        focus = xp.exp(self.log_focus)
        size = xp.stack([xp.log(counts), xp.full_like(counts, math.log(way))], axis=1)  # [way, 2]

        state = xp.zeros((way, hidden), dtype=features.dtype, device=device(features))
        cell = state
        own = others = recalled = means
        for _ in range(READS):
            questions = state @ self.ask  # [way, 2 * small]
            own = attend((mean_keys + questions[:, :small]) * focus[0], example_keys, examples, mask=own_mask)
            # The other classes are met through the nearest: the ones that may be confused with this one.
            others = attend(mean_keys * focus[0], mean_keys, means, mask=other_mask)
            recalled = attend((mean_keys + questions[:, small:]) * focus[1], slot_keys, slots)
            seen = xp.concat(
                [
                    mean_keys,
                    (own - means) @ self.project,
                    (others - means) @ self.project,
                    (recalled - means) @ self.project,
                    size,
                ],
                axis=1,
            )
            state, cell = self._step(seen, state, cell)

        gates = state @ self.gates  # [way, 5]
        corrected = (
            means
            + gates[:, 0:1] * (own - means)
            + gates[:, 1:2] * (recalled - means)
            + gates[:, 2:3] * (others - means)
            + state @ self.free
        )
        corrected = corrected * xp.exp(gates[:, 3:4])
        weight = scale * (corrected @ transform.T)
        bias = scale * (offset(corrected, counts, self.log_noise) + gates[:, 4])
        return Affine(weight, bias)

    def _step(self, seen: Array, state: Array, cell: Array) -> tuple[Array, Array]:
        """One step of the cell (Hochreiter and Schmidhuber, 1997), class by class: [way, ...] -> [way, hidden]."""
        xp = array_namespace(seen)
        hidden = self.recur.shape[0]
        total = seen @ self.inputs + state @ self.recur + self.offset
        keep = sigmoid(total[:, :hidden])
        write = sigmoid(total[:, hidden : 2 * hidden])
        show = sigmoid(total[:, 2 * hidden : 3 * hidden])
        cell = keep * cell + write * xp.tanh(total[:, 3 * hidden :])
        return show * xp.tanh(cell), cell
