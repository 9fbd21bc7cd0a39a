"""Reptile on the full network: train on one task, move the start a part of the way to where that ended, repeat.

Nichol, Achiam and Schulman, "On First-Order Meta-Learning Algorithms", 2018, https://arxiv.org/abs/1803.02999. No
query set and no derivative through the inner loop: plain training steps on batches of one task, of which more examples
are used in training (train-shots) than in the test. The inner optimizer is Adam without momentum, whose second moments
go from task to task. Published for Omniglot 5-way 1-shot: 100,000 outer steps.

Published figures are transductive, as MAML's. Knows nothing of files or evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.baselines import Answers, Given
from training.baselines.conv4 import Conv4, Shrink, shown
from training.episodes import Indices, Pool
from training.reptile import interpolate


@dataclass(frozen=True, slots=True)
class Settings:
    steps: int = 100_000
    tasks: int = 5
    train_shots: int = 10
    batch: int = 10
    inner_steps: int = 5
    lr: float = 1e-3
    meta_step: float = 1.0  # falls to 0 in a straight line
    test_steps: int = 50
    test_batch: int = 5
    width: int = 64
    shrink: Shrink = "stride"


class Reptile:
    labels = "training classes"

    def __init__(self, settings: Settings, given: Given):
        self.settings = settings
        self.given = given
        self.steps = settings.steps
        self.step = 0
        torch.manual_seed(given.seed)
        self.network = Conv4(
            channels=given.channels, size=given.size, way=given.way, width=settings.width, shrink=settings.shrink
        )
        self.optimizer = self._optimizer(self.network)

    def _optimizer(self, network: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=self.settings.lr, betas=(0.0, 0.999))

    def advance(self, pixels: np.ndarray, pool: Pool) -> float:
        """Trains on some tasks, each from the same start, and moves the start towards the mean of their ends."""
        settings, given = self.settings, self.given
        rng = np.random.default_rng([given.seed, self.step])

        def train(task: Indices) -> float:
            images, labels = shown(pixels[task.support]), torch.from_numpy(task.labels)
            network, optimizer = self.network, self.optimizer
            losses = _train(network, optimizer, images, labels, settings.inner_steps, settings.batch, rng)
            return float(np.mean(losses))

        shots = np.full(given.way, settings.train_shots)
        tasks = (pool.episode(rng, way=given.way, shots=shots, queries=1) for _ in range(settings.tasks))
        share = settings.meta_step * (1 - self.step / self.steps)
        loss = interpolate(list(self.network.parameters()), tasks, train, share)
        self.step += 1
        return loss

    def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Mapping[str, Answers]:
        """Raises ValueError for another way than the head was made for."""
        if way != self.given.way:
            raise ValueError(f"trained for {self.given.way} classes, not {way}")
        network = copy.deepcopy(self.network)
        optimizer = self._optimizer(network)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))  # it would take over the tensors
        images = shown(pixels)
        rng = np.random.default_rng(self.given.seed)
        settings = self.settings
        _train(network, optimizer, images, torch.from_numpy(labels), settings.test_steps, settings.test_batch, rng)
        with torch.no_grad():  # the statistics of the examples, to answer with
            network.train()(images)
        together = copy.deepcopy(network)

        def answers(network: nn.Module, questions: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return np.asarray(network(shown(questions)).argmax(dim=1).numpy())

        return {
            "inductive": lambda questions: answers(network.eval(), questions),
            "transductive": lambda questions: answers(together.train(), questions),
        }

    def state(self) -> dict[str, Any]:
        # Parameters only: the statistics are those of the last batch, whatever it was.
        return {
            "step": self.step,
            "network": dict(self.network.named_parameters()),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.network.load_state_dict(state["network"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])


def _train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    steps: int,
    batch: int,
    rng: np.random.Generator,
) -> list[float]:
    """Steps on batches that go through the images in ever new orders; the losses."""
    network.train()
    losses = []
    order: list[int] = []
    for _ in range(steps):
        while len(order) < min(batch, len(images)):
            order += rng.permutation(len(images)).tolist()
        rows = torch.tensor(order[:batch])
        del order[:batch]
        loss = F.cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses
