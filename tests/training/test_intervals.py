from __future__ import annotations

import numpy as np
import pytest

from training.intervals import interval, student


@pytest.mark.parametrize(
    ("n", "known"), [(2, 12.706), (5, 2.776), (11, 2.228), (12, 2.201), (20, 2.093), (2000, 1.961)]
)
def test_it_is_the_tabulated_quantile(n: int, known: float) -> None:
    assert student(n) == pytest.approx(known, rel=2e-3)


@pytest.mark.parametrize("n", [5, 12, 200])
def test_nineteen_in_twenty_intervals_hold_the_mean(n: int) -> None:
    draws = np.random.default_rng(0).normal(0.5, 0.2, (2000, n))
    held = np.mean([abs(values.mean() - 0.5) <= interval(values) for values in draws])
    assert held == pytest.approx(0.95, abs=0.012)
