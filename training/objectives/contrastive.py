"""Contrastive: two views of one image are each other's answer among all views of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.losses import nt_xent
from training.objectives.question import Trunk, View, projector


class Contrastive(nn.Module):
    """Two views of one image are each other's answer (NT-Xent)."""

    views = 2
    uses_labels = False

    def __init__(
        self, backbone: Trunk, classes: int, *, hidden: int = 512, out: int = 128, temperature: float = 0.15
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.project = projector(backbone.shape.dim, hidden, out)

    def forward(self, views: list[View], labels: Tensor) -> Tensor:
        first, second = self.project(torch.cat([view.pooled for view in views[:2]])).chunk(2)
        return nt_xent(first, second, temperature=self.temperature)
