"""What a support set says about itself: how well its task will do, which examples look wrong, and what to add.

Every example is classified by a head made without it (leave-one-out; in folds for learners that have no closed form of
it), and without its twins, if it has any: it would be answered by its likes, and better than questions are. An interval
after Wilson, 1927, goes with the accuracy, for support sets are small. Knows nothing of images,
stores or requests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from models.arrays import fetch, softmax
from models.episode import Support
from models.head import Affine
from models.learners import Learner
from models.twins import doubles, units

FOLDS = 5
MOST_SUSPECTS = 10
ENOUGH, GOOD = 5, 10  # shots of a class
MANY_TWINS = 0.3  # of all examples
MANY = 200  # examples of a task, from which on each fit more is felt
MANY_WRONG = 0.25  # of what was held out


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Logits of support examples that the map was not made from."""

    index: np.ndarray  # [m] rows of the support set
    logits: np.ndarray  # [m, way]
    estimate: str  # "leave-one-out", "5-fold", or "none" when m is 0
    twins: tuple[tuple[int, ...], ...] = ()  # rows that show one thing, and were held out together
    doubles: tuple[tuple[int, ...], ...] = ()  # rows that are the same under several labels


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
    twins: tuple[tuple[str, ...], ...] = ()  # examples that seem to show one thing, and count as one here
    doubles: tuple[tuple[str, ...], ...] = ()  # examples that look the same and have several labels


def fitted(learner: Learner, support: Support, *, near: float = 0.0) -> tuple[Affine, Callable[[], HeldOut]]:
    """The map of a support set, and what gives what `held_out` says of it; from one fit where the learner can."""
    both = getattr(learner, "adapt_and_leave_out", None)
    if both is None or np.bincount(fetch(support.labels)).max() < 2:  # of single examples none can be left out
        return learner.adapt(support), lambda: held_out(learner, support, near=near)
    shown = _shown(support, near)
    affine, logits = both(support, shown.things)
    return affine, lambda: _held(learner, support, shown, lambda: logits)


def held_out(learner: Learner, support: Support, *, near: float = 0.0) -> HeldOut:
    """Classifies each example of a class that shows two things or more as if it, and its twins, had not been there.

    `near`: the squared distance that twins have at most, see twins.py. Unlabelled ones are not used.
    """
    shown = _shown(support, near)
    closed_form = getattr(learner, "leave_out", None)
    return _held(learner, support, shown, closed_form and (lambda: closed_form(support, shown.things)))


class _Shown(NamedTuple):
    """What the rows of a support set show."""

    place: np.ndarray  # [n]: of its thing among those of its class
    things: np.ndarray  # [n]: the number of its thing among all
    twins: tuple[tuple[int, ...], ...]
    left: np.ndarray  # [m]: rows that can be held out


def _shown(support: Support, near: float) -> _Shown:
    labels = fetch(support.labels)
    place = units(fetch(support.features), labels, support.way, near=near)
    in_class = np.zeros(support.way, int)
    np.maximum.at(in_class, labels, place + 1)
    _, things, counts = np.unique(labels * len(labels) + place, return_inverse=True, return_counts=True)
    twins = tuple(sorted(tuple(np.flatnonzero(things == k).tolist()) for k in np.flatnonzero(counts > 1)))
    return _Shown(place, things, twins, np.flatnonzero(in_class[labels] > 1))


def _held(learner: Learner, support: Support, shown: _Shown, closed_form: Callable[[], Any] | None) -> HeldOut:
    labels, index = fetch(support.labels), shown.left
    same = doubles(fetch(support.features), labels)
    if not len(index):
        return HeldOut(index, np.zeros((0, support.way), np.float32), "none", shown.twins, same)
    logits, again = np.zeros((len(labels), support.way), np.float32), index
    if closed_form is not None:
        logits[:] = fetch(closed_form())
        twin = np.isin(index, [row for rows in shown.twins for row in rows])
        # Where some things are shown again, more of them are so than are told. Of few examples those are therefore held
        # out with others of all classes, which says less than one thing by itself does, and less that is not so.
        again = index[twin & (len(labels) < MANY)]
    for fold in range(FOLDS):
        out = again[shown.place[again] % FOLDS == fold]
        if len(out):
            kept = np.setdiff1d(np.arange(len(labels)), out)
            affine = learner.adapt(Support(support.features[kept], support.labels[kept], support.way))
            logits[out] = fetch(support.features[out] @ affine.weight.T + affine.bias)
    folds = min(FOLDS, int(shown.place[index].max()) + 1)
    estimate = "leave-one-out" if closed_form is not None else f"{folds}-fold"
    return HeldOut(index, logits[index], estimate, shown.twins, same)


