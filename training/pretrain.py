"""Pretraining: one backbone learns under one or several weighted objectives, and resumes after any kill.

Knows what may go together, when to save and when to stop; nothing of a step. Nothing of episodes but for the quick look
at validation classes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models.extractor import Decoder
from models.learners.prototype import Prototype
from training import checkpoint, data, evaluate, inputs, language, rows, splits, vision
from training.config import PretrainConfig
from training.episodes import Pool, frozen
from training.folders import DataError, named_few
from training.objectives import OBJECTIVES
from training.pretrained import CHECKPOINT, embed, learned
from training.stopping import STATUS, Stop


def main(config: PretrainConfig) -> Path:
    """Reads the images, trains, or goes on training, and returns the path of the checkpoint."""
    if config.small and config.small > config.size:
        sys.exit("--small must not be larger than --size.")
    if config.shape not in inputs.SHAPES:
        sys.exit(f"Known shapes: {', '.join(inputs.SHAPES)}.")
    text = inputs.kind(config.shape) == "text"
    known = language.OBJECTIVES if text else tuple(OBJECTIVES)
    if {part.split("=")[0] for part in config.objectives.split(",")} - set(known):
        sys.exit(
            f"The shape {config.shape} is for {'texts' if text else 'images'}; its objectives: {', '.join(known)}."
        )
    if text and (config.rotations or config.small or config.labels == "clusters" or config.weighting != "fixed"):
        sys.exit("--rotations, --small, --labels clusters and --weighting are for images.")
    if config.details and (text or not any(part.startswith("momentum=") for part in config.objectives.split(","))):
        sys.exit("--details are asked about by the objective momentum alone.")
    if config.mix and (text or not may_mix(config)):
        sys.exit("--mix is for supervised and projected, and for what poses its own question beside them.")
    inputs.fitting(config.shape, config.augment)
    if config.epochs == 0 and config.start is None:
        sys.exit("--epochs 0 takes the weights of --start as they are: which?")
    decoder = inputs.decoder(config)
    images = data.load(config.data, config.split, decoder, labelled=config.labelled, per_class=config.per_class or None)
    if config.split == "train":
        _foreseen(config, decoder)
    if config.hold_out:
        images, _ = data.hold_out(images, config.hold_out)
    asks = {part.split("=")[0] for part in config.objectives.split(",")} & {"supervised", "projected"}
    if len(images.classes) * (4 if config.rotations else 1) < 2 and asks and config.labels == "classes":
        raise DataError(
            f"{config.data} has one class to learn from, '{images.classes[0]}': {' and '.join(sorted(asks))} tell "
            "classes apart. Without labels learns --objectives contrastive=1."
        )
    check = data.load(config.data, "val", decoder) if config.check_epochs else None
    if config.labels == "clusters" and text:
        sys.exit("--labels clusters is for images.")
    with checkpoint.alone(config.out):
        if config.labels == "clusters":
            from training import progressive  # which trains with what stands here, round after round

            return progressive.train(config, images, check)
        return train(config, images, check)


def _foreseen(config: PretrainConfig, decoder: Decoder) -> None:
    """Raises DataError where a command after this one would find too few classes, or too little of one, hours later."""
    things = data.things(config.data, decoder)
    dealt = splits.split_classes(config.data, list(things))
    if pairs := [f"{first} and {second}" for first, second in splits.alike(things)]:
        print(f"As splits.json names both, different classes are {named_few(pairs)}.", file=sys.stderr)
    if few := [name for name in dealt["train"] if things.get(name) == 1]:
        print(
            f"Of {named_few(few)} there is one example: metatrain will need --tasks other than labels.",
            file=sys.stderr,
        )
    for split, needs in (("val", "metatrain and export"), ("test", "tasks of evaluate")):
        if len(dealt[split]) == 1 and not config.rotations:  # turned, one class is four
            raise DataError(
                f"{config.data} has one class in its split '{split}', '{dealt[split][0]}'; {needs} take two or more. "
                f"{len(dealt['train'])} are to learn from: splits.json, see docs/training.md, deals them otherwise."
            )
        if few := [name for name in dealt[split] if things.get(name) == 1]:
            raise DataError(
                f"{config.data} has one example of {named_few(few)} in its split '{split}'; {needs} take two or "
                "more, of different things, of each class."
            )
        if not dealt[split]:
            print(f"{config.data} has no classes in its split '{split}', which {needs} will need.", file=sys.stderr)


def may_mix(config: PretrainConfig) -> bool:
    """Not where views of one image are held against each other, in which nothing else may be seen."""
    asked = [OBJECTIVES[part.split("=")[0]] for part in config.objectives.split(",")]
    return {objective.uses_labels for objective in asked if objective.views} == {True}


def same(before: PretrainConfig, config: PretrainConfig) -> bool:
    """Whether the two lead to the same weights."""
    free = {"minutes", "device", "checkpoint_s", "check_epochs", "data", "out"}
    return before.model_dump(exclude=free) == config.model_dump(exclude=free)


def train(
    config: PretrainConfig,
    images: data.Images,
    check: data.Images | None,
    *,
    trained_on: Mapping[str, Any] | None = None,
    classes: str | None = None,
) -> Path:
    """Trains on these images, or goes on, and looks at others now and then; returns the path of the checkpoint.

    `trained_on`: the census that a resumed training is held to, where it is not that of these images, and
    `classes` the digests of what is learned from, likewise. Asked to end, it does so after the step, with a checkpoint
    and STATUS.
    """
    known = trained_on or data.census(data.counted(images))
    told = {"trained_on": dict(known), "classes": learned(config, images.classes) if classes is None else classes}
    run = language.Run(config, images) if inputs.kind(config.shape) == "text" else vision.Run(config, images)
    path = config.out / CHECKPOINT
    config.out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = checkpoint.load(path)
        if not same(PretrainConfig(**state["config"]), config):
            sys.exit(f"{path} was made with other settings; choose another --out or delete it.")
        data.unchanged(state, known, path)
        if "extractor" in state:  # made anew it might differ in a last bit, and the learners would not fit it any more
            return path
        run.restore(state)
    rows.cut(config.out / "pretrain.jsonl", lambda line: line.get("step", math.inf) <= run.step)
    start = last = time.monotonic()
    with (
        Stop() as stop,
        (config.out / "pretrain.jsonl").open("a") as log,
        tqdm(total=run.steps, initial=run.step, mininterval=2) as bar,
    ):

        def write(**line: Any) -> None:
            log.write(json.dumps({"step": run.step, "epoch": run.step / run.steps_per_epoch, **line}) + "\n")
            log.flush()

        began = time.perf_counter()
        counted = run.step
        while run.step < run.steps:
            found = run.take_step()
            bar.update()
            done = run.step == run.steps
            late = stop.asked or (config.minutes > 0 and time.monotonic() - start > 60 * config.minutes)
            save = done or late or time.monotonic() - last > config.checkpoint_s
            if run.step % 20 == 0 or save:
                losses = {name: loss.item() for name, loss in found.items()}
                if not all(math.isfinite(loss) for loss in losses.values()):
                    sys.exit(f"A loss is not finite at step {run.step}: {losses}. Lower --lr.")
            if run.step % 20 == 0:
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
                rate = (run.step - counted) * config.batch / (time.perf_counter() - began)
                began, counted = time.perf_counter(), run.step
                write(
                    losses=losses,
                    weights=run.weighting.weights(),
                    lr=run.optimizer.param_groups[0]["lr"],
                    images_per_s=round(rate, 1),
                    precision=run.precision,
                )
            epoch, at = divmod(run.step, run.steps_per_epoch)
            if check is not None and at == 0 and epoch % config.check_epochs == 0:
                write(check=quick_look(run, check))
            if save:
                checkpoint.save(path, {**run.state(), **told})
                last = time.monotonic()
            if late and not done:
                print(f"Stopped at step {run.step} of {run.steps}; run the same command to go on.", file=sys.stderr)
                if stop.asked:
                    sys.exit(STATUS)
                return path
    finish(run, path, told)
    return path


def finish(run: vision.Run | language.Run, path: Path, told: Mapping[str, Any]) -> None:
    """Adds the finished extractor, in float32, to the checkpoint; `told`: what it says of what was learned from."""
    extractor = run.extractor()
    checkpoint.save(path, {**run.state(), **told, "extractor": dict(extractor.state_dict())})


def quick_look(run: vision.Run | language.Run, images: data.Images) -> dict[str, float]:
    """5-way accuracy of prototypes on 600 episodes of the validation classes: a look, not a result."""
    extractor = run.extractor()
    features = embed(extractor, images.pixels, run.device)
    pool = Pool.of(images.labels, names=images.classes)
    learner = Prototype(np.float32(2.0))
    way = min(5, len(images.classes))
    return {
        f"{way}-way {shot}-shot": round(100 * float(evaluate.run(learner, features, episodes).mean()), 2)
        for shot in (1, 5)
        for episodes in [frozen(pool, way=way, shot=shot, queries=15, count=600, seed=3)]
    }
