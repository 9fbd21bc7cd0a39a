from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.calibration import Rejection, Temperature, energy
from models.learners.prototype import Prototype
from service.answering import answered
from service.stores import Record
from service.support import learn
from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

from training import honesty
from training.config import EvaluateConfig
from training.episodes import Pool, frozen


def test_a_forecaster_that_is_right_as_often_as_it_says_has_no_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1.0, 40_000)
    assert honesty.ece(confidence, rng.random(40_000) < confidence) < 0.01
    assert honesty.ece(np.full(1000, 0.99), np.arange(1000) % 2 == 0) == pytest.approx(0.49)


def test_who_is_quite_sure_is_in_one_bin_with_who_is_nearly_so() -> None:
    assert honesty.ece(np.array([1.0, 0.95]), np.array([False, True])) == pytest.approx(0.475)


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


def test_each_figure_is_that_of_the_answers_that_the_service_gives() -> None:
    """A task is learned and asked about for each episode, as the service does both; some of its examples are twins."""
    rng = np.random.default_rng(0)
    labels, way, shot = np.repeat(np.arange(12), 30), 4, 6
    features = rng.normal(size=(12, 16))[labels] + 1.5 * rng.normal(size=(360, 16))
    features[1::2] = features[::2]
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    learner, temperature = Prototype(np.float32(np.log(10))), Temperature(0.1)
    flat = (0.0, 0.0, 0.0, 1.0, 0.0)
    rejection = Rejection(flat, (-1.0, 0.0, 0.0, 0.0, 0.0), flat, flat, quantiles=tuple(np.linspace(-3, 3, 41)))
    manifest = SimpleNamespace(rejections={"prototype": rejection}, methods={"prototype": temperature}, twins=0.01)
    artifact: Any = SimpleNamespace(learners=lambda: {"prototype": learner}, manifest=manifest)
    given = {"artifact": Path("none"), "data": Path("none"), "way": str(way), "shot": str(shot)}
    config = EvaluateConfig(**given, foreign=3, episodes=40, queries=8)
    pool = Pool.of(labels)
    (found,) = honesty.measure(artifact, features, pool, config)
    false, caught, areas, sure, right = [], [], [], [], []
    for task in frozen(pool, way=way + 3, shot=shot, queries=8, count=40, seed=config.seed):
        mine = task.labels < way
        own = features[task.support[mine]].astype(np.float16)
        ids, none = tuple(map(str, range(len(own)))), np.zeros((0, 16), np.float16)
        record = Record("", "prototype", tuple("abcd"), ids, task.labels[mine].astype(np.int32), own, none, created=0)
        head = learn(record, learner, temperature, rejection, device="cpu", near=0.01).head
        rows, genuine = answered(features[task.query], head, rejection), task.answers < way
        turned_away = np.array([row.is_none(0.05) for row in rows])
        false.append(100 * turned_away[genuine].mean())
        caught.append(100 * turned_away[~genuine].mean())
        energies = energy(head.logits(features[task.query]))
        areas.append(100 * np.mean([a > b for a in energies[genuine] for b in energies[~genuine]]))
        probabilities = np.array([row.probabilities for row in rows])[genuine]
        sure.extend(probabilities.max(axis=1))
        right.extend(probabilities.argmax(axis=1) == task.answers[genuine])
    assert found.false_reject == pytest.approx(np.mean(false), abs=0.3)
    assert found.foreign_rejected == pytest.approx(np.mean(caught), abs=0.3)
    assert found.auroc == pytest.approx(np.mean(areas), abs=0.1)
    assert found.ece == pytest.approx(100 * honesty.ece(np.array(sure), np.array(right)), abs=0.3)
    assert found.false_reject_interval == pytest.approx(1.96 * np.std(false, ddof=1) / np.sqrt(40), abs=0.1)
    assert found.auroc_interval == pytest.approx(1.96 * np.std(areas, ddof=1) / np.sqrt(40), abs=0.05)


def test_scores_that_are_the_same_count_half() -> None:
    same = np.array([1.0, 2.0, 3.0])
    assert honesty.auroc(np.zeros(3), np.zeros(4)) == 0.5
    assert honesty.auroc(same, same) == 0.5
    assert honesty.auroc(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == pytest.approx(3.5 / 4)
