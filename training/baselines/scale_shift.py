"""The pretrained extractor with a scale and a shift a channel, which alone are trained on the examples, with the head.

Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", 2017, https://arxiv.org/abs/1709.07871, and
Shysheya et al., "FiT", 2022, https://arxiv.org/abs/2206.08671, who train them by gradient on a task: some 9,600 numbers
of a ResNet-18 instead of 11 million. An exported network has its batch normalisation folded into the convolutions, so
scale and shift are put where it was; they start at 1 and 0. Head and views as in `finetune`. Inductive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.resnet import ResNet
from training.baselines import Answers, finetune
from training.baselines.fitting import fit, inductive


@dataclass(frozen=True, slots=True)
class Settings(finetune.Settings):
    lr: float = 1e-2


class ScaleShift(nn.Module):
    """[n, channels, H, W] -> the same, each channel times its scale plus its shift."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def insert(backbone: ResNet) -> Iterator[nn.Parameter]:
    """Puts a ScaleShift behind each convolution of a folded network, in place, and yields what there is to train."""
    parts: list[Any] = [backbone, *backbone.stages]
    added: list[ScaleShift] = []
    for part in parts:
        for name in ("", "1", "2"):
            if hasattr(part, f"bn{name}"):
                added.append(ScaleShift(getattr(part, f"conv{name}").out_channels))
                setattr(part, f"bn{name}", added[-1])
        if isinstance(getattr(part, "shortcut", None), nn.Sequential):
            added.append(ScaleShift(part.shortcut[0].out_channels))
            part.shortcut.append(added[-1])
    return (parameter for one in added for parameter in one.parameters())


class Tuned(finetune.Finetune):
    def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Mapping[str, Answers]:
        network = self.prepared(pixels, labels, way)
        network.requires_grad_(False)
        trained = [*insert(network.extractor.backbone), *network.head.requires_grad_(True).parameters()]
        fit(network, trained, pixels, labels, steps=self.settings.steps, lr=self.settings.lr, seed=self.seed)
        return inductive(network)
