from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.calibration import Temperature, energy
from tests.models.learners.given import DIM, clusters, learner, unit
from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

from training import scores
from training.config import EvaluateConfig
from training.episodes import Pool


def an_artifact(**learners: Any) -> Any:
    manifest = SimpleNamespace(methods={"whitened": Temperature()})
    return SimpleNamespace(learners=lambda: learners, manifest=manifest)


def config(**given: object) -> EvaluateConfig:
    defaults = {"artifact": Path("a"), "data": Path("d"), "way": "4", "shot": "1,3", "queries": 5, "episodes": 30}
    return EvaluateConfig(**{**defaults, "foreign": 4, "scores": True, **given})


def test_the_energy_is_that_of_the_head() -> None:
    support, query, _ = clusters((1, 3, 2), queries=4)
    weight, bias = learner("whitened").adapt(support)
    found = scores.scores(learner("whitened"), learner("lstm").slots, support, query, 2.0)
    np.testing.assert_allclose(found["energy"], energy((query @ weight.T + bias) / 2), rtol=1e-4, atol=1e-4)
    assert all(values.shape == (12,) and np.isfinite(values).all() for values in found.values())


def test_each_score_is_what_its_name_says() -> None:
    support, query, _ = clusters((1, 3, 2), queries=4)
    given = learner("whitened")
    found = scores.scores(given, learner("lstm").slots, support, query, 2.0)
    x, examples = query @ given.worked_out, support.features @ given.worked_out
    means = np.stack([examples[support.labels == label].mean(axis=0) for label in range(3)])
    weight, bias = given.adapt(support)
    logits = (query @ weight.T + bias) / 2

    def likest(others: np.ndarray) -> list[float]:
        return [max(unit(row) @ unit(other) for other in others) for row in x]

    expected = {
        "largest logit": logits.max(axis=1),
        "largest probability": 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1),
        "distance": [-min(np.square(row - mean).sum() for mean in means) for row in x],
        "cosine": likest(means),
        "nearest example": likest(examples),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4, err_msg=name)


def test_every_score_tells_foreign_images_better_than_chance() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 10)
    features = unit(unit(rng.standard_normal((12, DIM)))[labels] + 0.1 * rng.standard_normal((120, DIM)))
    artifact = an_artifact(whitened=learner("whitened"), lstm=learner("lstm"))
    rows = scores.measure(artifact, features.astype(np.float32), Pool.of(labels), config())
    assert {row.shot for row in rows} == {1, 3}
    names = {row.method for row in rows}
    assert len(names) == 10
    for row in rows:
        assert row.auroc > 55, row.method
        assert (row.gain == 0) == (row.method == "energy") or abs(row.gain) < row.gain_interval
        (base,) = [other for other in rows if other.method == "energy" and other.shot == row.shot]
        assert row.auroc == pytest.approx(base.auroc + row.gain, abs=0.011)
    assert scores.table(rows).count("\n") == 1 + len(rows)


def test_foreign_images_of_the_same_kind_are_told_by_nothing() -> None:
    """The control of the test above: every class is the same cloud."""
    features = unit(np.random.default_rng(0).standard_normal((120, DIM))).astype(np.float32)
    artifact = an_artifact(whitened=learner("whitened"), lstm=learner("lstm"))
    rows = scores.measure(artifact, features, Pool.of(np.repeat(np.arange(12), 10)), config(episodes=100))
    assert all(abs(row.auroc - 50) < 4 for row in rows)


def test_an_artifact_without_a_memory_is_not_compared() -> None:
    features = unit(np.random.default_rng(0).standard_normal((120, DIM))).astype(np.float32)
    pool = Pool.of(np.repeat(np.arange(12), 10))
    assert scores.measure(an_artifact(whitened=learner("whitened")), features, pool, config()) == []
