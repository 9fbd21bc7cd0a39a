"""Learners that classify each example as if it had not been there, against truly learning without it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from models.episode import Support
from models.learners import LEARNERS
from models.report import fitted, held_out
from tests.models.learners.given import METHODS, clusters, converted, learner

CLOSED_FORM = [method for method in METHODS if hasattr(LEARNERS[method], "leave_one_out")]
# Where classes weigh by their shots, those left are learned from as they weighed with the one left out; and what the
# cell of the LSTM answers, it answers for all.
NEARLY = {"ridge": 0.5, "lstm": 0.35}
SHOTS = [(2, 2), (3, 1, 6), (1, 5, 2, 3), (8,) * 12]

pytestmark = pytest.mark.parametrize("method", CLOSED_FORM)


def learned_without(found: Any, support: Support, index: int) -> np.ndarray:
    """Logits [way] of an example by the map of the others."""
    kept = np.delete(np.arange(len(support.labels)), index)
    weight, bias = found.adapt(Support(support.features[kept], support.labels[kept], support.way))
    return np.asarray(support.features[index] @ weight.T + bias)


@pytest.mark.slow
@pytest.mark.parametrize("shots", SHOTS)
def test_each_example_scores_as_if_the_task_had_been_learned_without_it(method: str, shots: tuple[int, ...]) -> None:
    support, _, _ = clusters(shots, noise=0.5)
    logits = learner(method).leave_one_out(support)
    assert logits.shape == (sum(shots), len(shots))
    assert logits.dtype == np.float32
    counts = np.bincount(support.labels)
    checked = 0
    for index, label in enumerate(support.labels):
        if counts[label] > 1:
            expected = learned_without(learner(method), support, index)
            within = NEARLY.get(method, 1e-5)
            np.testing.assert_allclose(logits[index], expected, rtol=0, atol=within * max(1, np.abs(expected).max()))
            if method in NEARLY and counts[label] > 2:
                assert np.corrcoef(logits[index], expected)[0, 1] > 0.95
            checked += 1
    assert checked == sum(n for n in shots if n > 1)


def test_it_is_not_what_the_whole_support_set_says(method: str) -> None:
    """The control of the test above: leaving an example out makes a difference that it would notice."""
    support, _, _ = clusters((3, 3), noise=0.5)
    found = learner(method)
    weight, bias = found.adapt(support)
    assert np.abs(found.leave_one_out(support) - (support.features @ weight.T + bias)).max() > 0.1


@pytest.mark.parametrize("shots", [(1, 1), (1,) * 5, (1, 9)])
def test_an_only_example_gets_numbers_and_no_warning(method: str, shots: tuple[int, ...]) -> None:
    assert np.isfinite(learner(method).leave_one_out(clusters(shots)[0])).all()


@pytest.mark.torch
@pytest.mark.parametrize("shots", SHOTS)
def test_torch_leaves_out_as_numpy_does(method: str, shots: tuple[int, ...], torch: ModuleType) -> None:
    support, _, _ = clusters(shots, noise=0.5)
    tensors = Support(torch.from_numpy(support.features), torch.from_numpy(support.labels), support.way)
    found = converted(learner(method), torch.from_numpy).leave_one_out(tensors)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    expected = learner(method).leave_one_out(support)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


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
