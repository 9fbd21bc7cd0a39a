"""Features and a head -> answers: probabilities, how surely it is one of the classes, what it resembles.

Pure functions and their values. Knows nothing of stores, threads or HTTP, nor from which share of genuine images on one
is content to be told "none of these".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.calibration import Rejection, energy
from models.errors import FewshotError
from models.head import Head
from service.stores import Pointer, Record

NEAREST = 2  # support examples that an explanation names


@dataclass(frozen=True, slots=True)
class Near:
    """A support example that resembles an image."""

    example: str
    label: str
    similarity: float  # cosine of their features


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    probabilities: np.ndarray  # [way]
    known: float | None = None  # share of genuine images that look less like the classes; None: cannot be told
    nearest: tuple[Near, ...] = ()

    def is_none(self, reject: float) -> bool:
        return self.known is not None and self.known < reject


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    task: str | None
    pointer: Pointer | None
    head: Head
    head_id: str
    rows: list[Answer | FewshotError]  # for each image
    timings_ms: dict[str, float]

    def none_of_these(self, reject: float) -> int:
        """How many images show none of the classes, at that share of genuine images turned away."""
        return sum(isinstance(row, Answer) and row.is_none(reject) for row in self.rows)


def answered(
    features: np.ndarray, head: Head, rejection: Rejection | None, explain: Record | None = None
) -> list[Answer]:
    """An answer for each row of features [n, dim]; with the record it was learned from, explained."""
    logits = head.logits(features)
    energies = energy(logits)
    known: list[float | None] = [None] * len(features)
    if rejection is not None and head.gauge is not None:
        known = rejection.known(energies, head.gauge).tolist()
    near = nearest(features, explain) if explain is not None else [()] * len(features)
    return list(map(Answer, np.exp(logits - energies[:, None]), known, near))


def nearest(features: np.ndarray, record: Record) -> list[tuple[Near, ...]]:
    """The support examples that each image resembles most."""
    similarity = features @ record.features.astype(np.float32).T  # features have unit length
    return [
        tuple(
            Near(record.ids[i], record.labels[record.classes[i]], round(float(row[i]), 4))
            for i in np.argsort(-row)[:NEAREST]
        )
        for row in similarity
    ]
