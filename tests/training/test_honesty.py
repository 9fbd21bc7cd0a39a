from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.calibration import Rejection, Temperature
from models.learners.prototype import Prototype
from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

from training import honesty
from training.config import EvaluateConfig
from training.episodes import Pool


def test_a_forecaster_that_is_right_as_often_as_it_says_has_no_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1.0, 40_000)
    assert honesty.ece(confidence, rng.random(40_000) < confidence) < 0.01
    assert honesty.ece(np.full(1000, 0.99), np.arange(1000) % 2 == 0) == pytest.approx(0.49)


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    genuine, foreign = np.array([3.0, 1.0, 5.0]), np.array([2.0, 0.0])
    pairs = np.mean([[a > b for b in foreign] for a in genuine])
    assert honesty.auroc(genuine, foreign) == pytest.approx(pairs)
    assert honesty.auroc(foreign, genuine) == pytest.approx(1 - pairs)


def test_what_a_tasks_own_examples_say_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service answers: see service/support.py, learn."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 30)
    features = rng.normal(size=(12, 16))[labels] + 2.5 * rng.normal(size=(360, 16))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    learners = {"prototype": Prototype(np.float32(np.log(20)))}  # far too sure
    rejection = Rejection(*[(0.0, 0.0, 0.0, 1.0, 0.0)] * 4, quantiles=(-3.0, 3.0))
    manifest = SimpleNamespace(rejections={"prototype": rejection}, methods={"prototype": Temperature()}, twins=0.0)
    artifact: Any = SimpleNamespace(learners=lambda: learners, manifest=manifest)
    config = EvaluateConfig(artifact=Path("none"), data=Path("none"), way="5", shot="5", foreign=2, episodes=60)
    (found,) = honesty.measure(artifact, features, Pool.of(labels), config)
    monkeypatch.setattr(honesty, "divisor", lambda temperature, *_: temperature)
    (before,) = honesty.measure(artifact, features, Pool.of(labels), config)
    assert found.ece < 0.7 * before.ece
    assert found.auroc != before.auroc  # energies are read with it


def test_scores_that_are_the_same_count_half() -> None:
    same = np.array([1.0, 2.0, 3.0])
    assert honesty.auroc(np.zeros(3), np.zeros(4)) == 0.5
    assert honesty.auroc(same, same) == 0.5
    assert honesty.auroc(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == pytest.approx(3.5 / 4)
