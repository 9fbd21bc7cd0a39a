"""Continual learning: classes come one at a time, in any order, and some go again; what is forgotten?

A head is a function of the examples of its task and of nothing else, so it should not matter in which order they came,
nor what was there in between: maps of different orders may differ by rounding alone. The counter-example is a head that
is fine-tuned on the newest class only, which forgets (McCloskey and Cohen, "Catastrophic Interference in Connectionist
Networks", 1989, https://doi.org/10.1016/S0079-7421(08)60536-8). Knows nothing of the service, which sorts the examples
before it learns, so that its heads do not differ in a single bit: its own tests hold it to that.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.arrays import softmax
from models.artifact import Artifact
from models.episode import Support
from models.extractor import load_extractor
from models.head import Affine
from models.learners import Learner
from training import data, evaluate, raw
from training.config import ContinualConfig
from training.episodes import Indices, Pool, frozen

EARLY = 10  # the first classes to come, whose fate is followed
FINE_TUNED = "fine-tuned on the newest class"


@dataclass(frozen=True, slots=True)
class ContinualRow:
    """What one learner knows when so many classes are there; per cent, means over the orders."""

    data: str
    split: str
    method: str
    phase: str  # "adding" or "removing"
    way: int
    shot: int
    accuracy: float  # on the questions of all classes that are there
    early: float  # on those of the first to come that are still there
    batch: float  # what a head made of all examples at once knows
    forgotten: float  # how much more that is
    changed: float  # answers that the two give differently
    difference: float  # largest between the two maps in float64
    orders: int
    episodes: int  # questions
    queries: int
    seed: int


def course(config: ContinualConfig, order: int) -> Iterator[tuple[str, list[int]]]:
    """(phase, the classes that are there as they came) after every addition and every removal of one class."""
    rng = np.random.default_rng([config.seed, order])
    came: list[int] = []
    for number in rng.permutation(config.classes):
        came = [*came, int(number)]
        yield "adding", came
    for number in rng.permutation(config.classes)[: config.removed]:
        came = [other for other in came if other != number]
        yield "removing", came


def doubled(learner: Learner) -> Learner:
    """The same learner in float64."""
    fields = dataclasses.fields(learner)  # type: ignore[arg-type]  # every learner is a dataclass
    values: dict[str, Any] = {field.name: getattr(learner, field.name).astype(np.float64) for field in fields}
    return type(learner)(**values)


def adapted(learner: Learner, features: np.ndarray, episode: Indices, classes: Sequence[int]) -> Affine:
    """The map of some classes of an episode, learned in the order in which they are given: row k is classes[k]."""
    rows = [episode.support[episode.labels == number] for number in classes]
    labels = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    return learner.adapt(Support(features[np.concatenate(rows)], labels, len(rows)))


def answers(affine: Affine, classes: Sequence[int], features: np.ndarray, episode: Indices) -> np.ndarray:
    """The class that each question [q] of the episode is given, though it may show one that is not there."""
    logits = features[episode.query] @ affine.weight.T + affine.bias
    return np.asarray(np.array(classes)[logits.argmax(axis=1)])


def fine_tuned(
    weight: np.ndarray, features: np.ndarray, episode: Indices, number: int, config: ContinualConfig
) -> np.ndarray:
    """Weights [n, dim] with one row more, for the newest class, after descending on its examples alone."""
    weight = np.concatenate([weight, np.zeros((1, features.shape[1]), features.dtype)])
    own = features[episode.support[episode.labels == number]]
    target = np.zeros(len(weight), features.dtype)
    target[-1] = 1
    for _ in range(config.steps):
        weight = weight - config.lr * ((softmax(own @ weight.T) - target).T @ own)
    return weight


def measure(
    learners: Mapping[str, Learner], features: np.ndarray, pool: Pool, config: ContinualConfig
) -> list[ContinualRow]:
    """Rows of every learner, and of the head that is fine-tuned, at every measurement."""
    (episode,) = frozen(pool, way=config.classes, shot=config.shot, queries=config.queries, count=1, seed=config.seed)
    double = features.astype(np.float64)
    exact = {method: doubled(learner) for method, learner in learners.items()}
    found: dict[tuple[str, int, str], list[tuple[float, ...]]] = {}
    for order in range(config.orders):
        weight = np.zeros((0, features.shape[1]), features.dtype)
        before: list[int] = []
        first: list[int] = []
        for step, (phase, came) in enumerate(course(config, order), 1):
            if phase == "adding":
                first = came
                weight = fine_tuned(weight, features, episode, came[-1], config)
            else:
                weight = weight[[before.index(number) for number in came]]
            before = came
            if step % config.every:
                continue
            asked = np.isin(episode.answers, came)
            # The same ten to the end, as far as they are still there: others that move up are not early.
            early = np.isin(episode.answers, [number for number in first[:EARLY] if number in came])

            def share(given: np.ndarray, among: np.ndarray) -> float:
                return float((given == episode.answers)[among].mean()) if among.any() else math.nan

            given = answers(Affine(weight, np.zeros(len(weight))), came, features, episode)
            for method, learner in learners.items():
                one = answers(adapted(learner, features, episode, came), came, features, episode)
                once = answers(adapted(learner, features, episode, sorted(came)), sorted(came), features, episode)
                single = adapted(exact[method], double, episode, came)
                batch = adapted(exact[method], double, episode, sorted(came))
                numbers = (
                    share(one, asked),
                    share(one, early),
                    share(once, asked),
                    float((one != once)[asked].mean()),
                    apart(single, batch, [sorted(came).index(number) for number in came]),
                )
                found.setdefault((phase, len(came), method), []).append(numbers)
            alone = (share(given, asked), share(given, early), float("nan"), float("nan"), float("nan"))
            found.setdefault((phase, len(came), FINE_TUNED), []).append(alone)
    return [_row(config, *key, values) for key, values in found.items()]


def apart(one: Affine, other: Affine, place: Sequence[int]) -> float:
    """Largest difference between two maps: row k of the one is row place[k] of the other."""
    return float(max(np.abs(a - b[list(place)]).max() for a, b in zip(one, other, strict=True)))


def _row(
    config: ContinualConfig, phase: str, way: int, method: str, values: Sequence[tuple[float, ...]]
) -> ContinualRow:
    accuracy, early, batch, changed, _ = (100 * float(np.mean(part)) for part in zip(*values, strict=True))
    return ContinualRow(
        config.data.name,
        config.split,
        method,
        phase,
        way,
        config.shot,
        round(accuracy, 2),
        round(early, 2),
        round(batch, 2),
        round(batch - accuracy, 4),
        round(changed, 4),
        max(value[-1] for value in values),
        config.orders,
        config.orders * way * config.queries,
        config.queries,
        config.seed,
    )


def known(row: ContinualRow) -> raw.Line:
    """The fields of a row, None where there is no number."""
    empty = {name for name, value in asdict(row).items() if isinstance(value, float) and math.isnan(value)}
    return {name: None if name in empty else value for name, value in asdict(row).items()}


def table(rows: Sequence[ContinualRow]) -> str:
    """Learners down, numbers of classes across: accuracy on all of them, and on the first to come."""
    steps = list(dict.fromkeys((row.phase, row.way) for row in rows))
    lines = [
        "| | " + " | ".join(f"{way}{' left' * (phase == 'removing')}" for phase, way in steps) + " |",
        "|---|" + "---|" * len(steps),
    ]
    for method in dict.fromkeys(row.method for row in rows):
        own = {(row.phase, row.way): row for row in rows if row.method == method}
        lines.append(f"| {method} | " + " | ".join(f"{own[step].accuracy:.1f}" for step in steps) + " |")
        lines.append(
            f"| the first {EARLY} of them | "
            + " | ".join("–" if math.isnan(own[step].early) else f"{own[step].early:.1f}" for step in steps)
            + " |"
        )
    return "\n".join(lines)


def main(config: ContinualConfig) -> list[ContinualRow]:
    artifact = Artifact.load(config.artifact)
    images = data.load(config.data, config.split, artifact.decoder())
    if config.rotations:
        images = evaluate.turned(images)
    if config.classes > len(images.classes) or config.removed > config.classes - 2:
        sys.exit(f"--classes: {config.data} has {len(images.classes)} in '{config.split}', and two must be left.")
    learners = artifact.learners()
    if config.learners:
        if not set(config.learners.split(",")) <= set(learners):
            sys.exit(f"--learners: {config.artifact} has {', '.join(learners)}.")
        learners = {name: learners[name] for name in config.learners.split(",")}
    features = evaluate.embed(load_extractor(artifact), images.pixels)
    rows = measure(learners, features, Pool.of(images.labels, images.groups, images.classes), config)
    print(
        f"\n{artifact.manifest.name} on {config.data.name} ({config.split}): {config.classes} classes one at a time, "
        f"{config.shot} examples each, {config.orders} orders, accuracy in per cent\n\n{table(rows)}\n"
    )
    kept = [row for row in rows if row.method != FINE_TUNED]
    print(
        f"One at a time against all at once: {max(abs(row.forgotten) for row in kept):.4f} points forgotten at most, "
        f"{max(row.changed for row in kept):.4f} % of answers differ, float64 maps by "
        f"{max(row.difference for row in kept):.1e}."
    )
    if config.json_out:
        made = {**raw.made_with(artifact), "rotations": config.rotations, "command": raw.command("continual", config)}
        raw.append(config.json_out, ({"experiment": "continual", **known(row), **made} for row in rows))
    return rows
