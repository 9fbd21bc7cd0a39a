"""MANN: an LSTM that reads the examples one by one and keeps them in an external memory.

Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", 2016, https://arxiv.org/abs/1605.06065. Inputs
are an image and the label of the image before it; the LSTM writes a key to the slot that it read last or to the one
used least, and reads by similarity of keys. Nothing is adapted by gradient: the state after the examples is what was
learned. The paper reads raw pixels at 20 x 20, without a convolution.

Smaller than the paper's: one read head of four, and the loss is taken on the questions alone, each asked as the next
image after the examples. A fixed number of classes, and the answer depends on the order of the examples: reasons why
it is a baseline only. Inductive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.baselines import Answers, Given
from training.baselines.conv4 import shown
from training.episodes import Pool


@dataclass(frozen=True, slots=True)
class Settings:
    steps: int = 100_000
    tasks: int = 16
    train_queries: int = 5
    side: int = 20
    hidden: int = 200
    slots: int = 128
    width: int = 40
    forget: float = 0.99
    lr: float = 1e-3


class State(NamedTuple):
    """After some images of b sequences."""

    hidden: Tensor  # [b, hidden]
    cell: Tensor  # [b, hidden]
    memory: Tensor  # [b, slots, width]
    usage: Tensor  # [b, slots]
    looked: Tensor  # [b, slots], the last read weights
    read: Tensor  # [b, width]


class Network(nn.Module):
    def __init__(self, settings: Settings, given: Given):
        super().__init__()
        self.settings = settings
        self.way = given.way
        inputs = given.channels * settings.side**2 + given.way + settings.width
        self.cell = nn.LSTMCell(inputs, settings.hidden)
        self.key = nn.Linear(settings.hidden, settings.width)
        self.gate = nn.Linear(settings.hidden, 1)
        self.log_focus = nn.Parameter(torch.tensor(2.0))  # sharpness of reading; cosines alone cannot be sharp
        self.out = nn.Linear(settings.hidden + settings.width, given.way)

    def start(self, count: int) -> State:
        settings = self.settings
        zeros = torch.zeros
        return State(
            zeros(count, settings.hidden),
            zeros(count, settings.hidden),
            torch.full((count, settings.slots, settings.width), 1e-6),
            zeros(count, settings.slots),
            zeros(count, settings.slots),
            zeros(count, settings.width),
        )

    def forward(self, images: Tensor, before: Tensor, state: State) -> tuple[Tensor, State]:
        """images [b, pixels] and the one-hot labels [b, way] of the images before them -> logits [b, way]."""
        hidden, cell = self.cell(torch.cat([images, before, state.read], dim=1), (state.hidden, state.cell))
        key = torch.tanh(self.key(hidden))
        gate = torch.sigmoid(self.gate(hidden))
        least = F.one_hot(state.usage.argmin(dim=1), self.settings.slots).to(key.dtype)
        write = gate * state.looked + (1 - gate) * least
        memory = state.memory * (1 - least)[:, :, None] + write[:, :, None] * key[:, None, :]
        cosines = F.cosine_similarity(memory, key[:, None, :], dim=2)
        looked = torch.softmax(self.log_focus.exp() * cosines, dim=1)
        read = (looked[:, None, :] @ memory)[:, 0]
        usage = self.settings.forget * state.usage + looked + write
        logits = self.out(torch.cat([hidden, read], dim=1))
        return logits, State(hidden, cell, memory, usage, looked, read)

    def listen(self, images: Tensor, labels: Tensor) -> tuple[State, Tensor]:
        """images [b, n, pixels], labels [b, n] -> the state after them, and the label that comes with the next."""
        state = self.start(len(images))
        before = torch.zeros(len(images), self.way)
        for at in range(images.shape[1]):
            _, state = self(images[:, at], before, state)
            before = F.one_hot(labels[:, at], self.way).float()
        return state, before

    def ask(self, questions: Tensor, state: State, before: Tensor) -> Tensor:
        """questions [b, q, pixels], each as the next image of its sequence -> logits [b * q, way]."""
        count = questions.shape[1]
        each = State(*(value.repeat_interleave(count, dim=0) for value in state))
        logits: Tensor = self(questions.flatten(0, 1), before.repeat_interleave(count, dim=0), each)[0]
        return logits


class Mann:
    labels = "training classes"

    def __init__(self, settings: Settings, given: Given):
        self.settings = settings
        self.given = given
        self.steps = settings.steps
        self.step = 0
        torch.manual_seed(given.seed)
        self.network = Network(settings, given)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr)

    def _seen(self, pixels: np.ndarray) -> Tensor:
        """uint8 [n, H, W, C] -> [n, C * side * side]."""
        return F.adaptive_avg_pool2d(shown(pixels), self.settings.side).flatten(1)

    def advance(self, pixels: np.ndarray, pool: Pool) -> float:
        """One step on some tasks at once, the examples of each in an order of its own."""
        given, settings = self.given, self.settings
        rng = np.random.default_rng([given.seed, self.step])
        shots = np.full(given.way, given.shot)
        tasks = [
            pool.episode(rng, way=given.way, shots=shots, queries=settings.train_queries) for _ in range(settings.tasks)
        ]
        orders = [rng.permutation(len(task.support)) for task in tasks]
        mixed = list(zip(tasks, orders, strict=True))
        support = torch.stack([self._seen(pixels[task.support[order]]) for task, order in mixed])
        labels = torch.stack([torch.from_numpy(task.labels[order]) for task, order in mixed])
        questions = torch.stack([self._seen(pixels[task.query]) for task in tasks])
        answers = torch.cat([torch.from_numpy(task.answers) for task in tasks])
        logits = self.network.ask(questions, *self.network.listen(support, labels))
        loss = F.cross_entropy(logits, answers)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Mapping[str, Answers]:
        """Raises ValueError for another way than it was trained for."""
        if way != self.given.way:
            raise ValueError(f"trained for {self.given.way} classes, not {way}")
        order = np.random.default_rng(self.given.seed).permutation(len(labels))
        with torch.no_grad():
            heard = self.network.listen(self._seen(pixels[order])[None], torch.from_numpy(labels[order])[None])

        def answers(questions: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                logits = self.network.ask(self._seen(questions)[None], *heard)
            return np.asarray(logits.argmax(dim=1).numpy())

        return {"inductive": answers}

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "network": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
