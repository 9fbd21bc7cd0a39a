"""Reptile's outer step: train on each task from the same start, then move the start a part of the way to the ends.

Nichol, Achiam and Schulman, "On First-Order Meta-Learning Algorithms", 2018, https://arxiv.org/abs/1803.02999. With one
training step a task this is plain training on the mean loss; with more, the movement also holds how the gradients of
one task agree with each other. Knows nothing of what is trained, or how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@torch.no_grad()
def interpolate(values: Sequence[Tensor], tasks: Iterable[T], train: Callable[[T], float], share: float) -> float:
    """Changes `values` in place: start + share * (mean of the ends - start); returns the mean of what `train` gave.

    `train(task)` changes `values` in place too, by training on one task with gradients on.
    """
    start = [value.clone() for value in values]
    sums = [torch.zeros_like(value) for value in values]
    losses = []
    for task in tasks:
        for value, first in zip(values, start, strict=True):
            value.copy_(first)
        with torch.enable_grad():
            losses.append(train(task))
        for total, value in zip(sums, values, strict=True):
            total += value
    for value, first, total in zip(values, start, sums, strict=True):
        value.copy_(first + share * (total / len(losses) - first))
    return sum(losses) / len(losses)
