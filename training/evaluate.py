"""Accuracy on frozen episodes: every learner on the same cached features, mean and 95 % interval.

Inductive: each question is answered alone. Knows nothing of how extractor and learners were made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from models.artifact import Artifact
from models.episode import Support
from models.extractor import Extractor, load_extractor
from models.head import Affine
from models.learners import Learner
from models.views import seen
from training import data, honesty, paired, raw, splits
from training.config import EvaluateConfig
from training.episodes import Indices, Pool, digest, frozen
from training.folders import DataError
from training.intervals import interval


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
    # What a class showed on average, where it had too few images for what was asked.
    shots_mean: float | None = None
    queries_mean: float | None = None


def known(row: Row) -> raw.Line:
    """The fields of a row that say something."""
    return {name: value for name, value in asdict(row).items() if value is not None}


def turned(images: data.Images) -> data.Images:
    """Every class four times: upright and turned by 90, 180 and 270 degrees. Raises DataError for texts."""
    if images.pixels.ndim != 4:
        raise DataError("--rotations is for images.")
    pixels = np.concatenate([np.rot90(images.pixels, turn, (1, 2)) for turn in range(4)])
    labels = np.concatenate([images.labels * 4 + turn for turn in range(4)])
    classes = tuple(f"{name}@{90 * turn}" for name in images.classes for turn in range(4))
    return data.Images(np.ascontiguousarray(pixels), labels, classes, np.tile(images.groups, 4))


def embed(extractor: Extractor, pixels: np.ndarray, *, batch: int = 64, threads: int = 2) -> np.ndarray:
    """uint8 [n, H, W, C] or [n, length] -> float32 [n, dim]. Raises DataError where they are not finite."""
    starts = range(0, len(pixels), batch)
    with ThreadPoolExecutor(threads) as pool:
        features = np.concatenate(list(pool.map(lambda at: extractor(pixels[at : at + batch]), starts)))
    if not np.isfinite(features).all():
        raise DataError("The extractor gives numbers that are not finite: nothing can be measured with them.")
    return features


def support_of(features: np.ndarray, episode: Indices) -> Support:
    return Support(features[episode.support], episode.labels, episode.way)


def accuracy(affine: Affine, features: np.ndarray, episode: Indices) -> float:
    """The mean over classes of the share of their questions that are answered rightly: where classes have unlike many,
    each counts the same."""
    right = (features[episode.query] @ affine.weight.T + affine.bias).argmax(axis=1) == episode.answers
    return float((np.bincount(episode.answers, right) / np.bincount(episode.answers)).mean())


def run(learner: Learner, features: np.ndarray, episodes: Sequence[Indices]) -> np.ndarray:
    """Accuracy of each episode, [episodes] in 0..1."""
    return np.array([accuracy(learner.adapt(support_of(features, e)), features, e) for e in episodes])


def there(episodes: Sequence[Indices], shot: int, queries: int) -> dict[str, float]:
    """Mean examples and questions of a class, where they are fewer than was asked for."""
    classes = sum(episode.way for episode in episodes)
    shots = sum(len(episode.support) for episode in episodes)
    asked = sum(len(episode.query) for episode in episodes)
    found = {"shots_mean": (shots / classes, shot), "queries_mean": (asked / classes, queries)}
    return {name: round(mean, 2) for name, (mean, wanted) in found.items() if mean < wanted}


def measure(
    learners: Mapping[str, Learner], features: np.ndarray, pool: Pool, config: EvaluateConfig
) -> tuple[list[Row], dict[tuple[str, int, int], np.ndarray]]:
    """All rows, and the accuracy of each episode for paired comparison."""
    rows: list[Row] = []
    single: dict[tuple[str, int, int], np.ndarray] = {}
    for way in _numbers(config.way):
        for shot in _numbers(config.shot):
            episodes = frozen(
                pool,
                way=way,
                shot=shot,
                queries=config.queries,
                count=config.episodes,
                seed=config.seed,
                spread=config.spread,
            )
            name = digest(episodes)
            fewer = there(episodes, shot, config.queries)
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
                        **fewer,
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


def _used(by_way: Mapping[int, int], asked: int) -> str:
    """How many classes there were beside those of a task, which may be fewer than were asked for."""
    if len(set(by_way.values())) < 2:
        return str(next(iter(by_way.values()), asked))
    return ", ".join(f"{count} at {way}-way" for way, count in by_way.items())


def learned_from(artifact: Artifact, config: EvaluateConfig, classes: Sequence[str]) -> str:
    """What is to be said where the classes measured on are those learned from or calibrated on, or may be."""
    digests, known = set(splits.digests(classes).split()), artifact.manifest.classes
    training = artifact.manifest.training
    seen = (training.get("data"), training.get("split"))
    by_data = ""
    if seen[0] == config.data.name and ("all" in (config.split, seen[1]) or config.split == seen[1]):
        told = f"The artifact learned from these classes ({seen[0]}, {seen[1]})"
        by_data = f"{told}: the figures say nothing of new ones."
    if known.get("learned"):
        says = {
            "learned": "that the artifact learned from: their figures say nothing of new classes",
            "calibrated": "that the artifact was calibrated on: its probabilities were fitted to them",
        }
        both = {name: len(digests & set(known.get(name, "").split())) for name in says}
        counts = [
            f"Of {len(digests)} classes {count} are, by their names, among those {says[name]}."
            for name, count in both.items()
            if count
        ]
        # An older pretraining behind it may have told no digests.
        return "\n".join(counts if both["learned"] or not by_data else [by_data, *counts])
    if by_data:
        return by_data
    if config.split == "train":
        told = f"says that it learned from {seen[0]} ({seen[1]})" if seen[0] else "does not say what it learned from"
        return f"--split train is for learning. The artifact {told}: of classes it has seen figures say nothing new."
    return ""


def too_few(row: Row) -> str:
    """A line on what was not there of what a row's task asks for."""
    means = {"examples": row.shots_mean, "questions": row.queries_mean}
    there = [f"{mean:g} {what} a class" for what, mean in means.items() if mean is not None]
    asked = f"{row.way}-way {row.shot}-shot with {row.queries} questions"
    return f"{asked}: there were {' and '.join(there)} on average, for classes have too few.\n" if there else ""


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def against(
    rows: Sequence[Row],
    single: Mapping[tuple[str, int, int], np.ndarray],
    exact: Mapping[tuple[str, int, int], np.ndarray],
) -> list[raw.Line]:
    """What each row measured beyond float32, paired: mean difference over the same episodes, with its interval."""
    lines = []
    for row in rows:
        gain = single[row.method, row.way, row.shot] - exact[row.method, row.way, row.shot]
        lines.append(
            {
                **known(row),
                "experiment": f"{row.precision} against float32",
                "difference": round(100 * float(gain.mean()), 3),
                "difference_interval": round(100 * interval(gain), 3),
            }
        )
    return lines


