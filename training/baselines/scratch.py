"""The network from random weights, trained on the examples of a task and nothing else.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, https://arxiv.org/abs/1512.03385, as
whoever has never heard of few-shot learning would use it: the ResNet of the artifact, a linear layer, cross-entropy,
augmented views. What everything else is measured against. Inductive: batch normalisation answers with the running
statistics of the training steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from models.resnet import ResNet
from training.baselines import Answers, Given
from training.baselines.fitting import artifact_of, fit, images_network, inductive


@dataclass(frozen=True, slots=True)
class Settings:
    steps: int = 100
    lr: float = 1e-3


class Scratch:
    labels = "none"

    def __init__(self, settings: Settings, given: Given):
        self.settings = settings
        self.seed = given.seed
        self.shape = images_network(artifact_of(given)).backbone.shape

    def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Mapping[str, Answers]:
        torch.manual_seed(self.seed)
        network = nn.Sequential(ResNet(self.shape), nn.Linear(self.shape.dim, way)).train()
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fit(
            network,
            network.parameters(),
            pixels,
            labels,
            steps=self.settings.steps,
            lr=self.settings.lr,
            seed=self.seed,
        )
        return inductive(network)
