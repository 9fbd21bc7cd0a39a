"""What a support set says about itself: how well its task will do, which examples look wrong, and what to add.

Every example is classified by a head made without it (leave-one-out; in folds for learners that have no closed form of
it). An interval after Wilson, 1927, goes with the accuracy, for support sets are small. Knows nothing of images,
stores or requests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.arrays import fetch, softmax
from models.episode import Support
from models.head import Affine
from models.learners import Learner

FOLDS = 5
MOST_SUSPECTS = 10
ENOUGH, GOOD = 5, 10  # shots of a class


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Logits of support examples that the map was not made from."""

    index: np.ndarray  # [m] rows of the support set
    logits: np.ndarray  # [m, way]
    estimate: str  # "leave-one-out", "5-fold", or "none" when m is 0


@dataclass(frozen=True, slots=True)
class Confusion:
    label: str
    taken_for: str
    count: int


@dataclass(frozen=True, slots=True)
class Suspect:
    example: str
    label: str
    looks_like: str
    score: float  # probability of the other label


@dataclass(frozen=True, slots=True)
class Report:
    accuracy: float | None  # None when no example could be held out
    interval: tuple[float, float] | None  # 95 %
    estimate: str
    confusions: tuple[Confusion, ...]
    suspects: tuple[Suspect, ...]  # the surest first
    advice: str


def fitted(learner: Learner, support: Support) -> tuple[Affine, Callable[[], HeldOut]]:
    """The map of a support set, and what gives what `held_out` says of it; from one fit where the learner can."""
    index, both = _with_others(support), getattr(learner, "adapt_and_leave_one_out", None)
    if both is None or not len(index):
        return learner.adapt(support), lambda: held_out(learner, support)
    affine, logits = both(support)
    return affine, lambda: HeldOut(index, fetch(logits)[index], "leave-one-out")


def held_out(learner: Learner, support: Support) -> HeldOut:
    """Classifies each example of a class with two or more as if it had not been there. Unlabelled ones are not used."""
    index, closed_form = _with_others(support), getattr(learner, "leave_one_out", None)
    if not len(index):
        return HeldOut(index, np.zeros((0, support.way), np.float32), "none")
    if closed_form is not None:
        return HeldOut(index, fetch(closed_form(support))[index], "leave-one-out")
    labels = fetch(support.labels)
    counts = np.bincount(labels, minlength=support.way)
    turn = np.zeros(len(labels), int)
    for label in range(support.way):
        rows = np.flatnonzero(labels == label)
        turn[rows] = np.arange(len(rows)) % FOLDS
    logits = np.zeros((len(labels), support.way), np.float32)
    folds = range(min(FOLDS, int(counts.max())))
    for fold in folds:
        out = (turn == fold) & (counts[labels] > 1)
        kept = np.flatnonzero(~out)
        affine = learner.adapt(Support(support.features[kept], support.labels[kept], support.way))
        logits[out] = fetch(support.features[np.flatnonzero(out)] @ affine.weight.T + affine.bias)
    return HeldOut(index, logits[index], f"{len(folds)}-fold")


def _with_others(support: Support) -> np.ndarray:
    """The rows whose class has another example."""
    labels = fetch(support.labels)
    return np.flatnonzero(np.bincount(labels, minlength=support.way)[labels] > 1)


def without_own(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n, way] and classes [n] -> [n, way - 1]: each row without the entry of its own class."""
    n, way = logits.shape
    other = np.arange(way)[None, :] != labels[:, None]
    return np.asarray(logits[other].reshape(n, way - 1))


def report(held: HeldOut, *, classes: np.ndarray, labels: Sequence[str], ids: Sequence[str]) -> Report:
    """classes [n] of the support examples as indices into labels; ids [n]; the logits of `held` calibrated."""
    counts = np.bincount(classes, minlength=len(labels))
    few = _few(counts, labels)
    if not len(held.index):
        return Report(None, None, "none", (), (), few)
    probabilities = softmax(held.logits.astype(np.float64))
    truth, guess = classes[held.index], probabilities.argmax(axis=1)
    wrong = np.flatnonzero(guess != truth)
    pairs = Counter((int(truth[i]), int(guess[i])) for i in wrong)
    confusions = tuple(Confusion(labels[a], labels[b], n) for (a, b), n in pairs.most_common())
    surest = sorted(wrong, key=lambda i: -probabilities[i, guess[i]])[:MOST_SUSPECTS]
    suspects = tuple(
        Suspect(ids[held.index[i]], labels[truth[i]], labels[guess[i]], round(float(probabilities[i, guess[i]]), 4))
        for i in surest
    )
    right = len(truth) - len(wrong)
    return Report(
        round(right / len(truth), 4),
        wilson(right, len(truth)),
        held.estimate,
        confusions,
        suspects,
        _advice(suspects, confusions, few, counts),
    )


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share."""
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4)


def _few(counts: np.ndarray, labels: Sequence[str]) -> str:
    """What to say of classes with few examples; empty when none has."""
    fewest = int(counts.argmin())
    if counts[fewest] >= ENOUGH:
        return ""
    missing = ENOUGH - int(counts[fewest])
    return f"Add {missing} more of {labels[fewest]!r}: {int(counts[fewest])} is few, {ENOUGH} make a task dependable."


def _advice(suspects: Sequence[Suspect], confusions: Sequence[Confusion], few: str, counts: np.ndarray) -> str:
    if suspects and suspects[0].score >= 0.8 and counts.min() > 2:
        first = suspects[0]
        return f"Look at example {first.example} of {first.label!r}: it looks like {first.looks_like!r}."
    if few:
        return few
    if confusions:
        first_pair = confusions[0]
        return (
            f"Add examples of {first_pair.label!r} and {first_pair.taken_for!r} that show how they differ: "
            f"the one is taken for the other."
        )
    if counts.min() < GOOD:
        return "Ready to use. More examples, taken where it will be used, make it surer."
    return "Ready to use."
