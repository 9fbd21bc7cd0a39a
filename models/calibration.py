"""What makes a learner's numbers honest: a temperature, and how surely an image shows one of the classes at all.

Guo et al., "On Calibration of Modern Neural Networks", 2017, https://arxiv.org/abs/1706.04599: one number that divides
the logits makes probabilities honest. Here it is smooth in the size of the task, so that it also holds for sizes that
were not seen when it was fitted.

Liu et al., "Energy-based Out-of-distribution Detection", 2020, https://arxiv.org/abs/2010.03759: an image of no class
scores low with all of them, which the log-sum of the exponentials of its logits shows and their softmax hides. What
is low differs from task to task, so the energy is read against what the task's own examples score when they are held
out. Knows nothing of how the numbers are fitted.

A task of another kind than those that the numbers were fitted on may be harder than it looks. Where its own examples,
held out, are answered worse than their logits claim, all of its logits are divided by more: see `divisor`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

CAUTION = 10.0  # examples that the temperature counts as much as, against those of a task
MOST = 3.0  # that the logarithm of a temperature is raised by
MOST_ASKED = 200  # examples are enough, and of a large task every so many are asked


@dataclass(frozen=True, slots=True)
class Temperature:
    """log T = constant + by_way log(way) + by_shot log(mean shots)."""

    constant: float = 0.0
    by_way: float = 0.0
    by_shot: float = 0.0

    def at(self, way: int, shots: Sequence[int]) -> float:
        mean = sum(shots) / len(shots)
        return math.exp(self.constant + self.by_way * math.log(way) + self.by_shot * math.log(mean))


def divisor(temperature: float, held_out: np.ndarray, truth: np.ndarray) -> float:
    """What all logits of a task are divided by: the temperature for its size, or more, going by its own examples.

    held_out [m, way], of examples that the map was not made from, and their classes [m]; without any it is the
    temperature. How much more is the most likely one if its logarithm is normal around 0, with a precision of CAUTION.
    Never less: examples may show one thing twice, and are then answered better than questions will be.
    """
    step = -(-len(truth) // MOST_ASKED) or 1
    logits, truth = held_out[::step].astype(np.float64) / temperature, truth[::step]
    rows = np.arange(len(truth))

    def slope(log_by: float) -> float:
        """Of the loss by the logarithm: below zero where more is better."""
        scaled = logits * math.exp(-log_by)
        shares = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return float((scaled[rows, truth] - (shares * scaled).sum(axis=1)).sum()) + CAUTION * log_by

    if not len(rows) or slope(0.0) >= 0:
        return temperature
    low, high = 0.0, MOST
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return temperature * math.exp(low)


def energy(logits: np.ndarray) -> np.ndarray:
    """Log of the sum of the exponentials of each row: [n, way] -> [n]."""
    # logaddexp.reduce is quicker for one row and takes fifteen times as long for a thousand. One way for all: an image
    # is answered alone as it is among others.
    most = logits.max(axis=1)
    return np.asarray(most + np.log(np.exp(logits - most[:, None]).sum(axis=1)))


def size_of(shots: Sequence[int], energies: np.ndarray) -> np.ndarray:
    """What the spread of genuine energies in a task is read from: [5]."""
    mean, deviation = float(energies.mean()), float(energies.std())
    return np.array([1.0, math.log(len(shots)), math.log(sum(shots) / len(shots)), mean, math.log(deviation + 0.1)])


@dataclass(frozen=True, slots=True)
class Rejection:
    """How the energies of images that do show one of the classes are spread, as a function of the task.

    Location and logarithm of the spread are linear in `size_of` the task, read from the support examples that could be
    held out or, in a one-shot task, from what each scores among the other classes. Where examples could be held out the
    spread is no less than `spread_own` says, likewise linear: as wide as those are, whatever tasks of its size are in
    the domain that the numbers were fitted on. `quantiles` are those of the standardised energies, from 0 to 1 in equal
    steps.
    """

    location: tuple[float, ...]  # [5]
    spread: tuple[float, ...]  # [5]
    location_one_shot: tuple[float, ...]  # [5]
    spread_one_shot: tuple[float, ...]  # [5]
    quantiles: tuple[float, ...]
    spread_own: tuple[float, ...] = ()  # [5]; of artifacts that were exported before there was such a bound, none

    def gauge(self, shots: Sequence[int], *, held_out: np.ndarray, rivals: np.ndarray) -> tuple[float, float]:
        """Location and spread of genuine energies in one task, from its calibrated logits.

        held_out [m, way]: of examples that the head was not made from; rivals [n, way - 1]: of every example, without
        its own class.
        """
        if len(held_out):
            size, location, spreads = size_of(shots, energy(held_out)), self.location, (self.spread, self.spread_own)
        else:
            size, location = size_of(shots, energy(rivals)), self.location_one_shot
            spreads = (self.spread_one_shot, ())
        log_spread = max(float(size @ np.array(spread)) for spread in spreads if spread)
        # Bounded, for an odd task may lie far from those that the numbers were fitted on.
        return float(size @ np.array(location)), math.exp(min(max(log_spread, -20), 20))

    def known(self, energies: np.ndarray, gauge: tuple[float, float]) -> np.ndarray:
        """The share of genuine images that would score lower than each: [n] in 0..1.

        To reject where it is below r is to turn away the share r of genuine images.
        """
        location, spread = gauge
        return np.asarray(np.interp((energies - location) / spread, *_curve(self.quantiles)))


@cache
def _curve(quantiles: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles and their shares as arrays: making them anew for every image would cost more than looking up."""
    return np.array(quantiles), np.linspace(0, 1, len(quantiles))
