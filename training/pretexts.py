"""Self-supervised tasks that no extractor is trained on: what its features are good for beyond what was asked of them.

Each is a way to alter an image of which one is asked: all of them are made of every image, so that no answer is rarer
than another. Relatives of what pretraining may use, but none of it. Knows nothing of heads or features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.objectives.jigsaw import shuffled

SIDE = 3
ORDERS = 8


class Pretext(NamedTuple):
    way: int
    alter: Callable[[Tensor, int], Tensor]  # images [n, C, H, W] and the answer -> altered images


def orders(count: int) -> np.ndarray:
    """`count` orders of the nine tiles, each as far from the others as can be had, the same for ever: [count, 9].

    As in Noroozi and Favaro, 2016, https://arxiv.org/abs/1603.09246: orders that share places are told apart by a few
    tiles only.
    """
    candidates = np.random.default_rng(0).permuted(np.tile(np.arange(SIDE**2), (1000, 1)), axis=1)
    chosen = [candidates[0]]
    while len(chosen) < count:
        nearest = np.min([(candidates != one).sum(axis=1) for one in chosen], axis=0)
        chosen.append(candidates[nearest.argmax()])
    return np.stack(chosen)


def jigsaw(images: Tensor, answer: int) -> Tensor:
    """Nine tiles in one of eight orders; pretraining has four tiles in any."""
    order = torch.from_numpy(orders(ORDERS)[answer]).to(images.device)
    return shuffled(images, order.expand(len(images), -1), SIDE)


def slant(images: Tensor, answer: int) -> Tensor:
    """Turned by 45 degrees and quarter turns more; pretraining has quarter turns alone.

    Only the round middle is shown, for corners cut off would tell the angle.
    """
    angle = math.radians(45 + 90 * answer)
    cos, sin = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    inside = (grid.square().sum(dim=3) <= 1).unsqueeze(1)
    turned = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside, turned, 0.5)


def patched(images: Tensor, answer: int) -> Tensor:
    """One of nine places shows what stands there in another image: which? Pretraining paints what is missing."""
    high, wide = images.shape[2] // SIDE, images.shape[3] // SIDE
    row, column = divmod(answer, SIDE)
    rows, columns = slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)
    out = images.clone()
    out[:, :, rows, columns] = images.roll(1, 0)[:, :, rows, columns]
    return out


PRETEXTS: Mapping[str, Pretext] = {
    "jigsaw-3x3": Pretext(ORDERS, jigsaw),
    "rotation-45": Pretext(4, slant),
    "inpainting-position": Pretext(SIDE**2, patched),
}
