from __future__ import annotations

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

from training import honesty


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
