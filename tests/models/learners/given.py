"""What the tests of learners start from: learned arrays and support sets, drawn from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.episode import Support
from models.learners import LEARNERS, Learner, build
from models.learners.lstm import EACH, SEEN, SHARED

DIM, HIDDEN, SLOTS = 16, 6, 12
METHODS = sorted(LEARNERS)
# How far what a learner says of examples left out may be from what it learns without them, of the largest: the penalty
# of ridge weighs as with all of them; and what the cell of the LSTM answers, it answers for all.
NEARLY = {"ridge": 0.2, "lstm": 0.35}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def arrays(method: str, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Learned arrays as after training: nothing in them is zero, so that no part of a learner lies idle."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, by: float = 1.0) -> np.ndarray:
        return by * rng.standard_normal(shape)

    basis = np.linalg.qr(normal(DIM, DIM))[0]
    spectrum = rng.uniform(0.2, 3.0, DIM)
    learned = {
        "prototype": {"log_scale": np.log(10.0)},
        "ridge": {"log_scale": np.log(8.0), "log_penalty": np.log(0.5)},
        "gradient": {"log_scale": np.log(10.0), "log_steps": np.log([0.3, 0.2, 0.1])},
        "whitened": {
            "basis": basis,
            "spectrum": spectrum / spectrum.mean(),
            "log_shrink": np.log(0.3),
            "log_scale": np.log(8.0),
            "log_noise": 0.3,
        },
    }
    learned["discriminant"] = {**learned["whitened"], "log_own": np.log(0.7)}
    learned["lstm"] = {
        **learned["discriminant"],
        "slots": unit(normal(SLOTS, DIM)),
        "log_lenses": np.log([0.1, 1.0, 10.0]),
        "log_focus": np.log(8.0),
        "inputs": normal(2 * SEEN, 4 * HIDDEN, by=0.3),
        "recur": normal(HIDDEN, 4 * HIDDEN, by=0.3),
        "offset": normal(4 * HIDDEN, by=0.3),
        "shared": normal(HIDDEN, SHARED, by=0.2),
        "each": normal(HIDDEN, EACH, by=0.2),
    }
    return {name: np.asarray(value, np.float32) for name, value in learned[method].items()}


def learner(method: str, **replaced: Any) -> Any:
    return build(method, {**arrays(method), **replaced})


def converted(found: Learner, convert: Callable[[np.ndarray], Any]) -> Any:
    """The same learner with its arrays of another kind."""
    fields = dataclasses.fields(found)  # type: ignore[arg-type]  # every learner is a dataclass
    return type(found)(**{field.name: convert(getattr(found, field.name)) for field in fields})


def clusters(
    shots: Sequence[int], *, queries: int = 0, unlabelled: int = 0, noise: float = 0.15, seed: int = 0
) -> tuple[Support, np.ndarray, np.ndarray]:
    """Gaussian clusters on the unit sphere, one per class: a support set of these shots, queries and their answers."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((len(shots), DIM)))

    def draw(labels: np.ndarray) -> np.ndarray:
        return unit(centres[labels] + noise * rng.standard_normal((len(labels), DIM))).astype(np.float32)

    labels = rng.permutation(np.repeat(np.arange(len(shots)), shots))
    answers = np.repeat(np.arange(len(shots)), queries)
    extra = draw(rng.integers(0, len(shots), unlabelled)) if unlabelled else None
    return Support(draw(labels), labels, len(shots), extra), draw(answers), answers
