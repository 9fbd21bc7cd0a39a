"""Progressive re-clustering: what the extractor sees in the images is clustered, it learns to tell the clusters apart,
and what it sees then is clustered again.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", 2018, https://arxiv.org/abs/1807.05520;
for few-shot features Ji et al., "Unsupervised Few-shot Learning via Self-supervised Training", 2019,
https://arxiv.org/abs/1912.12178, whose rounds leave out what clusters badly. Each round is a pretraining of its own, in
a folder of its own, that starts from the one before: so it resumes as they do, and the clusters, which follow from the
finished round, are found again and never stored. Knows nothing of labels.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training import checkpoint, data, evaluate, pretrain, pretrained, pseudo, vision
from training.config import PretrainConfig


def train(config: PretrainConfig, images: data.Images, check: data.Images | None) -> Path:
    """All rounds, or the rest of them; returns the path of the checkpoint, which is there when all are done."""
    if config.start is None:
        sys.exit("--labels clusters needs --start: clusters of what an untrained extractor sees mean nothing.")
    classes = pretrained.learned(config, images.classes)
    if config.rotations:
        images = evaluate.turned(images)
    path, began = config.out / pretrained.CHECKPOINT, time.monotonic()
    # Of the images as they came: clusters are found again, on another computer perhaps with an image more or less.
    known = data.census(data.counted(images))
    start = config.start
    for number in range(1, config.rounds + 1):
        left = config.minutes - (time.monotonic() - began) / 60 if config.minutes else 0.0
        if config.minutes and left <= 0:
            return path
        own = config.model_copy(
            update={
                "out": config.out / f"round{number}",
                "start": start,
                "rotations": False,
                "minutes": left,
                "seed": config.seed + number - 1,
            }
        )
        if not finished(own, known):
            pretrain.train(own, clustered(own, images), check, trained_on=known, classes=classes)
        if not finished(own, known):
            return path
        start = own.out
    shutil.copyfile(start / pretrained.CHECKPOINT, path)
    return path


def finished(config: PretrainConfig, known: Mapping[str, Any]) -> bool:
    """Whether a round with these settings is done. Raises DataError where it was done on other images."""
    path = config.out / pretrained.CHECKPOINT
    if not path.exists():
        return False
    state = checkpoint.load(path)
    if "extractor" not in state or not pretrain.same(PretrainConfig(**state["config"]), config):
        return False
    data.unchanged(state, known, path)
    return True


def clustered(config: PretrainConfig, images: data.Images) -> data.Images:
    """The images with clusters for classes, without those that belong to none."""
    run = vision.Run(config, images)
    features = pretrained.embed(run.extractor(), images.pixels, run.device)
    named = pseudo.clusters(features, config.cluster, seed=config.seed)
    kept = np.flatnonzero(named >= 0)
    classes = tuple(f"cluster{label}" for label in range(int(named.max()) + 1))
    print(f"{len(classes)} clusters of {len(kept)} images, {len(images) - len(kept)} left out", file=sys.stderr)
    return data.Images(images.pixels[kept], named[kept], classes, images.groups[kept])
