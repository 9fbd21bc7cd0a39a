from __future__ import annotations

import math

import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch
from torch import Tensor

from training.losses import nt_xent


def by_hand(first: Tensor, second: Tensor, temperature: float) -> float:
    """Equation 1 of the paper, word for word, averaged over both views of every image."""
    views = [v.double() / v.double().norm() for v in (*first, *second)]
    n = len(first)
    total = 0.0
    for i, view in enumerate(views):
        twin = i + n if i < n else i - n
        others = [math.exp(float(view @ other) / temperature) for k, other in enumerate(views) if k != i]
        total -= math.log(math.exp(float(view @ views[twin]) / temperature) / sum(others))
    return total / (2 * n)


def pair(n: int, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    first, second = 3 * torch.randn(2, n, dim, generator=generator)
    return first, second


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_it_is_the_sum_of_the_paper(n: int, temperature: float) -> None:
    first, second = pair(n)
    found = float(nt_xent(first, second, temperature=temperature))
    assert found == pytest.approx(by_hand(first, second, temperature), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("n", [2, 5, 64])
def test_identical_embeddings_are_told_apart_by_chance_only(n: int) -> None:
    same = torch.ones(n, 8)
    assert float(nt_xent(same, same, temperature=0.2)) == pytest.approx(math.log(2 * n - 1), rel=1e-5)


def test_views_that_agree_and_differ_from_all_others_cost_nothing() -> None:
    eye = torch.eye(6)
    assert float(nt_xent(eye, eye, temperature=0.05)) < 1e-6
    assert float(nt_xent(eye, eye.roll(1, 0), temperature=0.05)) > 10


def test_length_of_embeddings_and_order_of_views_do_not_matter() -> None:
    first, second = pair(6)
    expected = nt_xent(first, second, temperature=0.3)
    torch.testing.assert_close(nt_xent(100 * first, 0.01 * second, temperature=0.3), expected)
    torch.testing.assert_close(nt_xent(second, first, temperature=0.3), expected)


def test_half_precision_is_summed_in_float() -> None:
    first, second = pair(6)
    found = nt_xent(first.bfloat16(), second.bfloat16(), temperature=0.3)
    assert found.dtype == torch.float32
    expected = by_hand(first.bfloat16(), second.bfloat16(), 0.3)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_finite_and_brings_twins_together() -> None:
    first, second = pair(6)
    first.requires_grad_()
    before = nt_xent(first, second, temperature=0.3)
    before.backward()
    assert torch.isfinite(first.grad).all()
    assert nt_xent(first.detach() - first.grad, second, temperature=0.3) < before
