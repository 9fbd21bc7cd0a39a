"""Jigsaw: in which of the 24 orders the four quarters of an image were laid."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet import ResNet
from training.objectives.question import View


def shuffled(images: Tensor, orders: Tensor, side: int) -> Tensor:
    """Cuts each image of [n, C, H, W] into side x side tiles and lays tile orders[i, k] in place k.

    `orders` [n, side * side] holds permutations. Rows and columns that do not fill a tile stay where they are.
    """
    n, channels, height, width = images.shape
    high, wide = height // side, width // side
    whole = images[:, :, : high * side, : wide * side]
    tiles = whole.reshape(n, channels, side, high, side, wide).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(n, side * side, channels, high, wide)
    tiles = tiles[torch.arange(n, device=images.device)[:, None], orders]
    laid = tiles.reshape(n, side, side, channels, high, wide).permute(0, 3, 1, 4, 2, 5)
    out = images.clone()
    out[:, :, : high * side, : wide * side] = laid.reshape(n, channels, high * side, wide * side)
    return out


class Jigsaw(nn.Module):
    """Which permutation of 2 x 2 tiles an image was cut and laid in.

    Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", 2016,
    https://arxiv.org/abs/1603.09246, in the form of Carlucci et al., "Domain Generalization by Solving Jigsaw Puzzles",
    2019, https://arxiv.org/abs/1903.06864: the tiles are laid out as one image, so that the backbone is the usual one.
    With four tiles all 24 orders are asked for, and none has to be chosen.
    """

    views = 0
    uses_labels = False
    share = 0.25
    orders: Tensor

    def __init__(self, backbone: ResNet, classes: int) -> None:
        super().__init__()
        self.register_buffer("orders", torch.tensor(list(itertools.permutations(range(4)))), persistent=False)
        self.classify = nn.Linear(backbone.shape.dim, 24)

    def pose(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        answers = torch.randint(24, (len(images),), generator=rng).to(images.device)
        return shuffled(images, self.orders[answers], 2), answers

    def forward(self, views: list[View], answers: Tensor) -> Tensor:
        return F.cross_entropy(self.classify(views[0].pooled).float(), answers)
