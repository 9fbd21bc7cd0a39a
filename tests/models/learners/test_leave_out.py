"""Learners that classify each example as if what it shows had not been there, against truly learning without it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from models.episode import Support
from models.learners import LEARNERS
from models.report import fitted, held_out
from tests.models.learners.given import METHODS, NEARLY, clusters, converted, learner

CLOSED_FORM = [method for method in METHODS if hasattr(LEARNERS[method], "leave_out")]
SHOTS = [(2, 2), (3, 1, 6), (1, 5, 2, 3), (8,) * 12]

pytestmark = pytest.mark.parametrize("method", CLOSED_FORM)


def in_things(support: Support, size: int) -> np.ndarray:
    """What each example shows, where so many of a class show one thing; the last of a class is smaller."""
    rank = np.array([np.sum(support.labels[:k] == label) for k, label in enumerate(support.labels)])
    return np.asarray(support.labels * len(rank) + rank // size)


def learned_without(found: Any, support: Support, thing: np.ndarray) -> np.ndarray:
    """Logits [size, way] of the examples of a thing by the map of the others."""
    kept = np.setdiff1d(np.arange(len(support.labels)), thing)
    weight, bias = found.adapt(Support(support.features[kept], support.labels[kept], support.way))
    return np.asarray(support.features[thing] @ weight.T + bias)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shots", SHOTS)
def test_each_thing_scores_as_if_the_task_had_been_learned_without_it(
    method: str, shots: tuple[int, ...], size: int
) -> None:
    support, _, _ = clusters(shots, noise=0.5)
    things = in_things(support, size)
    logits = learner(method).leave_out(support, things)
    assert logits.shape == (sum(shots), len(shots))
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    counts = np.bincount(support.labels)
    checked = 0
    for number in np.unique(things):
        thing = np.flatnonzero(things == number)
        left = counts[support.labels[thing[0]]] - len(thing)
        if left:
            expected = learned_without(learner(method), support, thing)
            within = NEARLY.get(method, 1e-5)
            np.testing.assert_allclose(logits[thing], expected, rtol=0, atol=within * max(1, np.abs(expected).max()))
            if method in NEARLY and left > size:
                assert np.corrcoef(logits[thing].ravel(), expected.ravel())[0, 1] > 0.95
            checked += len(thing)
    assert checked == sum(n for n in shots if n > size)


def test_it_is_not_what_the_whole_support_set_says(method: str) -> None:
    """The control of the test above: leaving an example out makes a difference that it would notice."""
    support, _, _ = clusters((3, 3), noise=0.5)
    found = learner(method)
    weight, bias = found.adapt(support)
    assert np.abs(found.leave_out(support, in_things(support, 1)) - (support.features @ weight.T + bias)).max() > 0.1


@pytest.mark.parametrize("shots", [(1, 1), (1,) * 5, (1, 9)])
def test_an_only_example_gets_numbers_and_no_warning(method: str, shots: tuple[int, ...]) -> None:
    support, _, _ = clusters(shots)
    assert np.isfinite(learner(method).leave_out(support, in_things(support, 1))).all()


@pytest.mark.parametrize("shots", [(3, 3), (9, 9, 1)])
def test_a_class_that_shows_one_thing_gets_numbers_and_no_warning(method: str, shots: tuple[int, ...]) -> None:
    support, _, _ = clusters(shots)
    assert np.isfinite(learner(method).leave_out(support, support.labels)).all()


@pytest.mark.torch
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("shots", SHOTS)
def test_torch_leaves_out_as_numpy_does(method: str, shots: tuple[int, ...], size: int, torch: ModuleType) -> None:
    support, _, _ = clusters(shots, noise=0.5)
    things = in_things(support, size)
    tensors = Support(torch.from_numpy(support.features), torch.from_numpy(support.labels), support.way)
    found = converted(learner(method), torch.from_numpy).leave_out(tensors, things)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    expected = learner(method).leave_out(support, things)
    tell = [len(np.unique(things[support.labels == label])) > 1 for label in support.labels]  # others mean nothing
    found, expected = found.numpy()[tell], expected[tell]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("shots", SHOTS)
def test_both_at_once_are_both(method: str, shots: tuple[int, ...]) -> None:
    support, _, _ = clusters(shots, noise=0.5, unlabelled=9)
    found = learner(method)
    affine, leave_out = fitted(found, support)
    held = leave_out()
    expected = held_out(found, support)
    np.testing.assert_allclose(affine.weight, found.adapt(support).weight, rtol=1e-6)
    np.testing.assert_allclose(affine.bias, found.adapt(support).bias, rtol=1e-6)
    np.testing.assert_allclose(held.logits, expected.logits, rtol=1e-6)
    assert (held.index.tolist(), held.estimate) == (expected.index.tolist(), expected.estimate)
