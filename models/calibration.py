"""The temperature of a learner as a function of way and shot.

Guo et al., "On Calibration of Modern Neural Networks", 2017, https://arxiv.org/abs/1706.04599: one number that divides
the logits makes probabilities honest. Here it is smooth in the size of the task, so that it also holds for sizes that
were not seen when it was fitted. Knows nothing of how it is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.head import Affine


@dataclass(frozen=True, slots=True)
class Temperature:
    """log T = constant + by_way log(way) + by_shot log(mean shots)."""

    constant: float = 0.0
    by_way: float = 0.0
    by_shot: float = 0.0

    def at(self, way: int, shots: Sequence[int]) -> float:
        mean = sum(shots) / len(shots)
        return math.exp(self.constant + self.by_way * math.log(way) + self.by_shot * math.log(mean))

    def fold(self, affine: Affine, shots: Sequence[int]) -> Affine:
        """The same map with calibrated logits."""
        temperature = self.at(len(shots), shots)
        return Affine(affine.weight / temperature, affine.bias / temperature)
