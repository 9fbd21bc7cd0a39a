"""The meta-objective: how much each self-supervised loss weighs, given, or learned along with the extractor.

Three ways. Fixed: as given. Uncertainty: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh
Losses", 2018, https://arxiv.org/abs/1705.07115: each loss is divided by a variance that is learned, and pays for it.
Learned: the weights follow the query loss of pseudo-tasks of images that no loss is trained on. Liu et al.,
"Auto-Lambda: Disentangling Dynamic Task Relationships", 2022, https://arxiv.org/abs/2202.03091: the gradient with
respect to a weight is how far that loss's step helps the query loss, and two forward passes tell it; in the line of
Ren et al., "Learning to Reweight Examples", 2018, https://arxiv.org/abs/1803.09050, and for self-supervised losses
Piergiovanni et al., "Evolving Losses for Unsupervised Video Representation Learning", 2020,
https://arxiv.org/abs/2002.12177.

Knows nothing of what the losses are. Nothing of it is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.resnet import ResNet
from training.heldout import HeldOut

Losses = Mapping[str, Tensor]

FLOOR = 0.05  # least share of the whole that a loss keeps, or it could never show that it is worth more
RATE = 0.01  # of the variances of `uncertainty`


class Weighting(Protocol):
    def total(self, losses: Losses) -> Tensor:
        """What the step minimises."""
        ...

    def step(self) -> None:
        """After the gradients of `total` are known."""
        ...

    def weights(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Fixed:
    """The weights that were given."""

    def __init__(self, given: Mapping[str, float]) -> None:
        self.given = dict(given)

    def total(self, losses: Losses) -> Tensor:
        return torch.stack([self.given[name] * loss for name, loss in losses.items()]).sum()

    def step(self) -> None:
        """Nothing is learned."""

    def weights(self) -> dict[str, float]:
        return dict(self.given)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing was kept."""


class _Numbers:
    """One learned number per loss, moved by Adam."""

    def __init__(self, given: Mapping[str, float], start: Tensor, device: torch.device, rate: float) -> None:
        self.names = list(given)
        self.numbers = nn.Parameter(start.to(device))
        self.optimizer = torch.optim.Adam([self.numbers], lr=rate)

    def state(self) -> dict[str, Any]:
        return {"numbers": self.numbers.detach(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.numbers.data.copy_(state["numbers"])
        self.optimizer.load_state_dict(state["optimizer"])


class Uncertainty(_Numbers):
    """Weight exp(-s) for a price of s, times what was given; s is learned by the same gradient as everything else."""

    def __init__(self, given: Mapping[str, float], device: torch.device) -> None:
        super().__init__(given, torch.zeros(len(given)), device, RATE)
        self.given = dict(given)

    def total(self, losses: Losses) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        priced = [
            self.given[name] * (torch.exp(-s) * losses[name] + s)
            for name, s in zip(self.names, self.numbers, strict=True)
        ]
        return torch.stack(priced).sum()

    def step(self) -> None:
        self.optimizer.step()

    def weights(self) -> dict[str, float]:
        values = torch.exp(-self.numbers.detach()).tolist()
        return {name: self.given[name] * value for name, value in zip(self.names, values, strict=True)}


class Learned(_Numbers):
    """Weights that sum to the number of losses, from a softmax; the first ones are those that were given.

    The losses are weighed as they are. Divided by their running means, as if they were of one scale, a small one
    (reconstruction) would count for more than what was given by as much as it is small.
    """

    def __init__(self, given: Mapping[str, float], tasks: HeldOut, device: torch.device, *, rate: float) -> None:
        self.tasks = tasks
        start = torch.tensor([max(weight, 1e-3) for weight in given.values()]).log()
        super().__init__(given, start, device, rate)

    def lambdas(self) -> Tensor:
        n = len(self.names)
        floor = min(FLOOR, 0.5 / n)
        return n * (floor + (1 - n * floor) * torch.softmax(self.numbers, dim=0))

    def total(self, losses: Losses) -> Tensor:
        return (self.lambdas().detach() * torch.stack([losses[name] for name in self.names])).sum()

    def step(self) -> None:
        """The weights move in `learn` alone."""

    def learn(
        self,
        backbone: ResNet,
        before: Sequence[Tensor],
        losses: Callable[[], Losses],
        size: int,
        rng: torch.Generator,
    ) -> None:
        """One step of Adam, by how the query loss after a step of the backbone answers to the weight of each loss."""
        shared = list(backbone.parameters())
        found = hypergradient(shared, before, losses, lambda: self.tasks.query_loss(backbone, size, rng))
        values = torch.tensor([found[name] for name in self.names], device=self.numbers.device)
        self.optimizer.zero_grad(set_to_none=True)
        (self.lambdas() * values).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def weights(self) -> dict[str, float]:
        return dict(zip(self.names, self.lambdas().detach().tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "tasks": self.tasks.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.tasks.restore(state["tasks"])


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Puts the buffers back: running statistics are to hold what was trained on, not what was tried."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def hypergradient(
    shared: Sequence[Tensor],
    before: Sequence[Tensor],
    losses: Callable[[], Losses],
    query_loss: Callable[[], Tensor],
    *,
    reach: float = 0.01,
) -> dict[str, float]:
    """How the query loss after a step answers to the weight of each loss in that step: -<g_i, grad of the query loss>.

    `shared` are the parameters as the step left them, `before` their values when it began, where the g_i are taken. The
    inner products come from central differences along the gradient, `reach` long: two evaluations of the losses
    instead of a gradient each. The step size is left out, for Adam, which takes the answer, does not see it.
    """
    direction = torch.autograd.grad(query_loss(), list(shared))
    norm = torch.stack([part.square().sum() for part in direction]).sum().sqrt().item()
    if norm == 0:
        return dict.fromkeys(losses(), 0.0)
    epsilon = reach / norm
    after = [parameter.detach().clone() for parameter in shared]
    found: list[dict[str, float]] = []
    with torch.no_grad():
        for sign in (1, -1):
            for parameter, start, part in zip(shared, before, direction, strict=True):
                parameter.copy_(start + sign * epsilon * part)
            found.append({name: loss.item() for name, loss in losses().items()})
        for parameter, value in zip(shared, after, strict=True):
            parameter.copy_(value)
    up, down = found
    return {name: -(up[name] - down[name]) / (2 * epsilon) for name in up}