def without_own(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n, way] and classes [n] -> [n, way - 1]: each row without the entry of its own class."""
    n, way = logits.shape
    other = np.arange(way)[None, :] != labels[:, None]
    return np.asarray(logits[other].reshape(n, way - 1))


def report(held: HeldOut, *, classes: np.ndarray, labels: Sequence[str], ids: Sequence[str]) -> Report:
    """classes [n] of the support examples as indices into labels; ids [n]; the logits of `held` calibrated."""
    counts = np.bincount(classes, minlength=len(labels))
    weight = np.ones(len(classes))  # twins count as one between them
    for rows in held.twins:
        counts[classes[rows[0]]] -= len(rows) - 1
        weight[list(rows)] = 1 / len(rows)
    few = _few(counts, labels)
    twin_ids, double_ids = (
        tuple(tuple(ids[row] for row in rows[:MOST_SUSPECTS]) for rows in groups[:MOST_SUSPECTS])
        for groups in (held.twins, tuple(_first_of_each(rows, classes) for rows in held.doubles))
    )
    twice, alike = _twice(held, classes, labels, ids), _alike(held, classes, labels)
    if not len(held.index):
        return Report(None, None, "none", (), (), twice or alike or few, twin_ids, double_ids)
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
    things = float(weight[held.index].sum())
    right = things - float(weight[held.index[wrong]].sum())
    interval = wilson(right, things)
    # Perhaps no better than by chance: then it is not the label of one example that is wrong.
    failed = interval[0] <= 1 / len(labels) and right < (1 - MANY_WRONG) * things
    return Report(
        round(right / things, 4),
        interval,
        held.estimate,
        confusions,
        suspects,
        twice or _advice(suspects, confusions, alike or few, counts, failed),
        twin_ids,
        double_ids,
    )


def wilson(right: float, n: float, z: float = 1.96) -> tuple[float, float]:
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


def _first_of_each(rows: Sequence[int], classes: np.ndarray) -> tuple[int, ...]:
    """Rows, one of each class before any other."""
    ahead = {int(classes[row]): row for row in reversed(rows)}
    return tuple(sorted(rows, key=lambda row: (ahead[int(classes[row])] != row, row)))


def _twice(held: HeldOut, classes: np.ndarray, labels: Sequence[str], ids: Sequence[str]) -> str:
    """What to say where one picture has several labels; empty where none has."""
    if not held.doubles:
        return ""
    one, other = next(
        (row, further) for row in held.doubles[0] for further in held.doubles[0] if classes[row] != classes[further]
    )
    return (
        f"Example {ids[one]} of {labels[classes[one]]!r} looks exactly like {ids[other]} of "
        f"{labels[classes[other]]!r}: take back the one whose label is wrong."
    )


def _alike(held: HeldOut, classes: np.ndarray, labels: Sequence[str]) -> str:
    """What to say where twins are many; empty where they are few."""
    twins = sum(len(rows) for rows in held.twins)
    if twins < MANY_TWINS * len(classes):
        return ""
    most = Counter(int(classes[rows[0]]) for rows in held.twins for _ in rows).most_common(1)[0][0]
    return (
        f"{twins} of {len(classes)} examples look like another of their class, as frames of one burst do, above all "
        f"of {labels[most]!r}: they tell little more than one of them would. Add different ones."
    )


def _advice(
    suspects: Sequence[Suspect], confusions: Sequence[Confusion], few: str, counts: np.ndarray, failed: bool
) -> str:
    if failed and counts.min() > 2:
        both_ways: Counter[tuple[str, ...]] = Counter()
        for item in confusions:
            both_ways[tuple(sorted((item.label, item.taken_for)))] += item.count
        one, other = both_ways.most_common(1)[0][0]
        return f"{one!r} and {other!r} cannot be told apart from these examples: add ones that show how they differ."
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
