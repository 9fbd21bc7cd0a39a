"""Clusters: to which of some learned directions an image belongs, as its other view says."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet import ResNet
from training.objectives.question import View, projector


@torch.no_grad()
def sinkhorn(scores: Tensor, *, sharpness: float = 0.05, rounds: int = 3) -> Tensor:
    """Scores [n, k] -> assignments [n, k] whose rows sum to one and whose columns to about n / k.

    Cuturi, "Sinkhorn Distances", 2013, https://arxiv.org/abs/1306.0895: rows and columns are scaled in turn.
    """
    shares = torch.exp((scores - scores.max()) / sharpness)
    for _ in range(rounds):
        shares = shares / shares.sum(dim=0, keepdim=True).clamp(min=1e-12) / shares.shape[1]
        shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return shares


class Clusters(nn.Module):
    """Each view tells the cluster of the other.

    Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV), 2020,
    https://arxiv.org/abs/2006.09882: the prototypes are learned, and the assignments of a batch are spread evenly over
    them, so that not all images fall into one cluster. Without their multi-crop and their queue.
    """

    views = 2
    uses_labels = False

    def __init__(
        self,
        backbone: ResNet,
        classes: int,
        *,
        prototypes: int = 128,
        hidden: int = 512,
        out: int = 128,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.project = projector(backbone.shape.dim, hidden, out)
        self.prototypes = nn.Parameter(torch.randn(prototypes, out))

    def forward(self, views: list[View], labels: Tensor) -> Tensor:
        z = F.normalize(self.project(torch.cat([view.pooled for view in views[:2]])).float(), dim=1)
        first, second = (z @ F.normalize(self.prototypes, dim=1).T).chunk(2)
        return 0.5 * (self._told(first, sinkhorn(second)) + self._told(second, sinkhorn(first)))

    def _told(self, scores: Tensor, target: Tensor) -> Tensor:
        return -(target * F.log_softmax(scores / self.temperature, dim=1)).sum(dim=1).mean()
