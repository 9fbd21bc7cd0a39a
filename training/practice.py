"""What learners practise on: cached features, and the classes that episodes are drawn from.

Classes that trained the extractor are easy to tell apart, and what a learner learns on them is how easy they are. So
episodes may come from classes that it never saw: those of `pretrain --hold-out`, which are practised on and never
remembered, and those of other folders (`--practise`). Of the very classes of a task the memory shows nothing: it would
hold the answer. Knows nothing of learners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.images import ImageDecoder
from models.resnet import ImageExtractor
from training import data, evaluate, memory
from training.augment import AUGMENTATIONS
from training.config import MetatrainConfig, PretrainConfig
from training.episodes import Indices, Pool
from training.pretrain import autocast, generator


class Tasks:
    """Cached features with the pools that episodes are drawn from."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, *, plain: int):
        """The first `plain` rows are what the covariance of a class is taken from."""
        self.plain = plain
        self.features = features
        self.labels = labels
        self.pool = Pool.of(labels, groups)

    def near(self) -> np.ndarray:
        """Similarity of classes by their means, [classes, classes]."""
        sums = np.zeros((len(self.pool.classes), self.features.shape[1]), np.float32)
        np.add.at(sums, self.labels, self.features)
        means = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return np.asarray(means @ means.T)


@torch.no_grad()
def cached(
    extractor: ImageExtractor, images: data.Images, config: MetatrainConfig, pretrained: PretrainConfig, *, seed: int
) -> Tasks:
    """Features of each image and of `views` augmentations of it.

    With labels, a class is a class, and all views of one image are one group; in pseudo-tasks, an image is a class.
    """
    if config.rotations:
        images = evaluate.turned(images)
    device = next(extractor.parameters()).device
    augment = AUGMENTATIONS[pretrained.augment]
    extractor.eval()
    parts: list[list[Tensor]] = [[] for _ in range(config.views + 1)]
    for at in tqdm(range(0, len(images), 256), desc="features", mininterval=2):
        pixels = torch.from_numpy(images.pixels[at : at + 256]).to(device)
        x = pixels.permute(0, 3, 1, 2).float() / 255
        for view in range(config.views + 1):
            shown = augment(x, pretrained.size, generator(seed, at * 64 + view)) if view else x
            with autocast(device, pretrained.precision):
                pooled = extractor.backbone(shown.contiguous(memory_format=torch.channels_last))
            parts[view].append(extractor.normalise(pooled.float()).cpu())
    features = torch.cat([torch.cat(part) for part in parts]).numpy()
    number = np.tile(np.arange(len(images)), config.views + 1)
    if config.tasks == "pseudo":
        return Tasks(features, number, None, plain=len(features))
    return Tasks(features, np.tile(images.labels, config.views + 1), number, plain=len(images))


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Tasks to practise on, and the class that each slot of the memory was made of, if it was made of these classes."""

    tasks: Tasks
    owners: np.ndarray | None = None  # [slots]

    def kept(self, episodes: Sequence[Indices]) -> list[np.ndarray] | None:
        """For each episode which slots are not of its classes, [slots] bool.

        Some are always left: an episode that has every class of the memory keeps them all.
        """
        if self.owners is None:
            return None
        kept = [~np.isin(self.owners, self.tasks.labels[episode.support]) for episode in episodes]
        return [keep if keep.any() else ~keep for keep in kept]


def slots_of(tasks: Tasks, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """At most `count` slots of the memory, and the class of each; None where classes are too many to have their own."""
    if len(tasks.pool.classes) > count:
        return memory.centroids(tasks.features, count, seed=seed), None
    return memory.class_slots(tasks.features, tasks.labels, count, seed=seed)


def practice(
    extractor: ImageExtractor, decoder: ImageDecoder, config: MetatrainConfig, pretrained: PretrainConfig
) -> tuple[Tasks, list[Source]]:
    """What is remembered, and where episodes are drawn from, in turn."""

    def load(source: Path, split: str) -> data.Images:
        return data.load(source, split, decoder, per_class=config.per_class or None)

    def tasks_of(images: data.Images, number: int = 0) -> Tasks:
        return cached(extractor, images, config, pretrained, seed=config.seed + number)

    images = load(config.data, config.split)
    if pretrained.hold_out:
        known, unknown = data.hold_out(images, pretrained.hold_out)
        remembered = tasks_of(known)
        sources = [Source(tasks_of(unknown, 2))]
    else:
        remembered = tasks_of(images)
        sources = [Source(remembered, slots_of(remembered, config.slots, seed=config.seed)[1])]
    folders = [Path(name) for name in config.practise.split(",") if name]
    sources += [Source(tasks_of(load(folder, "train"), 3 + number)) for number, folder in enumerate(folders)]
    return remembered, sources
