from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from models.arrays import softmax
from models.episode import Support
from tests.models.learners.given import clusters, learner


def support_loss(support: Support, weight: np.ndarray, bias: np.ndarray) -> float:
    chances = softmax(support.features @ weight.T + bias)[np.arange(len(support.labels)), support.labels]
    return float(np.mean([-np.log(chances[support.labels == k]).mean() for k in range(support.way)]))


def test_without_steps_it_is_the_prototypes() -> None:
    support, _, _ = clusters((1, 5, 2), unlabelled=4)
    start = learner("gradient", log_steps=np.empty(0, np.float32)).adapt(support)
    assert np.array_equal(start.weight, learner("prototype").adapt(support).weight)


def test_each_step_lowers_the_loss_on_the_support_set() -> None:
    support, _, _ = clusters((1, 5, 2), noise=0.6)
    steps = np.log(np.full(6, 0.5, np.float32))
    losses = [
        support_loss(support, *learner("gradient", log_scale=np.float32(1), log_steps=steps[:k]).adapt(support))
        for k in range(7)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.torch
def test_the_closed_form_is_the_gradient_that_autograd_finds(torch: ModuleType) -> None:
    """Of the mean cross-entropy, every class weighing the same; the bias goes a tenth of the way."""
    support, _, _ = clusters((1, 5, 2), noise=0.5)
    features, labels = torch.from_numpy(support.features).double(), torch.from_numpy(support.labels)
    balance = torch.tensor([1.0, 1 / 5, 1 / 2], dtype=torch.float64)[labels]
    start = learner("prototype", log_scale=np.float32(1)).adapt(support).weight
    weight = torch.from_numpy(start).double().requires_grad_()
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for step in (0.3, 0.2, 0.1):
        losses = torch.nn.functional.cross_entropy(features @ weight.T + bias, labels, reduction="none")
        towards_weight, towards_bias = torch.autograd.grad((losses * balance).sum(), (weight, bias))
        weight = (weight - step * towards_weight).detach().requires_grad_()
        bias = (bias - 0.1 * step * towards_bias).detach().requires_grad_()
    found = learner("gradient", log_scale=np.float32(1)).adapt(support)
    np.testing.assert_allclose(found.weight, weight.detach().numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.bias, bias.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert np.abs(found.weight - start).max() > 0.05  # so that agreement is more than standing still
