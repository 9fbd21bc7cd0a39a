"""What pretraining minimises: each objective is a small head on the shared backbone and the loss it gives.

An objective says how many augmented views of an image it wants and turns their pooled features into a loss, so a new
self-supervised task is one class and one line in the table. Knows nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.losses import nt_xent


class Objective(Protocol):
    views: int
    uses_labels: bool

    def __call__(self, pooled: list[Tensor], labels: Tensor) -> Tensor: ...


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


OBJECTIVES: Mapping[str, type[Contrastive] | type[Supervised]] = {"contrastive": Contrastive, "supervised": Supervised}
