"""Objectives that read the labels of the training classes: one of each image, or how much it is of each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.question import Trunk, View, projector


class Supervised(nn.Module):
    """The class of the image, among the training classes (cross-entropy, smoothed labels)."""

    views = 1
    uses_labels = True

    def __init__(self, backbone: Trunk, classes: int, *, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.classify = nn.Linear(backbone.shape.dim, classes)

    def forward(self, views: list[View], labels: Tensor) -> Tensor:
        logits = self.classify(views[0].pooled).float()
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


class Projected(nn.Module):
    """The class of the image, asked of a projection of the features that is thrown away afterwards.

    What only tells the training classes apart stays in the projector, and the features keep what tells new classes
    apart. Sariyildiz et al., "No Reason for No Supervision: Improved Generalization in Supervised Models", 2023,
    https://arxiv.org/abs/2206.15369: a cosine classifier behind a perceptron.
    """

    views = 1
    uses_labels = True

    def __init__(
        self, backbone: Trunk, classes: int, *, hidden: int = 1024, out: int = 256, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.project = projector(backbone.shape.dim, hidden, out)
        self.directions = nn.Parameter(torch.randn(classes, out))

    def forward(self, views: list[View], labels: Tensor) -> Tensor:
        z = F.normalize(self.project(views[0].pooled).float(), dim=1)
        return F.cross_entropy(z @ F.normalize(self.directions, dim=1).T / self.temperature, labels)
