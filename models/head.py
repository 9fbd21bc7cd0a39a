"""What was learned for one task: an affine map with its labels, an immutable value that travels as bytes.

Every head is `features @ weight.T + bias`; the calibrated temperature is already folded in. A weight is kept in one
byte, with a scale for each class, so it is rounded to that when the head is made and never again: a head answers the
same to the last bit before it is written and after it is read. The bytes are a line of JSON and then the numbers: bias,
scales, weights. Knows nothing of stores or learners.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models.arrays import Array, softmax

FORMAT = "fewshot-head-3"  # a head of another format counts as gone, and is made again
STEPS = 127  # that a weight can be from zero, to either side
MOST_STEP = float(np.finfo(np.float32).max) / 128


class Affine(NamedTuple):
    weight: Array  # [way, dim]
    bias: Array  # [way]


class HeadInvalid(Exception):
    """The bytes are no head; whoever reads a cache treats them as absent."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    affine: Affine  # numpy, float32, the weight rounded as it is kept
    labels: tuple[str, ...]  # row k of weight is labels[k]
    shots: tuple[int, ...]
    method: str
    artifact: str  # digest of the artifact whose features it reads
    gauge: tuple[float, float] | None = None  # where genuine images score, see models/calibration.py

    def __post_init__(self) -> None:
        # In one order of memory as well, whatever a learner gives: a product in another one may end in other bits.
        weight = np.ascontiguousarray(self.affine.weight, np.float32)
        scale = _scale(weight)
        object.__setattr__(self, "affine", Affine(_steps(weight, scale) * scale, self.affine.bias))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[n, dim] -> [n, way], calibrated."""
        return np.asarray(features @ self.affine.weight.T + self.affine.bias)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """[n, dim] -> [n, way], rows that sum to one."""
        return np.asarray(softmax(self.logits(features)))

    def to_bytes(self) -> bytes:
        weight, bias = self.affine
        text = {
            "format": FORMAT,
            "labels": self.labels,
            "shots": self.shots,
            "method": self.method,
            "artifact": self.artifact,
            "gauge": self.gauge,
            "shape": weight.shape,
        }
        scale = _scale(weight)
        line = json.dumps(text, separators=(",", ":")).encode() + b"\n"
        numbers = np.asarray(bias, "<f4"), np.asarray(scale, "<f4"), _steps(weight, scale)
        return b"".join((line, *(array.tobytes() for array in numbers)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Head:
        """Raises HeadInvalid unless format, shape, finiteness and counts all fit."""
        try:
            line, _, numbers = data.partition(b"\n")
            text = json.loads(line)
            labels, shots = tuple(text["labels"]), tuple(text["shots"])
            method, artifact = text["method"], text["artifact"]
            gauge = None if text["gauge"] is None else (float(text["gauge"][0]), float(text["gauge"][1]))
            way, dim = text["shape"]
            bias, scale = np.frombuffer(numbers, "<f4", 2 * way).reshape(2, way).astype(np.float32)
            steps = np.frombuffer(numbers, np.int8, offset=8 * way).reshape(way, dim)
            known = text["format"] == FORMAT
        except Exception as error:  # whatever is wrong with foreign bytes, they are no head
            raise HeadInvalid("The bytes are not a head.") from error
        fits = (
            known
            and way == len(labels) == len(shots) >= 2
            and dim > 0
            and all(isinstance(value, str) for value in (*labels, method, artifact))
            and all(isinstance(shot, int) for shot in shots)
            and bool(np.isfinite(bias).all() and (scale >= 0).all() and (scale < MOST_STEP).all())
            and (gauge is None or bool(np.isfinite(gauge).all() and gauge[1] > 0))
        )
        if not fits:
            raise HeadInvalid("The head's parts do not fit together.")
        return cls(Affine(steps * scale[:, None], bias), labels, shots, method, artifact, gauge)


def _scale(weight: np.ndarray) -> np.ndarray:
    """How long one step is in each row of float32 weights: [way, dim] -> [way, 1].

    It has 16 significant bits, so that a weight, which is up to 127 of them, has at most 23 and is exact: to round what
    is rounded changes nothing and finds the same steps again. Cut down rather than up, it leads past no largest number.
    """
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(STEPS)
    return np.asarray((scale.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32))


def _steps(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Weights as the nearest whole numbers of steps, int8; none where they are too small to have a step."""
    with np.errstate(invalid="ignore"):  # where a number is none, its row's scale is none, which tells
        steps = np.rint(weight / np.where(scale > 0, scale, np.float32(np.inf)))
        return np.asarray(np.clip(steps, -STEPS, STEPS).astype(np.int8))
