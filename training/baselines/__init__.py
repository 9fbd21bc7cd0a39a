"""Baselines: other ways to learn from a few images, measured on the episodes that our learners are measured on.

A method a file, a paper a docstring; `training/baseline.py` is the command. None of them is served: they adapt a whole
network, or read the questions together, and are here to be compared with. Each module has `Settings`, a frozen
dataclass with what was published, and a class that is built from them and from what is `Given`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from models.artifact import Artifact
from training.episodes import Pool

Answers = Callable[[np.ndarray], np.ndarray]
"""uint8 questions [q, H, W, C] -> their classes [q]."""


@dataclass(frozen=True, slots=True)
class Given:
    """What every method is built from."""

    way: int
    shot: int
    size: int
    channels: int
    seed: int
    artifact: Artifact | None = None


class Baseline(Protocol):
    labels: str  # of the classes trained on, that were read: "none" or "training classes"

    def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Mapping[str, Answers]:
        """Learns from uint8 images [n, H, W, C] with labels [n]; how to answer, by mode.

        "inductive": a question is answered as if it were alone. "transductive": all that are asked at once are used.
        """
        ...


class MetaTrained(Baseline, Protocol):
    """A baseline that is trained on tasks before it adapts. Step s depends on the seed, s and the state alone."""

    step: int
    steps: int

    def advance(self, pixels: np.ndarray, pool: Pool) -> float:
        """One outer step; returns its loss."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...
