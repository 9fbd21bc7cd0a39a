"""What every learner keeps, whatever its method."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from models.episode import Support
from models.errors import InvalidSupport
from models.head import Affine
from tests.models.learners.given import DIM, METHODS, arrays, clusters, converted, learner

pytestmark = pytest.mark.parametrize("method", METHODS)

UNEVEN = (1, 5, 2, 3)


def assert_same(a: Affine, b: Affine, *, tolerance: float = 1e-5) -> None:
    """Relative to the largest number of the map."""
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, float(np.abs(one).max())))


def accuracy(affine: Affine, query: np.ndarray, answers: np.ndarray) -> float:
    return float(((query @ affine.weight.T + affine.bias).argmax(axis=1) == answers).mean())


@pytest.mark.parametrize("unlabelled", [0, 7])
def test_the_same_support_gives_the_same_map_bit_for_bit(method: str, unlabelled: int) -> None:
    support, _, _ = clusters(UNEVEN, unlabelled=unlabelled)
    found = learner(method)
    first = found.adapt(support)
    found.adapt(clusters((2, 2, 2), seed=5)[0])  # what another task brings leaves no trace
    for again in (found.adapt(support), learner(method).adapt(support)):
        assert np.array_equal(first.weight, again.weight)
        assert np.array_equal(first.bias, again.bias)


def test_another_support_gives_another_map(method: str) -> None:
    one, other = (learner(method).adapt(clusters(UNEVEN, seed=seed)[0]) for seed in (0, 1))
    assert np.abs(one.weight - other.weight).max() > 0.1


def test_the_support_is_left_as_it_was(method: str) -> None:
    support, _, _ = clusters(UNEVEN, unlabelled=7)
    twin, _, _ = clusters(UNEVEN, unlabelled=7)
    learner(method).adapt(support)
    for name in ("features", "labels", "unlabelled"):
        assert np.array_equal(getattr(support, name), getattr(twin, name))


def test_the_order_of_examples_does_not_matter(method: str) -> None:
    support, _, _ = clusters(UNEVEN, unlabelled=7)
    rng = np.random.default_rng(1)
    order, other = rng.permutation(len(support.labels)), rng.permutation(7)
    assert support.unlabelled is not None
    shuffled = Support(support.features[order], support.labels[order], support.way, support.unlabelled[other])
    assert_same(learner(method).adapt(support), learner(method).adapt(shuffled))


def test_classes_in_another_order_give_the_rows_in_that_order(method: str) -> None:
    support, _, _ = clusters(UNEVEN, unlabelled=7)
    place = np.array([2, 0, 3, 1])  # class k becomes class place[k]
    moved = Support(support.features, place[support.labels], support.way, support.unlabelled)
    affine, other = learner(method).adapt(support), learner(method).adapt(moved)
    assert_same(affine, Affine(other.weight[place], other.bias[place]))


@pytest.mark.parametrize("shots", [(1, 1), (1,) * 5, (1, 20), UNEVEN, (1,) * 30, (3,) * 30])
def test_any_way_and_shots_give_a_row_per_class(method: str, shots: tuple[int, ...]) -> None:
    affine = learner(method).adapt(clusters(shots)[0])
    assert affine.weight.shape == (len(shots), DIM)
    assert affine.bias.shape == (len(shots),)
    assert affine.weight.dtype == affine.bias.dtype == np.float32
    assert np.isfinite(affine.weight).all()
    assert np.isfinite(affine.bias).all()


@pytest.mark.parametrize("labels", [[0, 2], [1, 2], [0, 0], [-1, 0], [0, 1, 3]])
def test_labels_with_a_gap_are_refused_before_anything_is_learned(method: str, labels: list[int]) -> None:
    with pytest.raises(InvalidSupport):
        learner(method).adapt(Support(np.ones((len(labels), DIM), np.float32), np.array(labels), max(2, max(labels))))


def test_no_unlabelled_examples_are_as_good_as_none(method: str) -> None:
    support, _, _ = clusters(UNEVEN)
    empty = dataclasses.replace(support, unlabelled=np.empty((0, DIM), np.float32))
    assert_same(learner(method).adapt(support), learner(method).adapt(empty), tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [(1,) * 5, (5,) * 5, (1, 2, 3, 4, 5), (3,) * 30])
def test_clusters_that_lie_apart_are_told_apart(method: str, shots: tuple[int, ...]) -> None:
    noise = 0.08 if len(shots) > 5 else 0.15
    scores = []
    for seed in range(5):
        support, query, answers = clusters(shots, queries=10, unlabelled=10, noise=noise, seed=seed)
        scores.append(accuracy(learner(method).adapt(support), query, answers))
    assert np.mean(scores) > 0.9


def test_shuffled_labels_teach_nothing(method: str) -> None:
    """The control of the test above: the score comes from the labels, not from the test."""
    scores = []
    for seed in range(5):
        support, query, answers = clusters((5,) * 5, queries=10, seed=seed)
        shuffled = np.random.default_rng(seed).permutation(support.labels)
        scores.append(accuracy(learner(method).adapt(Support(support.features, shuffled, 5)), query, answers))
    assert np.mean(scores) < 0.6


@pytest.mark.torch
@pytest.mark.parametrize("unlabelled", [0, 7])
@pytest.mark.parametrize("shots", [(1, 1), UNEVEN, (3,) * 30])
def test_numpy_and_torch_agree(method: str, shots: tuple[int, ...], unlabelled: int, torch: ModuleType) -> None:
    support, _, _ = clusters(shots, unlabelled=unlabelled)
    as_tensors = Support(
        torch.from_numpy(support.features),
        torch.from_numpy(support.labels),
        support.way,
        None if support.unlabelled is None else torch.from_numpy(support.unlabelled),
    )
    found = converted(learner(method), torch.from_numpy).adapt(as_tensors)
    assert isinstance(found.weight, torch.Tensor)
    assert_same(learner(method).adapt(support), Affine(found.weight.numpy(), found.bias.numpy()), tolerance=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("unlabelled", [0, 7])
def test_the_query_loss_reaches_the_features_and_every_learned_array(
    method: str, unlabelled: int, torch: ModuleType
) -> None:
    support, query, answers = clusters(UNEVEN, queries=5, unlabelled=unlabelled, noise=0.4)

    def leaf(value: np.ndarray) -> Any:
        return torch.from_numpy(value).double().requires_grad_()

    found = converted(learner(method), leaf)
    features = leaf(support.features)
    extra = None if support.unlabelled is None else leaf(support.unlabelled)
    weight, bias = found.adapt(Support(features, torch.from_numpy(support.labels), support.way, extra))
    logits = torch.from_numpy(query).double() @ weight.T + bias
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(answers)).backward()
    leaves = {name: getattr(found, name) for name in arrays(method)} | {"features": features}
    for name, value in leaves.items():
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name
        assert value.grad.abs().max() > 0, name
    # Every single example has its part, not only some.
    assert (features.grad.abs().amax(dim=1) > 0).all()
