"""What an objective is: a small head on the shared backbone, and the loss it gives.

It says how many augmented views of an image it wants and turns what the backbone made of them into a loss. One that
asks about images it has altered itself poses its question first (`Posed`); one that keeps something between steps
brings it up to date after each (`Kept`). Knows no objective by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models.resnet import ResNet


class Sized(Protocol):
    @property
    def dim(self) -> int: ...


class Trunk(Protocol):
    """As much of a backbone as an objective of pooled features needs: their length, whatever the input."""

    @property
    def shape(self) -> Sized: ...


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Some images, or texts, and what the backbone made of them."""

    images: Tensor  # [n, C, H, W] in [0, 1]; texts: [n, length]
    maps: Tensor  # [n, dim, h, w]; texts: [n, dim, length]
    pooled: Tensor  # [n, dim]: the maps' means


class Objective(Protocol):
    views: int  # augmented views of each image that it reads; 0 for one that poses its own question
    uses_labels: bool

    def __call__(self, views: list[View], answers: Tensor) -> Tensor:
        """The views, and the answers (the labels [n], or what `pose` gave) -> loss."""
        ...


@runtime_checkable
class Posed(Protocol):
    """An objective that alters images and asks what was done, of a share of the batch: which is what it costs."""

    share: float

    def pose(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images [m, C, H, W] -> the altered images [m, C, H, W] and the answers [m, ...]."""
        ...


@runtime_checkable
class Kept(Protocol):
    """An objective with a memory of earlier steps, in buffers, so that a checkpoint holds it."""

    def keep(self, backbone: ResNet) -> None:
        """Called after each step of the optimizer, and only then: losses may be asked for more often."""
        ...


def projector(dim: int, hidden: int, out: int) -> nn.Sequential:
    """The perceptron between features and a loss, thrown away after pretraining: [n, dim] -> [n, out]."""
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))
