"""MAML on the full network: a start from which one gradient step on the examples answers the questions.

Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017,
https://arxiv.org/abs/1703.03400. The inner loop takes gradient steps on the support set; the outer loop differentiates
the query loss through them (second order), or takes the adapted parameters as constants (first order). Published for
Omniglot 5-way 1-shot: one step of 0.4, three of them in the test, Adam 1e-3; pytorch-maml uses 15 questions a class.

Published figures are transductive: batch normalisation uses the statistics of the query batch. Both modes are
answered here; training is on the published one. Knows nothing of files or evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from training.baselines import Answers, Given
from training.baselines.conv4 import Conv4, Shrink, shown
from training.episodes import Pool


@dataclass(frozen=True, slots=True)
class Settings:
    steps: int = 60_000
    tasks: int = 16
    train_queries: int = 15
    inner_steps: int = 1
    inner_lr: float = 0.4
    test_steps: int = 3
    lr: float = 1e-3
    final_lr: float = 1e-3  # reached in a straight line
    order: str = "second"
    width: int = 64
    shrink: Shrink = "pool"


class Maml:
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
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr)

    def adapted(self, images: Tensor, labels: Tensor, *, steps: int, second: bool) -> dict[str, Tensor]:
        """The parameters after some gradient steps from the start, as values: the network stays as it is."""
        parameters: dict[str, Tensor] = dict(self.network.named_parameters())
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(self.network, parameters, (images,)), labels)
            gradients = torch.autograd.grad(loss, tuple(parameters.values()), create_graph=second)
            parameters = {
                name: value - self.settings.inner_lr * gradient
                for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
            }
        return parameters

    def advance(self, pixels: np.ndarray, pool: Pool) -> float:
        """One Adam step on the mean query loss of some tasks."""
        settings, given = self.settings, self.given
        share = self.step / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr + share * (settings.final_lr - settings.lr)
        rng = np.random.default_rng([given.seed, self.step])
        self.network.train()
        self.optimizer.zero_grad()
        total = 0.0
        for _ in range(settings.tasks):
            shots = np.full(given.way, given.shot)
            task = pool.episode(rng, way=given.way, shots=shots, queries=settings.train_queries)
            parameters = self.adapted(
                shown(pixels[task.support]),
                torch.from_numpy(task.labels),
                steps=settings.inner_steps,
                second=settings.order == "second",
            )
            logits = functional_call(self.network, parameters, (shown(pixels[task.query]),))
            loss = F.cross_entropy(logits, torch.from_numpy(task.answers)) / settings.tasks
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self.optimizer.step()
        self.step += 1
        return total

    def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Mapping[str, Answers]:
        """Raises ValueError for another way than the head was made for: it has a row for each class."""
        if way != self.given.way:
            raise ValueError(f"trained for {self.given.way} classes, not {way}")
        images = shown(pixels)
        self.network.train()
        parameters = self.adapted(images, torch.from_numpy(labels), steps=self.settings.test_steps, second=False)
        parameters = {name: value.detach() for name, value in parameters.items()}
        with torch.no_grad():  # what the adapted network makes of the examples: the statistics to answer with
            functional_call(self.network, parameters, (images,))
        kept = {**parameters, **{name: value.clone() for name, value in self.network.named_buffers()}}

        def answers(questions: np.ndarray, *, together: bool) -> np.ndarray:
            self.network.train(together)
            state = parameters if together else kept  # in training mode the statistics kept would be overwritten
            with torch.no_grad():
                logits = functional_call(self.network, state, (shown(questions),))
            return np.asarray(logits.argmax(dim=1).numpy())

        return {
            "inductive": lambda questions: answers(questions, together=False),
            "transductive": lambda questions: answers(questions, together=True),
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
