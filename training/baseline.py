"""One baseline on frozen episodes: trains it on tasks where it is one that is, measures it, and appends its rows.

Training and measuring both resume after a kill; a longer list of episodes goes on where a shorter one ended, for the
shorter is its beginning. The methods are in `training/baselines/`, and this module knows nothing of how they learn.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models.artifact import Artifact
from models.images import ImageDecoder
from training import checkpoint, data, evaluate
from training import rows as lines
from training.baselines import Baseline, Given, MetaTrained
from training.config import BaselineConfig
from training.episodes import Indices, Pool, digest, frozen
from training.folders import DataError
from training.intervals import interval
from training.stopping import STATUS, Stop

CHECKPOINT = "baseline.safetensors"
META_TRAINED = ("maml", "reptile", "mann")
# Method -> module and class.
METHODS = {
    "maml": ("maml", "Maml"),
    "reptile": ("reptile", "Reptile"),
    "mann": ("mann", "Mann"),
    "scratch": ("scratch", "Scratch"),
    "finetune": ("finetune", "Finetune"),
    "scale-shift": ("scale_shift", "Tuned"),
    "head": ("head", "Served"),
    "pixels": ("pixels", "Pixels"),
}
FREE = {"minutes", "checkpoint_s", "data", "out", "episodes", "json_out", "artifact"}


def settings_of(kind: type[Any], text: str) -> Any:
    """`name=value,...` over the published settings; ends the process with a sentence if a name or value is wrong."""
    types: dict[str, Any] = {name: type(value) for name, value in dataclasses.asdict(kind()).items()}
    given: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            given[name] = types[name](value)
        except (KeyError, ValueError):
            sys.exit(f"--settings: {part!r} is none of {', '.join(f'{n} ({t.__name__})' for n, t in types.items())}.")
    return kind(**given)


def images_of(config: BaselineConfig, splits: str, decoder: ImageDecoder) -> data.Images:
    """The images of one split, or of several with commas, turned where that was asked for."""
    parts = [
        data.load(config.data, split, decoder, per_class=config.per_class or None, group=config.group)
        for split in splits.split(",")
    ]
    offsets = np.cumsum([0, *(len(part.classes) for part in parts)])
    images = data.Images(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.labels + offset for part, offset in zip(parts, offsets, strict=False)]),
        tuple(name for part in parts for name in part.classes),
        np.concatenate([part.groups for part in parts]),
    )
    return evaluate.turned(images) if config.rotations else images


class Progress:
    """What is kept of a run, and when: state of the method, wall-clock of its training, accuracies so far."""

    def __init__(self, config: BaselineConfig, artifact: Artifact | None = None):
        """Ends the process with a sentence where what is there was made otherwise. A folder may have moved."""
        digest = artifact.digest if artifact else ""
        self.path = config.out / CHECKPOINT
        self.config = config
        self.stop = Stop()
        self.began = self.last = time.monotonic()
        self.state: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "artifact": digest,
            "seconds": 0.0,
            "values": {},
            "adapting": {"wall": [], "cpu": []},
        }
        if self.path.exists():
            self.state = checkpoint.load(self.path)
            before = BaselineConfig(**self.state["config"])
            same = before.model_dump(exclude=FREE) == config.model_dump(exclude=FREE)
            if not same or self.state.get("artifact", digest) != digest:
                sys.exit(f"{self.path} was made with other settings; choose another --out or delete it.")

    def of(self, *parts: data.Images) -> None:
        """Notes what is trained and measured on. Raises DataError where what is kept is of something else."""
        known = data.census(
            {f"{place} {name}": count for place, part in enumerate(parts) for name, count in data.counted(part).items()}
        )
        if self.path.exists():
            data.unchanged(self.state, known, self.path)
        else:
            self.state["trained_on"] = known

    @property
    def late(self) -> bool:
        return self.stop.asked or (self.config.minutes > 0 and time.monotonic() - self.began > 60 * self.config.minutes)

    @property
    def due(self) -> bool:
        return self.late or time.monotonic() - self.last > self.config.checkpoint_s

    def save(self) -> None:
        checkpoint.save(self.path, self.state)
        self.last = time.monotonic()


def train(method: MetaTrained, pixels: np.ndarray, pool: Pool, progress: Progress, log: Path) -> bool:
    """Trains to the end, or until the time is up; whether it is the end."""
    if "method" in progress.state:
        method.restore(progress.state["method"])
    before, began = progress.state["seconds"], time.monotonic()

    def keep() -> None:
        progress.state["method"] = method.state()
        progress.state["seconds"] = before + time.monotonic() - began
        progress.save()

    lines.cut(log, lambda line: line.get("step", method.steps + 1) <= method.step)
    with log.open("a") as file, tqdm(total=method.steps, initial=method.step, mininterval=2) as bar:
        losses: list[float] = []
        while method.step < method.steps:
            losses.append(method.advance(pixels, pool))
            bar.update()
            if method.step % 20 == 0:
                file.write(json.dumps({"step": method.step, "loss": round(float(np.mean(losses)), 5)}) + "\n")
                file.flush()
                losses = []
            if progress.due:
                keep()
            if progress.late and method.step < method.steps:
                print(f"Stopped at step {method.step} of {method.steps}; run again to go on.", file=sys.stderr)
                return False
    if "method" not in progress.state or progress.state["method"]["step"] < method.steps:
        keep()
    return True


def measure(method: Baseline, pixels: np.ndarray, episodes: Sequence[Indices], progress: Progress) -> bool:
    """Adds the accuracy of each episode, by mode, to what is kept; whether all of them are there."""
    values, adapting = progress.state["values"], progress.state["adapting"]
    for episode in tqdm(episodes[len(adapting["wall"]) :], desc="episodes", mininterval=2):
        began = time.perf_counter(), time.process_time()
        answers = method.adapt(pixels[episode.support], episode.labels, episode.way)
        adapting["wall"].append(time.perf_counter() - began[0])
        adapting["cpu"].append(time.process_time() - began[1])
        for mode, answer in answers.items():
            right = answer(pixels[episode.query]) == episode.answers
            values.setdefault(mode, []).append(float(right.mean()))
        if progress.due:
            progress.save()
        if progress.late and len(adapting["wall"]) < len(episodes):
            print(
                f"Stopped at episode {len(adapting['wall'])} of {len(episodes)}; run again to go on.", file=sys.stderr
            )
            return False
    progress.save()
    return True


def command_of(config: BaselineConfig) -> str:
    """The command that makes these rows, with DATA/ for the folder of the data."""
    words = ["python -m training baseline"]
    for name, field in BaselineConfig.model_fields.items():
        value = getattr(config, name)
        if value == field.default or name in ("out", "json_out", "minutes", "checkpoint_s"):
            continue
        flag = "--" + name.replace("_", "-")
        words.append(flag if value is True else f"{flag} {f'DATA/{value.name}' if name == 'data' else value}")
    return " ".join([*words, "--out RUN"])


def rows(
    config: BaselineConfig,
    method: Baseline,
    settings: Any,
    episodes: Sequence[Indices],
    state: dict[str, Any],
    artifact: Artifact | None = None,
) -> list[dict[str, Any]]:
    """One row a mode; accuracies in per cent, times in seconds, adapting as the median: on the clock, and of a core."""
    found = []
    for mode, single in state["values"].items():
        values = np.array(single[: len(episodes)])
        found.append(
            {
                "experiment": "baselines",
                "data": config.data.name,
                "split": config.split,
                "method": config.method,
                **({"artifact": artifact.manifest.name} if artifact else {}),
                "mode": mode,
                "way": config.way,
                "shot": config.shot,
                "accuracy": round(100 * float(values.mean()), 2),
                "interval": round(100 * interval(values), 2),
                "episodes": len(values),
                "queries": config.queries,
                "seed": config.seed,
                "episode_list": digest(list(episodes)),
                "labels": method.labels,
                "seconds": round(state["seconds"], 3),
                **{
                    f"adapt_{clock}_s": round(float(np.median(times[: len(episodes)])), 5)
                    for clock, times in state["adapting"].items()
                },
                "settings": dataclasses.asdict(settings),
                "command": command_of(config),
            }
        )
    return found


def main(config: BaselineConfig) -> list[dict[str, Any]]:
    """Trains and measures, or goes on; returns the rows, or none if the time was up before the end."""
    module, name = METHODS[config.method]
    kind = importlib.import_module(f"training.baselines.{module}")
    settings = settings_of(kind.Settings, config.settings)
    artifact = Artifact.load(config.artifact) if config.artifact else None
    decoder = artifact.decoder() if artifact else ImageDecoder(config.size, config.size, config.channels)
    if not isinstance(decoder, ImageDecoder):
        raise DataError(f"{config.artifact} reads texts; baselines are measured on images.")
    size, _, channels = decoder.shape
    with checkpoint.alone(config.out):
        progress = Progress(config, artifact)
        method: Any = getattr(kind, name)(
            settings, Given(config.way, config.shot, size, channels, config.seed, artifact)
        )
        images = images_of(config, config.split, decoder)
        training = images_of(config, config.train_split, decoder) if config.method in META_TRAINED else None
        for split, part in ((config.split, images), (config.train_split, training)):
            if part and len(part.classes) < config.way:
                raise DataError(f"--way: {config.data} has only {len(part.classes)} classes in its split '{split}'.")
        pool = Pool.of(images.labels, images.groups, images.classes)
        progress.of(*(part for part in (training, images) if part))
        with progress.stop:
            found = _measured(config, method, training, images, pool, settings, progress, artifact)
    if progress.stop.asked:
        sys.exit(STATUS)
    return found


def _measured(
    config: BaselineConfig,
    method: Any,
    training: data.Images | None,
    images: data.Images,
    pool: Pool,
    settings: Any,
    progress: Progress,
    artifact: Artifact | None,
) -> list[dict[str, Any]]:
    """The rows, or none if the time was up before the end."""
    if training:
        classes = Pool.of(training.labels, names=training.classes)
        if not train(method, training.pixels, classes, progress, config.out / "baseline.jsonl"):
            return []
    episodes = frozen(
        pool,
        way=config.way,
        shot=config.shot,
        queries=config.queries,
        count=config.episodes,
        seed=config.seed,
    )
    if not measure(method, images.pixels, episodes, progress):
        return []
    found = rows(config, method, settings, episodes, progress.state, artifact)
    for row in found:
        print(
            f"{row['method']} ({row['mode']}): {row['accuracy']} ± {row['interval']}, {row['episodes']} episodes, "
            f"{row['adapt_wall_s']} s an adaptation, {row['adapt_cpu_s']} s of a core"
        )
    if config.json_out:
        config.json_out.parent.mkdir(parents=True, exist_ok=True)
        with config.json_out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    return found