def main(config: EvaluateConfig) -> list[Row]:
    begun = time.perf_counter()
    artifact = Artifact.load(config.artifact)
    if config.views > 1 and artifact.kind != "image":
        sys.exit(f"--views: {config.artifact} reads {artifact.kind}s.")
    if config.labelled < 1 and not config.unlabelled:
        sys.exit("--labelled is for --unlabelled, which takes the other images.")
    if config.scores and not config.foreign:
        sys.exit("--scores is for --foreign: what foreign classes are told by.")
    if config.distractors and not config.unlabelled:
        sys.exit("--distractors is for --unlabelled: classes that unlabelled images show besides.")
    if config.only_distractors and not config.distractors:
        sys.exit("--only-distractors is for --distractors: of how many classes?")
    extractor = seen(load_extractor(artifact, precision=config.precision), config.views)
    images = data.load(
        config.data, config.split, artifact.decoder(), per_class=config.per_class or None, group=config.group
    )
    known_as = images.classes
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
    for flag, wanted in (("foreign", config.foreign), ("distractors", config.distractors)):
        if wanted and max(_numbers(config.way)) == len(images.classes):
            sys.exit(
                f"--{flag}: {config.data} has {len(images.classes)} classes in its split '{config.split}', which all "
                f"are of a task at --way {len(images.classes)}. Fewer leave some."
            )
    if said := learned_from(artifact, config, known_as):
        print(said, file=sys.stderr)
    print(
        f"{len(images)} {artifact.kind}s of {len(images.classes)} classes: {config.data} ({config.split})",
        file=sys.stderr,
    )
    labelled = data.named(images, config.labelled)
    features = embed(extractor, images.pixels)
    pool = Pool.of(np.where(labelled, images.labels, -1), images.groups, images.classes)
    rows, single = measure(learners, features, pool, config)
    for said in dict.fromkeys(map(too_few, rows)):
        print(said, end="", file=sys.stderr)
    lines: list[raw.Line] = [{**known(row), "experiment": "accuracy"} for row in rows]
    print(
        f"\n{artifact.manifest.name} on {config.data.name} ({config.split}), {config.precision}, "
        f"{config.episodes} episodes, {config.queries} queries a class, 95 % intervals\n\n{table(rows)}\n"
    )
    if config.against_float32:
        exact = embed(seen(load_extractor(artifact, precision="float32"), config.views), images.pixels)
        lines += against(rows, single, measure(learners, exact, pool, config)[1])
        for line in lines[len(rows) :]:
            print(
                f"{line['method']}, {line['way']}-way {line['shot']}-shot, {config.precision} less float32: "
                f"{line['difference']:+.2f} ± {line['difference_interval']:.2f}"
            )
    if config.paired:
        differences = paired.rows(rows, single, config.paired)
        print(f"difference to {config.paired} on the same episodes, points\n\n{paired.table(differences)}\n")
        lines += [{**asdict(row), "experiment": "paired"} for row in differences]
    if config.foreign:
        trust = honesty.measure(artifact, features, pool, config)
        used = _used({row.way: row.foreign for row in trust}, config.foreign)
        print(f"foreign classes an episode: {used}, per cent\n\n{honesty.table(trust)}\n")
        lines += [{**asdict(row), "experiment": "trust"} for row in trust]
    # What these measure with stands here, so they cannot be imported before.
    if config.scores:
        from training import scores

        told = scores.measure(artifact, features, pool, config)
        used = _used({row.way: row.foreign for row in told}, config.foreign)
        print(f"ways to tell foreign classes, an episode {used}, per cent\n\n{scores.table(told)}\n")
        lines += [{**asdict(row), "experiment": "rejection score"} for row in told]
    if config.unlabelled:
        from training import semi

        others = (
            None if labelled.all() else Pool.of(np.where(labelled, -1, images.labels), images.groups, images.classes)
        )
        found = semi.measure(learners, features, pool, config, others)
        print(
            f"{config.unlabelled} unlabelled images a class, distractor classes: "
            f"{_used({row.way: row.distractors for row in found}, config.distractors)}"
            f"{', of which alone they are' if config.only_distractors else ''}, per cent\n\n{semi.table(found)}\n"
        )
        lines += [{**asdict(row), "experiment": "semi-supervised"} for row in found]
    if config.json_out:
        of_all = {
            **raw.made_with(artifact),
            "rotations": config.rotations,
            **({"views": config.views} if config.views > 1 else {}),
            **({"spread": True} if config.spread else {}),
            **({"labelled": round(100 * config.labelled)} if config.labelled < 1 else {}),
            "command": raw.command("evaluate", config),
            "measured_in_s": round(time.perf_counter() - begun, 1),
        }
        default = artifact.manifest.default
        raw.append(config.json_out, ({**line, "default": line["method"] == default, **of_all} for line in lines))
    return rows
