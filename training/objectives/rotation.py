"""Rotation: by how many quarter turns an image was rotated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet import ResNet
from training.objectives.question import View


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Turns image i of [n, C, H, W] by turns[i] times 90 degrees."""
    out = images
    for k in (1, 2, 3):
        out = torch.where((turns == k)[:, None, None, None], torch.rot90(images, k, (2, 3)), out)
    return out


class Rotation(nn.Module):
    """By how many quarter turns an image was rotated.

    Gidaris, Singh and Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", 2018,
    https://arxiv.org/abs/1803.07728; as an aid to few-shot features, Mangla et al., "Charting the Right Manifold",
    2020, https://arxiv.org/abs/1907.12087. Not for characters, of which a turned one is another.
    """

    views = 0
    uses_labels = False
    share = 0.25

    def __init__(self, backbone: ResNet, classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(backbone.shape.dim, 4)

    def pose(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        turns = torch.randint(4, (len(images),), generator=rng).to(images.device)
        return rotated(images, turns), turns

    def forward(self, views: list[View], answers: Tensor) -> Tensor:
        return F.cross_entropy(self.classify(views[0].pooled).float(), answers)
