"""What was learned for one task: an affine map with its labels, an immutable value that travels as bytes.

Every head is `features @ weight.T + bias`; the calibrated temperature is already folded in. The bytes are
safetensors with the text in the header: no code, and a person can read them. Knows nothing of stores or learners.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from models.arrays import Array, softmax

FORMAT = "fewshot-head-2"  # a head of another format counts as gone, and is made again


class Affine(NamedTuple):
    weight: Array  # [way, dim]
    bias: Array  # [way]


class HeadInvalid(Exception):
    """The bytes are no head; whoever reads a cache treats them as absent."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    affine: Affine  # numpy, float32
    labels: tuple[str, ...]  # row k of weight is labels[k]
    shots: tuple[int, ...]
    method: str
    artifact: str  # digest of the artifact whose features it reads
    gauge: tuple[float, float] | None = None  # where genuine images score, see models/calibration.py

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[n, dim] -> [n, way], calibrated."""
        return np.asarray(features @ self.affine.weight.T + self.affine.bias)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """[n, dim] -> [n, way], rows that sum to one."""
        return np.asarray(softmax(self.logits(features)))

    def to_bytes(self) -> bytes:
        text = {
            "format": FORMAT,
            "labels": self.labels,
            "shots": self.shots,
            "method": self.method,
            "artifact": self.artifact,
            "gauge": self.gauge,
        }
        # safetensors writes the memory behind a view as it lies there: a transposed one would come back scrambled.
        arrays = {name: np.ascontiguousarray(value) for name, value in self.affine._asdict().items()}
        # One entry holds all text: of several, the order in the file would differ from call to call.
        return save(arrays, metadata={"head": json.dumps(text)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Head:
        """Raises HeadInvalid unless format, shapes, dtypes, finiteness and counts all fit."""
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            text = json.loads(header["__metadata__"]["head"])
            arrays = load(data)
            labels, shots = tuple(text["labels"]), tuple(text["shots"])
            weight, bias = arrays["weight"], arrays["bias"]
            method, artifact = text["method"], text["artifact"]
            gauge = None if text["gauge"] is None else (float(text["gauge"][0]), float(text["gauge"][1]))
            known = text["format"] == FORMAT
        except Exception as error:  # whatever is wrong with foreign bytes, they are no head
            raise HeadInvalid("The bytes are not a head.") from error
        fits = (
            known
            and weight.dtype == bias.dtype == np.float32
            and weight.ndim == 2
            and bias.shape == (len(labels),)
            and weight.shape[0] == len(labels) == len(shots) >= 2
            and all(isinstance(value, str) for value in (*labels, method, artifact))
            and all(isinstance(shot, int) for shot in shots)
            and bool(np.isfinite(weight).all() and np.isfinite(bias).all())
            and (gauge is None or bool(np.isfinite(gauge).all() and gauge[1] > 0))
        )
        if not fits:
            raise HeadInvalid("The head's parts do not fit together.")
        return cls(Affine(weight, bias), labels, shots, method, artifact, gauge)
