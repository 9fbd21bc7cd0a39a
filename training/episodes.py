"""Episodes: which images of which classes make one task. Frozen lists for evaluation, endless ones for training.

Two sources: classes with labels, and pseudo-tasks, where every image is a class of its own and its augmented views are
its examples (the idea of Hsu et al., 2018, https://arxiv.org/abs/1810.02334, and UMTRA, Khodadadeh et al., 2019,
https://arxiv.org/abs/1811.11819). Knows nothing of features or learners: it deals in indices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from training.folders import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Indices:
    """One episode as rows of a feature array."""

    support: np.ndarray  # [n]
    labels: np.ndarray  # [n] 0..way-1
    query: np.ndarray  # [q]
    answers: np.ndarray  # [q]
    way: int


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Rows of a feature array by class, and within a class by the thing they show."""

    classes: tuple[tuple[np.ndarray, ...], ...]  # class -> groups -> rows

    @classmethod
    def of(cls, labels: np.ndarray, groups: np.ndarray | None = None, names: Sequence[str] = ()) -> Pool:
        """`groups`: rows of one class with the same number, not negative, stay on one side of an episode.

        Raises DataError for a class of only one thing: an example would leave nothing to ask about. `names` of the
        classes are for that sentence.
        """
        found: list[tuple[np.ndarray, ...]] = []
        for label in range(int(labels.max()) + 1):
            rows = np.flatnonzero(labels == label)
            numbers = np.full(len(rows), -1) if groups is None else groups[rows]
            alone = rows[numbers < 0][:, None]
            together = [rows[numbers == number] for number in np.unique(numbers) if number >= 0]
            found.append((*alone, *together))
            if len(found[-1]) < 2:
                name = f"'{names[label]}'" if names else str(label)
                raise DataError(
                    f"Class {name} shows {len(found[-1])} thing{'s' * (not found[-1])}; an episode needs two of each "
                    "class."
                )
        return cls(tuple(found))

    def episode(
        self,
        rng: np.random.Generator,
        *,
        way: int,
        shots: np.ndarray,
        queries: int,
        chosen: np.ndarray | None = None,
        spread: bool = False,
    ) -> Indices:
        """`shots[k]` examples of class k and up to `queries` questions, at least one, of other groups.

        A class whose groups are too few gives fewer examples rather than share a group with the questions. Examples
        fill one group before the next; with `spread` they are of as many groups as they can be, as those of a person
        are: five views of one image are no five examples. Where each group is one row both are the same.
        """
        if chosen is None:
            chosen = rng.choice(len(self.classes), way, replace=False)
        support, labels, query, answers = [], [], [], []
        for label, index in enumerate(chosen):
            groups = self.classes[index]
            order = rng.permutation(len(groups))
            mine: list[int] = []
            if spread:
                at = min(int(shots[label]), len(groups) - 1)
                turns = [rng.permutation(groups[g]) for g in order[:at]]
                mine.extend(int(row) for turn in zip_longest(*turns) for row in turn if row is not None)
            else:
                at = 0
                while len(mine) < shots[label] and at < len(groups) - 1:
                    mine.extend(int(row) for row in rng.permutation(groups[order[at]]))
                    at += 1
            rest = np.concatenate([groups[g] for g in order[at:]])
            mine = mine[: shots[label]]
            asked = rng.permutation(rest)[:queries]
            support.extend(mine)
            labels.extend([label] * len(mine))
            query.extend(asked.tolist())
            answers.extend([label] * len(asked))
        return Indices(np.array(support), np.array(labels), np.array(query), np.array(answers), way)


def frozen(
    pool: Pool, *, way: int, shot: int, queries: int, count: int, seed: int, spread: bool = False
) -> list[Indices]:
    """The same list for the same arguments, for ever."""
    rng = np.random.default_rng([seed, way, shot, queries])
    shots = np.full(way, shot)
    return [pool.episode(rng, way=way, shots=shots, queries=queries, spread=spread) for _ in range(count)]


def digest(episodes: list[Indices]) -> str:
    """Names a list, so that two results can be known to stand on the same episodes."""
    hasher = hashlib.sha256()
    for episode in episodes:
        hasher.update(episode.support.astype(np.int64).tobytes() + episode.query.astype(np.int64).tobytes())
    return hasher.hexdigest()[:16]


def varied(
    pool: Pool,
    seed: int,
    step: int,
    *,
    count: int,
    max_way: int,
    max_shot: int,
    queries: int,
    near: np.ndarray | None = None,
) -> Iterator[Indices]:
    """Training episodes of one step: way and shots vary, shots also within a task.

    `near` [classes, classes] holds similarities of classes; with it every second episode takes classes that are alike,
    for the classes an extractor was trained on are too easy to tell apart.
    """
    rng = np.random.default_rng([seed, step])
    for number in range(count):
        way = int(rng.integers(2, min(max_way, len(pool.classes)) + 1))
        most = int(rng.integers(1, max_shot + 1))
        ragged = rng.random() < 0.5
        shots = rng.integers(1, most + 1, way) if ragged else np.full(way, most)
        chosen = None
        if near is not None and number % 2:
            first = int(rng.integers(len(pool.classes)))
            noisy = near[first] + rng.gumbel(scale=0.1, size=len(near))
            chosen = rng.permutation(np.argsort(-noisy)[:way])
        yield pool.episode(rng, way=way, shots=shots, queries=queries, chosen=chosen, spread=True)
