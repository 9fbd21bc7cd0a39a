"""What every step of a pretraining needs, whatever is read: random numbers, precision, learning rate, optimizer, state.

Every random choice of step s is drawn from a generator seeded with (seed, s), so a checkpoint holds no random state
and a run that was killed ends at the same weights, bit for bit, as one that was not (on one kind of CPU and the same
number of threads). Knows nothing of what is read or asked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from training.config import PretrainConfig
from training.objective import Weighting


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """ "auto" follows from the device alone, for a clock would give one command now these weights and now others."""
    if name != "auto":
        return name
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if able else "float32"


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, the same whenever it is run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


def trial(seed: int, step: int) -> torch.Generator:
    """Those of what a step tries on held-out images: others, so that the step's own stay as they are."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def learning_rate(step: int, steps: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a half cosine to zero."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def optimizer(network: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """Of all that is learned; offsets and what normalises do not decay."""
    learned = [p for p in network.parameters() if p.requires_grad]
    decayed = [p for p in learned if p.ndim > 1]
    plain = [p for p in learned if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)


class Stepper(ABC):
    """One pretraining, step by step, and all of its state."""

    config: PretrainConfig
    network: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    weighting: Weighting
    step: int
    precision: str

    @abstractmethod
    def take_step(self) -> dict[str, Tensor]:
        """One step; returns the losses by name without waiting for the device, which then always has the next to do."""

    def advance(self) -> dict[str, float]:
        """The same, with the losses as numbers."""
        return {name: loss.item() for name, loss in self.take_step().items()}

    def state(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "precision": self.precision,
            "network": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "weighting": self.weighting.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.precision = state["precision"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.config.weighting != "fixed":
            self.weighting.restore(state["weighting"])
