"""Learners: a few labelled features -> an affine map. One protocol, one table, one way to load them.

A learner is a frozen dataclass of learned arrays and numbers and keeps nothing between calls, so any number of tasks
adapt at once and the same examples give the same map. Knows nothing of images, artifacts or requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from models.arrays import place
from models.episode import Support
from models.head import Affine
from models.learners.discriminant import Discriminant
from models.learners.gradient import Gradient
from models.learners.lstm import LSTM, NO_SCATTER
from models.learners.once import Once
from models.learners.prototype import Prototype
from models.learners.ridge import Ridge
from models.learners.whitened import Whitened


class Learner(Protocol):
    def adapt(self, support: Support) -> Affine: ...


LEARNERS: Mapping[
    str, type[Prototype] | type[Ridge] | type[Whitened] | type[Discriminant] | type[Gradient] | type[LSTM]
] = {
    "prototype": Prototype,
    "ridge": Ridge,
    "whitened": Whitened,
    "gradient": Gradient,
    "lstm": LSTM,
    "discriminant": Discriminant,
}

# What artifacts do not say that were exported before there was such an array.
EARLIER: Mapping[str, Mapping[str, np.ndarray]] = {"lstm": {"log_own": np.array(NO_SCATTER)}}


def build(method: str, arrays: Mapping[str, np.ndarray], *, device: str = "cpu") -> Learner:
    """The learner `method` with its learned arrays, on a device. Raises KeyError or TypeError if they do not fit."""
    kind = LEARNERS[method]
    arrays = {**EARLIER.get(method, {}), **arrays}
    names = {field.name for field in dataclasses.fields(kind)}
    if names != set(arrays):
        raise TypeError(f"The learner {method!r} needs {sorted(names)}, got {sorted(arrays)}.")
    values: dict[str, Any] = {name: place(value.astype(np.float32), device) for name, value in arrays.items()}
    made = kind(**values)
    return made.ready() if isinstance(made, Once) else made
