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

from models.extractor import Decoder
from training import data, evaluate, inputs, memory, pseudo
from training.config import MetatrainConfig, PretrainConfig
from training.episodes import Indices, Pool
from training.folders import DataError
from training.stepping import autocast, generator


class Tasks:
    """Cached features with the pools that episodes are drawn from."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        groups: np.ndarray | None,
        *,
        plain: int,
        others: tuple[Pool, ...] = (),
        names: Sequence[str] = (),
    ):
        """The first `plain` rows are what the covariance of a class is taken from; a negative label is none.

        `others` are pools beside that of the labels, where an image has more than one class.
        """
        self.plain = plain
        self.features = features
        self.labels = labels
        self.pool = Pool.of(labels, groups, names)
        self.pools = (self.pool, *others)

    def near(self) -> np.ndarray:
        """Similarity of classes by their means, [classes, classes]."""
        sums = np.zeros((len(self.pool.classes), self.features.shape[1]), np.float32)
        named = self.labels >= 0
        np.add.at(sums, self.labels[named], self.features[named])
        means = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return np.asarray(means @ means.T)


@torch.no_grad()
def cached(
    extractor: inputs.Network, images: data.Images, config: MetatrainConfig, pretrained: PretrainConfig, *, seed: int
) -> Tasks:
    """Features of each image and of `views` augmentations of it.

    With labels, a class is a class, and all views of one image, or of one thing, are one group; in pseudo-tasks, an
    image is a class. A cluster of images is a class as well, one of similar images as of less similar ones: fine and
    coarse.
    """
    if config.rotations:
        images = evaluate.turned(images)
    device = next(extractor.parameters()).device
    augment = inputs.augmentation(pretrained)
    extractor.eval()
    parts: list[list[Tensor]] = [[] for _ in range(config.views + 1)]
    for at in tqdm(range(0, len(images), 256), desc="features", mininterval=2):
        x = inputs.prepared(torch.from_numpy(images.pixels[at : at + 256]).to(device))
        for view in range(config.views + 1):
            shown = augment(x, pretrained.size, generator(seed, at * 64 + view)) if view else x
            with autocast(device, pretrained.precision):
                pooled = extractor.backbone(inputs.laid_out(shown))
            parts[view].append(extractor.normalise(pooled.float()).cpu())
    features = torch.cat([torch.cat(part) for part in parts]).numpy()
    number = np.tile(np.arange(len(images)), config.views + 1)
    # Views of one image are one thing, and so are images of one thing, where that is known.
    things = np.where(images.groups < 0, images.groups.max(initial=-1) + 1 + np.arange(len(images)), images.groups)
    things = np.tile(things, config.views + 1)
    if config.tasks == "pseudo":
        return Tasks(features, number, None, plain=len(features))
    count, views = len(images), config.views + 1
    if config.tasks == "labels":
        return Tasks(features, np.tile(images.labels, views), things, plain=count, names=images.classes)
    fine, coarse = (
        np.tile(pseudo.clusters(features[:count], size, seed=seed), views) for size in (pseudo.FINE, pseudo.COARSE)
    )
    others = [Pool.of(coarse, things)]
    if config.tasks == "mixed":
        others.append(Pool.of(number))
    return Tasks(features, fine, things, plain=count, others=tuple(others))


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
    named = tasks.labels >= 0
    return memory.class_slots(tasks.features[named], tasks.labels[named], count, seed=seed)


def own_source(tasks: Tasks, config: MetatrainConfig) -> Source:
    """The classes that are remembered, to practise on as well."""
    return Source(tasks, slots_of(tasks, config.slots, seed=config.seed)[1])


def practice(
    extractor: inputs.Network, decoder: Decoder, config: MetatrainConfig, pretrained: PretrainConfig
) -> tuple[Tasks, list[Source]]:
    """What is remembered, and where episodes are drawn from, in turn."""

    def load(source: Path, split: str, labelled: float = 1) -> data.Images:
        return data.load(source, split, decoder, labelled=labelled, per_class=config.per_class or None)

    def tasks_of(images: data.Images, number: int = 0) -> Tasks:
        return cached(extractor, images, config, pretrained, seed=config.seed + number)

    if pretrained.labelled < 1 and config.split != pretrained.split:
        raise DataError(f"Which images are labelled was dealt for the split '{pretrained.split}': take that one.")
    images = load(config.data, config.split, pretrained.labelled)
    if pretrained.hold_out:
        known, unknown = data.hold_out(images, pretrained.hold_out)
        remembered = tasks_of(known)
        sources = [Source(tasks_of(unknown, 2))]
    else:
        remembered = tasks_of(images)
        sources = [own_source(remembered, config)]
    folders = [Path(name) for name in config.practise.split(",") if name]
    sources += [Source(tasks_of(load(folder, "train"), 3 + number)) for number, folder in enumerate(folders)]
    return remembered, sources
