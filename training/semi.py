"""What unlabelled examples are worth: the same questions after adapting without and with them, paired.

The protocol of Ren et al., "Meta-Learning for Semi-Supervised Few-Shot Classification", 2018,
https://arxiv.org/abs/1803.00676: beside its examples and questions an episode has some unlabelled images of each of its
classes, and as many of each of some classes that it does not know, the distractors. In the paper a share of the images
of each class is labelled for good: examples and questions are drawn from it, unlabelled images from the others; with a
share of 1 each episode deals them anew. The mean says what is gained; the worst tenth of the tasks says what it may
cost. Knows nothing of how unlabelled examples are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.learners import Learner
from training import evaluate
from training.config import EvaluateConfig
from training.episodes import Indices, Pool, digest, frozen
from training.folders import DataError
from training.intervals import interval


@dataclass(frozen=True, slots=True)
class SemiRow:
    """One learner at one size of task; per cent, intervals are half the width of those of 95 %."""

    data: str
    split: str
    method: str
    way: int
    shot: int
    unlabelled: int  # of each class
    distractors: int  # classes
    only_distractors: bool
    labelled: int  # per cent of the images of each class
    accuracy: float  # with the unlabelled
    interval: float
    supervised: float  # without them
    supervised_interval: float
    gain: float
    gain_interval: float
    tenth: float  # one task in ten gains less than this
    worst_tenth: float  # what the worst tenth of the tasks gain on average
    episodes: int
    queries: int
    seed: int
    episode_list: str
    precision: str


def split(
    episode: Indices, way: int, queries: int, things: np.ndarray, *, only_distractors: bool = False
) -> tuple[Indices, np.ndarray]:
    """The episode of the first `way` classes with at most `queries` questions each, and the unlabelled rows [u].

    `things` [rows]: what each row shows; none that is asked about is among the unlabelled.
    """
    mine = episode.labels < way
    asked: list[np.ndarray] = []
    extra: list[np.ndarray] = []
    for label in range(episode.way):
        rows = episode.query[episode.answers == label]
        if label < way:
            asked.append(rows[:queries])
        if label >= way or not only_distractors:
            rest = rows[queries:]
            extra.append(rest[~np.isin(things[rest], things[rows[:queries]])] if label < way else rest)
    answers = np.repeat(np.arange(way), [len(rows) for rows in asked])
    own = Indices(episode.support[mine], episode.labels[mine], np.concatenate(asked), answers, way)
    return own, np.concatenate(extra)


def _things(rows: int, classes: Iterable[tuple[np.ndarray, ...]]) -> np.ndarray:
    found = np.full(rows, -1)
    for number, group in enumerate(group for groups in classes for group in groups):
        found[group] = number
    return found


def drawn(pool: Pool, unlabelled: Pool | None, way: int, shot: int, config: EvaluateConfig) -> list[Indices]:
    """The frozen episodes; their questions and unlabelled rows as `split` takes them apart, class by class."""
    queries = config.queries + (0 if unlabelled else config.unlabelled)
    episodes = frozen(
        pool, way=way, shot=shot, queries=queries, count=config.episodes, seed=config.seed, spread=config.spread
    )
    if unlabelled is None:
        return episodes
    class_of = {int(row): label for label, groups in enumerate(pool.classes) for rows in groups for row in rows}
    others = [np.concatenate(groups) for groups in unlabelled.classes]
    rng = np.random.default_rng([config.seed, way, shot, config.unlabelled])
    return [_with_others(episode, class_of, others, config, rng) for episode in episodes]


def _with_others(
    episode: Indices,
    class_of: Mapping[int, int],
    others: Sequence[np.ndarray],
    config: EvaluateConfig,
    rng: np.random.Generator,
) -> Indices:
    """The episode with up to `config.unlabelled` rows of `others` behind the questions of each class.

    Raises DataError where a class has too few labelled images to ask about: unlabelled ones would be taken for them.
    """
    query, answers = [], []
    for label in range(episode.way):
        asked = episode.query[episode.answers == label]
        if len(asked) < config.queries:
            raise DataError(
                f"--labelled leaves {len(asked)} images of a class to ask about: --queries {config.queries}."
            )
        rows = rng.permutation(others[class_of[int(asked[0])]])[: config.unlabelled]
        query += [asked, rows]
        answers.append(np.full(len(asked) + len(rows), label))
    return replace(episode, query=np.concatenate(query), answers=np.concatenate(answers))


def measure(
    learners: Mapping[str, Learner],
    features: np.ndarray,
    pool: Pool,
    config: EvaluateConfig,
    unlabelled: Pool | None = None,
) -> list[SemiRow]:
    """A row for each learner that unlabelled examples mean something to, way and shot.

    `unlabelled`: the same classes, of which unlabelled images are then drawn; without it they are of `pool` as well.
    """
    rows = []
    things = _things(len(features), [*pool.classes, *(unlabelled.classes if unlabelled else ())])
    for way in [int(part) for part in config.way.split(",")]:
        distractors = min(config.distractors, len(pool.classes) - way)
        for shot in [int(part) for part in config.shot.split(",")]:
            episodes = drawn(pool, unlabelled, way + distractors, shot, config)
            parts = [split(e, way, config.queries, things, only_distractors=config.only_distractors) for e in episodes]
            for method, learner in learners.items():
                if method != "ridge":
                    without, with_them = accuracies(learner, features, parts)
                    rows.append(_row(config, method, way, shot, distractors, without, with_them, digest(episodes)))
    return rows


def accuracies(
    learner: Learner, features: np.ndarray, parts: Sequence[tuple[Indices, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of each episode without and with its unlabelled examples, [episodes] in 0..1 both."""
    values = []
    for episode, extra in parts:
        support = evaluate.support_of(features, episode)
        both = support, replace(support, unlabelled=features[extra])
        values.append([evaluate.accuracy(learner.adapt(given), features, episode) for given in both])
    without, with_them = np.array(values).T
    return without, with_them


def _row(
    config: EvaluateConfig,
    method: str,
    way: int,
    shot: int,
    distractors: int,
    without: np.ndarray,
    with_them: np.ndarray,
    episode_list: str,
) -> SemiRow:
    def percent(value: float) -> float:
        return round(100 * float(value), 2)

    gain = with_them - without
    worst = np.sort(gain)[: max(1, len(gain) // 10)]
    return SemiRow(
        config.data.name,
        config.split,
        method,
        way,
        shot,
        config.unlabelled,
        distractors,
        config.only_distractors,
        round(100 * config.labelled),
        percent(with_them.mean()),
        percent(interval(with_them)),
        percent(without.mean()),
        percent(interval(without)),
        percent(gain.mean()),
        percent(interval(gain)),
        percent(np.quantile(gain, 0.1)),
        percent(worst.mean()),
        len(gain),
        config.queries,
        config.seed,
        episode_list,
        config.precision,
    )


def table(rows: Sequence[SemiRow]) -> str:
    lines = [
        "| learner | task | without | with | gain | one task in ten gains less than | worst tenth, mean |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.method} | {row.way}-way {row.shot}-shot | {row.supervised:.2f} ± {row.supervised_interval:.2f} | "
        f"{row.accuracy:.2f} ± {row.interval:.2f} | {row.gain:+.2f} ± {row.gain_interval:.2f} | {row.tenth:+.2f} | "
        f"{row.worst_tenth:+.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
