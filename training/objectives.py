"""What pretraining minimises: each objective is a small head on the shared backbone and the loss it gives.

An objective says how many augmented views of an image it wants and turns their pooled features into a loss, so a new
self-supervised task is one class and one line in the table. One that asks about images it has altered itself poses its
question first: see `pose`. Knows nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.losses import nt_xent


class Objective(Protocol):
    views: int  # augmented views of each image that it reads; 0 for one that poses its own question
    uses_labels: bool

    def __call__(self, pooled: list[Tensor], answers: Tensor) -> Tensor:
        """Pooled features [n, dim] of each view and the answers [n] (the labels, or what `pose` gave) -> loss."""
        ...


@runtime_checkable
class Posed(Protocol):
    """An objective that alters images and asks what was done."""

    def pose(self, view: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """One view of the batch [n, C, H, W] -> the altered images [m, C, H, W] and the answers [m]."""
        ...


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Turns image i of [n, C, H, W] by turns[i] times 90 degrees."""
    out = images
    for k in (1, 2, 3):
        out = torch.where((turns == k)[:, None, None, None], torch.rot90(images, k, (2, 3)), out)
    return out


class Contrastive(nn.Module):
    """Two views of one image are each other's answer (NT-Xent)."""

    views = 2
    uses_labels = False

    def __init__(self, dim: int, classes: int, *, hidden: int = 512, out: int = 128, temperature: float = 0.15):
        super().__init__()
        self.temperature = temperature
        self.project = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
        )

    def forward(self, pooled: list[Tensor], labels: Tensor) -> Tensor:
        first, second = self.project(torch.cat(pooled[:2])).chunk(2)
        return nt_xent(first, second, temperature=self.temperature)


class Supervised(nn.Module):
    """The class of the image, among the training classes (cross-entropy, smoothed labels)."""

    views = 1
    uses_labels = True

    def __init__(self, dim: int, classes: int, *, smoothing: float = 0.1):
        super().__init__()
        self.smoothing = smoothing
        self.classify = nn.Linear(dim, classes)

    def forward(self, pooled: list[Tensor], labels: Tensor) -> Tensor:
        logits = self.classify(pooled[0]).float()
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


class Projected(nn.Module):
    """The class of the image, asked of a projection of the features that is thrown away afterwards.

    What only tells the training classes apart stays in the projector, and the features keep what tells new classes
    apart. Sariyildiz et al., "No Reason for No Supervision: Improved Generalization in Supervised Models", 2023,
    https://arxiv.org/abs/2206.15369: a cosine classifier behind a perceptron.
    """

    views = 1
    uses_labels = True

    def __init__(self, dim: int, classes: int, *, hidden: int = 1024, out: int = 256, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature
        self.project = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
        )
        self.directions = nn.Parameter(torch.randn(classes, out))

    def forward(self, pooled: list[Tensor], labels: Tensor) -> Tensor:
        z = F.normalize(self.project(pooled[0]).float(), dim=1)
        return F.cross_entropy(z @ F.normalize(self.directions, dim=1).T / self.temperature, labels)


class Rotation(nn.Module):
    """By how many quarter turns an image was rotated.

    Gidaris, Singh and Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", 2018,
    https://arxiv.org/abs/1803.07728; as an aid to few-shot features, Mangla et al., "Charting the Right Manifold",
    2020, https://arxiv.org/abs/1907.12087. Asked of a share of the batch only, which is what it costs. Not for
    characters, of which a turned one is another.
    """

    views = 0
    uses_labels = False

    def __init__(self, dim: int, classes: int, *, share: float = 0.25):
        super().__init__()
        self.share = share
        self.classify = nn.Linear(dim, 4)

    def pose(self, view: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        some = view[: max(1, round(self.share * len(view)))]
        turns = torch.randint(4, (len(some),), generator=rng).to(view.device)
        return rotated(some, turns), turns

    def forward(self, pooled: list[Tensor], answers: Tensor) -> Tensor:
        return F.cross_entropy(self.classify(pooled[0]).float(), answers)


OBJECTIVES: Mapping[str, type[Contrastive] | type[Supervised] | type[Projected] | type[Rotation]] = {
    "contrastive": Contrastive,
    "supervised": Supervised,
    "projected": Projected,
    "rotation": Rotation,
}
