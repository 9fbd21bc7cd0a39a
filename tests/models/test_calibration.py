from __future__ import annotations

import math

import numpy as np
import pytest

from models.arrays import softmax
from models.calibration import Temperature
from models.head import Affine


def test_before_it_is_fitted_it_changes_nothing() -> None:
    assert Temperature().at(20, (1, 5, 3)) == 1


def test_it_is_a_power_of_the_way_and_of_the_mean_shots() -> None:
    temperature = Temperature(constant=math.log(2), by_way=0.5, by_shot=-1)
    assert temperature.at(4, (5, 5, 5, 5)) == pytest.approx(2 * 4**0.5 / 5)
    assert temperature.at(4, (1, 1, 1, 17)) == pytest.approx(temperature.at(4, (5, 5, 5, 5)))


def test_folding_divides_the_logits_by_the_temperature_of_that_task() -> None:
    rng = np.random.default_rng(0)
    affine = Affine(rng.standard_normal((3, 4)).astype(np.float32), rng.standard_normal(3).astype(np.float32))
    features = rng.standard_normal((10, 4)).astype(np.float32)
    temperature = Temperature(constant=0.7, by_way=0.3, by_shot=0.2)
    folded = temperature.fold(affine, (1, 2, 6))
    assert folded.weight.dtype == folded.bias.dtype == np.float32
    logits = features @ affine.weight.T + affine.bias
    np.testing.assert_allclose(
        features @ folded.weight.T + folded.bias, logits / temperature.at(3, (1, 2, 6)), rtol=1e-5, atol=1e-6
    )


def test_a_higher_temperature_doubts_more_and_answers_the_same() -> None:
    rng = np.random.default_rng(1)
    affine = Affine(rng.standard_normal((5, 4)), rng.standard_normal(5))
    features = rng.standard_normal((50, 4))

    def chances(constant: float) -> np.ndarray:
        weight, bias = Temperature(constant=constant).fold(affine, (1,) * 5)
        return softmax(features @ weight.T + bias)

    sure, doubtful = chances(-1), chances(1)
    assert (sure.max(axis=1) > doubtful.max(axis=1)).all()
    assert np.array_equal(sure.argmax(axis=1), doubtful.argmax(axis=1))
