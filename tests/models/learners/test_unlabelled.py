from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from models.learners.unlabelled import kinship, shares, trust
from tests.models.learners.given import DIM, clusters, learner, unit


def crowd(count: int, each: int, *, noise: float = 0.15, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian clusters [count * each, DIM] on the sphere, and the cluster of each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(count), each)
    found = unit(unit(rng.standard_normal((count, DIM)))[labels] + noise * rng.standard_normal((len(labels), DIM)))
    return found.astype(np.float32), labels


def test_shares_are_those_of_the_classes_and_of_none() -> None:
    extra, labels = crowd(6, 10)
    means = np.stack([extra[labels == k].mean(axis=0) for k in range(3)])
    found = shares(means, extra)
    assert found.shape == (60, 3)
    assert (found >= 0).all()
    assert (found.sum(axis=1) < 1).all()
    known = labels < 3
    assert (found[known].argmax(axis=1) == labels[known]).all()
    assert found[known].max(axis=1).mean() > 0.8
    assert found[~known].sum(axis=1).mean() < 0.3  # the cluster of no class has them


@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("foreign", [0, 5])
def test_examples_of_the_same_classes_are_kin_though_others_are_among_them(shot: int, foreign: int) -> None:
    found = []
    for seed in range(20):
        everything, labels = crowd(5 + foreign, 20 + shot, seed=seed)
        mine = (np.arange(len(labels)) % (20 + shot) < shot) & (labels < 5)
        rest = np.arange(len(labels)) % (20 + shot) >= shot
        found.append(float(kinship(everything[mine], everything[rest])))
    assert abs(np.mean(found)) < 0.5
    assert np.mean(np.array(found) > -0.5) > 0.7


@pytest.mark.parametrize("shot", [1, 5])
def test_examples_of_other_classes_are_strangers_and_count_nothing(shot: int) -> None:
    for seed in range(20):
        everything, labels = crowd(10, 20, seed=seed)
        mine = (labels < 5) & (np.arange(len(labels)) % 20 < shot)
        assert kinship(everything[mine], everything[labels >= 5]) < -0.8
        assert trust(everything[mine], everything[labels >= 5]) == 0


def test_strangers_leave_every_map_as_it_was() -> None:
    for method in ("prototype", "whitened", "gradient", "lstm"):
        support, _, _ = clusters((1, 1, 1))
        strange = dataclasses.replace(support, unlabelled=crowd(4, 20, seed=9, noise=0.1)[0])
        plain, found = learner(method).adapt(support), learner(method).adapt(strange)
        np.testing.assert_allclose(found.weight, plain.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_unlabelled_examples_give_finite_numbers(count: int) -> None:
    examples, _ = crowd(3, 2)
    for extra in (crowd(1, count, seed=1)[0], np.repeat(examples[:1], count, axis=0), np.zeros((count, DIM), "f4")):
        assert np.isfinite(kinship(examples, extra))
        assert 0 <= trust(examples, extra) <= 1
