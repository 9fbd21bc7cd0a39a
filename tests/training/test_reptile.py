from __future__ import annotations

import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch

from training.reptile import interpolate


def test_the_start_moves_a_share_of_the_way_to_the_mean_of_the_ends() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    seen = []

    def train(task: float) -> float:
        seen.append([value.clone() for value in values])
        for value in values:
            value += task
        return 10 * task

    assert interpolate(values, [1.0, 5.0], train, 0.5) == 30  # the mean of what was given
    assert values[0].tolist() == [2.5, 3.5]
    assert values[1].item() == 4.5
    assert [[value.tolist() for value in one] for one in seen] == [[[1, 2], 3], [[1, 2], 3]]  # each from the start


def test_without_a_share_nothing_moves_and_with_all_of_it_the_mean_is_taken() -> None:
    def train(task: float) -> float:
        value.mul_(task)
        return 0.0

    value = torch.tensor([1.0])
    interpolate([value], [2.0, 4.0], train, 0.0)
    assert value.item() == 1
    interpolate([value], [2.0, 4.0], train, 1.0)
    assert value.item() == 3


def test_training_has_its_gradients_and_one_step_is_plain_descent() -> None:
    value = torch.tensor([2.0, -1.0], requires_grad=True)
    targets = [torch.tensor([0.0, 0.0]), torch.tensor([4.0, 2.0])]
    optimizer = torch.optim.SGD([value], lr=0.1)

    def train(target: torch.Tensor) -> float:
        loss = (value - target).square().sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    interpolate([value], targets, train, 1.0)
    expected = torch.tensor([2.0, -1.0]) - 0.1 * (torch.tensor([2.0, -1.0]) - torch.stack(targets).mean(dim=0))
    torch.testing.assert_close(value.detach(), expected)
    assert value.requires_grad
