"""Accuracy on frozen episodes: every learner on the same cached features, mean and 95 % interval.

Inductive: each question is answered alone. Knows nothing of how extractor and learners were made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from models.artifact import Artifact
from models.episode import Support
from models.extractor import Extractor, load_extractor
from models.head import Affine
from models.learners import Learner
from training import data, honesty, paired
from training.config import EvaluateConfig
from training.episodes import Indices, Pool, digest, frozen


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number; accuracies in per cent."""

    data: str
    split: str
    method: str
    way: int
    shot: int
    accuracy: float
    interval: float  # half the width of the 95 % interval of the mean over episodes
    episodes: int
    queries: int
    seed: int
    episode_list: str
    precision: str


def turned(images: data.Images) -> data.Images:
    """Every class four times: upright and turned by 90, 180 and 270 degrees."""
    pixels = np.concatenate([np.rot90(images.pixels, turn, (1, 2)) for turn in range(4)])
    labels = np.concatenate([images.labels * 4 + turn for turn in range(4)])
    classes = tuple(f"{name}@{90 * turn}" for name in images.classes for turn in range(4))
    return data.Images(np.ascontiguousarray(pixels), labels, classes, np.tile(images.groups, 4))


def embed(extractor: Extractor, pixels: np.ndarray, *, batch: int = 64, threads: int = 2) -> np.ndarray:
    """uint8 [n, H, W, C] -> float32 [n, dim]."""
    starts = range(0, len(pixels), batch)
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(lambda at: extractor(pixels[at : at + batch]), starts)))


def support_of(features: np.ndarray, episode: Indices) -> Support:
    return Support(features[episode.support], episode.labels, episode.way)


def accuracy(affine: Affine, features: np.ndarray, episode: Indices) -> float:
    logits = features[episode.query] @ affine.weight.T + affine.bias
    return float((logits.argmax(axis=1) == episode.answers).mean())


def run(learner: Learner, features: np.ndarray, episodes: Sequence[Indices]) -> np.ndarray:
    """Accuracy of each episode, [episodes] in 0..1."""
    return np.array([accuracy(learner.adapt(support_of(features, e)), features, e) for e in episodes])


def interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean."""
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def measure(
    learners: Mapping[str, Learner], features: np.ndarray, pool: Pool, config: EvaluateConfig
) -> tuple[list[Row], dict[tuple[str, int, int], np.ndarray]]:
    """All rows, and the accuracy of each episode for paired comparison."""
    rows: list[Row] = []
    single: dict[tuple[str, int, int], np.ndarray] = {}
    for way in _numbers(config.way):
        for shot in _numbers(config.shot):
            episodes = frozen(pool, way=way, shot=shot, queries=config.queries, count=config.episodes, seed=config.seed)
            name = digest(episodes)
            for method, learner in learners.items():
                values = run(learner, features, episodes)
                single[method, way, shot] = values
                rows.append(
                    Row(
                        config.data.name,
                        config.split,
                        method,
                        way,
                        shot,
                        round(100 * float(values.mean()), 2),
                        round(100 * interval(values), 2),
                        len(values),
                        config.queries,
                        config.seed,
                        name,
                        config.precision,
                    )
                )
    return rows, single


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: learners down, way and shot across."""
    cells = sorted({(row.way, row.shot) for row in rows})
    methods = list(dict.fromkeys(row.method for row in rows))
    value = {(row.method, row.way, row.shot): f"{row.accuracy:.2f} ± {row.interval:.2f}" for row in rows}
    lines = [
        "| learner | " + " | ".join(f"{way}-way {shot}-shot" for way, shot in cells) + " |",
        "|---|" + "---|" * len(cells),
    ]
    lines += [f"| {m} | " + " | ".join(value[m, way, shot] for way, shot in cells) + " |" for m in methods]
    return "\n".join(lines)


def write(path: Path, rows: Sequence[Row | paired.PairedRow]) -> None:
    """Adds rows to a file, one JSON line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(config: EvaluateConfig) -> list[Row]:
    artifact = Artifact.load(config.artifact)
    extractor = load_extractor(artifact, precision=config.precision)
    images = data.load(
        config.data, config.split, artifact.decoder(), per_class=config.per_class or None, group=config.group
    )
    if config.rotations:
        images = turned(images)
    learners = artifact.learners()
    if config.learners:
        if not set(config.learners.split(",")) <= set(learners):
            sys.exit(f"--learners: {config.artifact} has {', '.join(learners)}.")
        learners = {name: learners[name] for name in config.learners.split(",")}
    if config.paired and config.paired not in learners:
        sys.exit(f"--paired: {config.paired} is not among the learners measured: {', '.join(learners)}.")
    if max(_numbers(config.way)) > len(images.classes):
        sys.exit(f"--way: {config.data} has only {len(images.classes)} classes in its split '{config.split}'.")
    print(f"{len(images)} images of {len(images.classes)} classes: {config.data} ({config.split})", file=sys.stderr)
    features = embed(extractor, images.pixels)
    pool = Pool.of(images.labels, images.groups)
    rows, single = measure(learners, features, pool, config)
    print(
        f"\n{artifact.manifest.name} on {config.data.name} ({config.split}), {config.precision}, "
        f"{config.episodes} episodes, {config.queries} queries a class, 95 % intervals\n\n{table(rows)}\n"
    )
    if config.paired:
        differences = paired.rows(rows, single, config.paired)
        print(f"difference to {config.paired} on the same episodes, points\n\n{paired.table(differences)}\n")
        if config.paired_out:
            write(config.paired_out, differences)
    if config.foreign:
        trust = honesty.measure(artifact, features, pool, config)
        print(f"{config.foreign} foreign classes an episode, per cent\n\n{honesty.table(trust)}\n")
    if config.json_out:
        write(config.json_out, rows)
    return rows
