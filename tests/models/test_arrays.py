from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from models.arrays import class_means, fetch, inverse, normalise, one_hot, place, sigmoid, softmax, square_sum


def test_one_hot_takes_its_type_from_what_it_will_meet() -> None:
    rows = one_hot(np.array([2, 0]), 3, np.zeros(1, np.float32))
    assert rows.dtype == np.float32
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_softmax_gives_shares_that_follow_the_logits() -> None:
    np.testing.assert_allclose(softmax(np.log([[1.0, 2.0, 5.0]])), [[1 / 8, 2 / 8, 5 / 8]])


def test_softmax_and_sigmoid_stand_very_large_numbers_in_single_precision() -> None:
    """An overflow would be a warning, and a warning is an error here."""
    large = np.array([[1e4, 0, -1e4]], np.float32)
    assert softmax(large).tolist() == [[1, 0, 0]]
    assert sigmoid(large).tolist() == [[1, 0.5, 0]]


def test_sigmoid_is_the_logistic_function() -> None:
    x = np.linspace(-20, 20, 81)
    np.testing.assert_allclose(sigmoid(x), 1 / (1 + np.exp(-x)), atol=1e-12)


def test_normalise_keeps_the_direction_and_leaves_a_row_of_zeros() -> None:
    rows = normalise(np.array([[3.0, 4.0], [0.0, 0.0], [3e3, 4e3]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [0.6, 0.8]], rtol=1e-9)


@pytest.mark.torch
def test_the_gradient_of_normalise_is_finite_even_at_zero(torch: ModuleType) -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    normalise(rows).sum().backward()
    assert torch.isfinite(rows.grad).all()


def test_square_sum_is_the_squared_length() -> None:
    assert square_sum(np.array([[3.0, 4.0], [1.0, 0.0]])).tolist() == [25, 1]


def test_class_means_weigh_each_example_by_its_share_in_a_class() -> None:
    features = np.array([[0.0, 0.0], [4.0, 8.0], [2.0, 2.0]])
    weights = np.array([[1.0, 0.0], [0.25, 0.75], [0.0, 0.25]])
    np.testing.assert_allclose(class_means(features, weights), [[0.8, 1.6], [3.5, 6.5]])


@pytest.mark.parametrize("n", [1, 64, 65, 200])
def test_the_inverse_of_a_scatter_is_that_of_any_matrix(n: int) -> None:
    rows = np.random.default_rng(n).normal(size=(2 * n, n))
    scatter = rows.T @ rows + np.eye(n)
    np.testing.assert_allclose(inverse(scatter), np.linalg.inv(scatter), atol=1e-12)


def test_on_the_cpu_nothing_is_copied_or_changed_and_torch_is_not_asked() -> None:
    value = np.arange(3.0)
    assert place(value, "cpu") is value
    assert fetch(value) is value


@pytest.mark.torch
def test_elsewhere_an_array_becomes_a_tensor_there(torch: ModuleType) -> None:
    placed = place(np.arange(6.0).reshape(2, 3).T, "meta")
    assert (placed.device.type, tuple(placed.shape), placed.dtype) == ("meta", (3, 2), torch.float64)


@pytest.mark.torch
def test_a_tensor_that_is_being_trained_can_be_fetched(torch: ModuleType) -> None:
    fetched = fetch(torch.tensor([1.0, 2.0], requires_grad=True) * 2)
    assert isinstance(fetched, np.ndarray)
    assert fetched.tolist() == [2, 4]
