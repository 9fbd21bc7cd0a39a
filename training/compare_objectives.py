"""Which weights of the self-supervised losses make the better extractor, at equal time.

Each loss alone, all alike, by uncertainty, and learned: every arm trains the same network on the same images for the
same number of seconds, and is measured by prototypes on the same frozen episodes of classes held out. The schedule of
the learning rate ends where the clock does. Resumes by arm: what is in the results is not run again. Knows nothing of
how an arm is trained.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.images import ImageDecoder
from models.learners.prototype import Prototype
from models.resnet import SHAPES
from training import checkpoint, data, evaluate, inputs, pretrain, pretrained, raw, rows, splits, vision
from training.config import CompareObjectivesConfig, PretrainConfig
from training.episodes import Pool, digest, frozen
from training.folders import DataError
from training.intervals import interval
from training.objectives import OBJECTIVES
from training.stepping import choose_device, choose_precision

WAY, QUERIES, EPISODE_SEED = 5, 15, 7
SHOTS = (1, 5)


class Arm(NamedTuple):
    """One way to weigh the losses."""

    name: str
    objectives: str
    weighting: str


def arms(objectives: str) -> list[Arm]:
    """All of them alike, learned, and by uncertainty; then each loss alone. The question first, if time is short."""
    names = objectives.split(",")
    mixed = ",".join(f"{name}=1" for name in names)
    alone = [Arm(name, f"{name}=1", "fixed") for name in names]
    return [
        Arm("uniform", mixed, "fixed"),
        Arm("learned", mixed, "learned"),
        Arm("uncertainty", mixed, "uncertainty"),
        *alone,
    ]


def train(run: vision.Run, seconds: float, *, clock: str) -> float:
    """Steps until the time is up, at least two; returns the seconds used."""
    now = time.process_time if clock == "cpu" else time.monotonic
    spent = 0.0
    while run.step < 2 or spent < seconds:
        if run.step:
            # So many steps will fit if the next ones take as long.
            run.steps = max(run.step + 1, round(run.step * seconds / spent))
        began = now()
        run.advance()
        spent += now() - began
    run.steps = run.step
    return spent


def main(config: CompareObjectivesConfig) -> list[dict[str, Any]]:
    """Runs what is missing, adds it to the results and prints the table of all."""
    unknown = set(config.objectives.split(",")) - set(OBJECTIVES)
    if unknown or config.shape not in SHAPES:
        sys.exit(f"Known objectives: {', '.join(OBJECTIVES)}; known shapes: {', '.join(SHAPES)}.")
    inputs.fitting(config.shape, config.augment)
    decoder = ImageDecoder(config.size, config.size, SHAPES[config.shape].channels)
    images = data.load(config.data, "train", decoder, per_class=config.per_class or None)
    asked = data.load(config.data, config.split, decoder)
    if len(asked.classes) < WAY:
        raise DataError(
            f"{config.data} has {len(asked.classes)} classes in its split '{config.split}': {WAY} are asked at a time."
        )
    Pool.of(asked.labels, asked.groups, asked.classes)  # raises where a class is too small, before any training
    settings = _settings(config)
    results = config.results or config.out / "objectives.jsonl"
    with checkpoint.alone(config.out):
        found = [row for row in rows.read(results) if all(row.get(key) == value for key, value in settings.items())]
        for seed in range(config.seeds):
            for arm in arms(config.objectives):
                if any(row["method"] == arm.name and row["seed"] == seed for row in found):
                    continue
                new = [{**settings, **row} for row in _run(arm, seed, config, images, asked)]
                rows.append(results, new)
                found += new
                print(f"{arm.name}, seed {seed}: {[row['accuracy'] for row in new]}", file=sys.stderr)
    print(f"{table(found)}\n\n{gains(found)}")
    return found


def _settings(config: CompareObjectivesConfig) -> dict[str, Any]:
    """What rows must share to be compared."""
    device = choose_device(config.device)
    return {
        "experiment": "objectives",
        "data": config.data.name,
        "split": config.split,
        "way": WAY,
        "queries": QUERIES,
        "episodes": config.episodes,
        "labels": "none",
        "losses": config.objectives,
        "shape": config.shape,
        "size": config.size,
        "augment": config.augment,
        "batch": config.batch,
        "optimizer": config.optimizer,
        "lr": config.lr,
        "weighting_lr": config.weighting_lr,
        "weighting_steps": config.weighting_steps,
        "per_class": config.per_class,
        "budget_s": config.seconds,
        "clock": config.clock,
        "device": device.type,
        "precision": choose_precision(config.precision, device),
    }


def _run(
    arm: Arm, seed: int, config: CompareObjectivesConfig, images: data.Images, asked: data.Images
) -> Iterator[dict[str, Any]]:
    settings = PretrainConfig.model_validate(
        {
            **config.model_dump(include=PretrainConfig.model_fields.keys() & type(config).model_fields.keys()),
            "out": config.out / f"{arm.name}-{seed}",
            "split": "train",
            "objectives": arm.objectives,
            "weighting": arm.weighting,
            "seed": seed,
        }
    )
    run = vision.Run(settings, images)
    seconds = train(run, config.seconds, clock=config.clock)
    told = {"classes": splits.digests(images.classes)}
    pretrain.finish(run, settings.out / pretrained.CHECKPOINT, told)
    extractor, _ = pretrained.load_extractor(settings.out)
    features = pretrained.embed(extractor.to(run.device), asked.pixels, run.device)
    pool = Pool.of(asked.labels, asked.groups)
    for shot in SHOTS:
        episodes = frozen(pool, way=WAY, shot=shot, queries=QUERIES, count=config.episodes, seed=EPISODE_SEED)
        values = evaluate.run(Prototype(np.float32(2.0)), features, episodes)
        yield {
            "method": arm.name,
            "weighting": arm.weighting,
            "shot": shot,
            "accuracy": round(100 * float(values.mean()), 2),
            "interval": round(100 * interval(values), 2),
            "seed": seed,
            "seconds": round(seconds, 1),
            "steps": run.step,
            "images": len(run.trained),
            "weights": {name: round(value, 3) for name, value in run.weighting.weights().items()},
            "episode_list": digest(episodes),
            "command": raw.command("compare-objectives", config),
        }


def gains(found: Sequence[dict[str, Any]]) -> str:
    """What learned weights gain over each other arm, paired by seed.

    The best single loss is among them; picked here, by the figures that it is compared by, it is favoured.
    """
    learned = {(row["seed"], row["shot"]): row["accuracy"] for row in found if row["method"] == "learned"}
    lines = []
    for rival in dict.fromkeys(row["method"] for row in found if row["method"] != "learned"):
        own = [row for row in found if row["method"] == rival and (row["seed"], row["shot"]) in learned]
        for shot in SHOTS:
            pairs = [(learned[row["seed"], shot], row["accuracy"]) for row in own if row["shot"] == shot]
            values = np.array([gained - had for gained, had in pairs])
            if len(values):
                spread = f" (sd {values.std(ddof=1):.2f})" if len(values) > 1 else ""
                lines.append(f"learned - {rival}, {WAY}-way {shot}-shot: {values.mean():+.2f}{spread}")
    return "\n".join(lines)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, and the steps that fitted into the time."""
    lines = [
        "| weights of the losses | " + " | ".join(f"{WAY}-way {shot}-shot" for shot in SHOTS) + " | steps | seeds |",
        "|---|" + "---|" * (len(SHOTS) + 2),
    ]
    for name in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == name]
        cells = []
        for shot in SHOTS:
            values = np.array([row["accuracy"] for row in own if row["shot"] == shot])
            spread = f" (sd {values.std(ddof=1):.2f})" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{spread}")
        steps = np.mean([row["steps"] for row in own])
        lines.append(f"| {name} | {' | '.join(cells)} | {steps:.0f} | {len(own) // len(SHOTS)} |")
    return "\n".join(lines)
