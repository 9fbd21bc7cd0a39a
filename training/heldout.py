"""Pseudo-tasks for the meta-objective: clusters of images that no loss is trained on.

The idea of Hsu, Levine and Finn, "Unsupervised Learning via Meta-Learning" (CACTUs), 2018,
https://arxiv.org/abs/1810.02334: clusters of features stand for classes. They are made anew as the features get better.
Examples and questions of a task are augmented, so that a cluster is told by what its images show. Reads no label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.resnet import ResNet
from training.augment import Augmentation
from training.folders import DataError

SHARE = 0.1  # of the images, kept out of every loss
PER_CLUSTER = 15
WAY, SHOT, QUERIES = 10, 2, 4
REFRESH = 25  # tasks between two clusterings
SCALE = 10.0  # of the distances in the query loss


def kmeans(features: Tensor, count: int, rng: torch.Generator, *, rounds: int = 10) -> Tensor:
    """Unit-length features [n, dim] -> cluster of each [n], by the cosine; a cluster that runs empty stays so."""
    centres = features[torch.randperm(len(features), generator=rng)[:count].to(features.device)]
    for _ in range(rounds):
        nearest = (features @ centres.T).argmax(dim=1)
        one_hot = F.one_hot(nearest, count).to(features.dtype)
        centres = F.normalize(one_hot.T @ features, dim=1)
    return nearest


def described(pooled: Tensor) -> Tensor:
    """Pooled maps [n, dim] -> unit-length features, as the extractor makes them, centred on themselves."""
    rooted = torch.sqrt(pooled.float() + 1e-6)
    return F.normalize(rooted - rooted.mean(dim=0), dim=1)


class HeldOut:
    """Owns the images [n, H, W, C] uint8 that were kept out, and their clusters."""

    def __init__(self, pixels: Tensor, augment: Augmentation, device: torch.device) -> None:
        """Raises DataError for too few images to make clusters of."""
        if len(pixels) < 2 * PER_CLUSTER:
            least = round(2 * PER_CLUSTER / SHARE)
            raise DataError(f"Learned weights need {least} images or more: one in ten makes the tasks they learn from.")
        self.pixels = pixels
        self.augment = augment
        self.device = device
        self.clusters = torch.zeros(len(pixels), dtype=torch.int64)
        self.asked = 0

    def _images(self, rows: Tensor) -> Tensor:
        return self.pixels[rows].to(self.device).permute(0, 3, 1, 2).float() / 255

    @torch.no_grad()
    def _cluster(self, backbone: ResNet, rng: torch.Generator) -> None:
        backbone.eval()
        parts = [backbone(self._images(rows)) for rows in torch.split(torch.arange(len(self.pixels)), 128)]
        backbone.train()
        count = max(2, len(self.pixels) // PER_CLUSTER)
        self.clusters = kmeans(described(torch.cat(parts)), count, rng).cpu()

    def query_loss(self, backbone: ResNet, size: int, rng: torch.Generator) -> Tensor:
        """Of prototypes, on one task of the clusters as they are: a scalar with a gradient to the backbone."""
        if self.asked % REFRESH == 0:
            self._cluster(backbone, rng)
        self.asked += 1
        rows, way = self._draw(rng)
        views = self.augment(self._images(rows), size, rng)
        features = described(backbone(views.contiguous(memory_format=torch.channels_last)))
        dealt = features.reshape(way, -1, features.shape[1])  # [way, shot + queries, dim]
        shot = min(SHOT, dealt.shape[1] - 1)
        prototypes = dealt[:, :shot].mean(dim=1)
        query = dealt[:, shot:].reshape(-1, features.shape[1])
        logits = -SCALE * torch.cdist(query, prototypes).square()
        answers = torch.arange(way, device=self.device).repeat_interleave(dealt.shape[1] - shot)
        return F.cross_entropy(logits, answers)

    def _draw(self, rng: torch.Generator) -> tuple[Tensor, int]:
        """Rows of one task, class by class, as many of each: of the clusters that are large enough."""
        counts = torch.bincount(self.clusters)
        each = SHOT + QUERIES
        while (counts >= each).sum() < 2 and each > 2:
            each -= 1
        large = torch.nonzero(counts >= each)[:, 0]
        chosen = large[torch.randperm(len(large), generator=rng)[:WAY]]
        rows = []
        for cluster in chosen:
            own = torch.nonzero(self.clusters == cluster)[:, 0]
            rows.append(own[torch.randperm(len(own), generator=rng)[:each]])
        return torch.cat(rows), len(chosen)

    def state(self) -> dict[str, Any]:
        return {"clusters": self.clusters, "asked": self.asked}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.clusters, self.asked = state["clusters"], state["asked"]
