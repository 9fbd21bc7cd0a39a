from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.arrays import softmax
from models.calibration import MOST, Rejection, Temperature, divisor, energy

# Each number of the size has a weight of its own: 1, log way, log mean shots, mean and log deviation of the energies.
REJECTION = Rejection(
    location=(1.0, 2.0, 3.0, 1.5, 0.5),
    spread=(math.log(2), 0.1, -1.0, 0.01, 0.2),
    location_one_shot=(5.0, 0.5, 7.0, 2.0, 0.25),
    spread_one_shot=(0.1, 0.2, 7.0, 0.03, 0.4),
    quantiles=(-3.0, -1.0, -1.0, 0.0, 2.0),
)
NUMBERS = st.floats(-1e6, 1e6)


def test_before_it_is_fitted_it_changes_nothing() -> None:
    assert Temperature().at(20, (1, 5, 3)) == 1


def test_it_is_a_power_of_the_way_and_of_the_mean_shots() -> None:
    temperature = Temperature(constant=math.log(2), by_way=0.5, by_shot=-1)
    assert temperature.at(4, (5, 5, 5, 5)) == pytest.approx(2 * 4**0.5 / 5)
    assert temperature.at(4, (1, 1, 1, 17)) == pytest.approx(temperature.at(4, (5, 5, 5, 5)))


def test_the_energy_is_the_log_of_the_sum_of_the_exponentials() -> None:
    logits = np.log([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(energy(logits), np.log([8, 3]))
    np.testing.assert_allclose(energy(logits[:, :1]), np.log([1, 1]), atol=1e-12)


def test_the_energy_of_large_logits_is_finite() -> None:
    np.testing.assert_allclose(energy(np.array([[1e4, 1e4], [-1e4, -1e4]])), [1e4 + np.log(2), -1e4 + np.log(2)])


@pytest.mark.slow
@settings(deadline=None, database=None)
@given(
    energies=st.lists(NUMBERS, min_size=2, max_size=20),
    location=NUMBERS,
    spread=st.floats(1e-3, 1e3),
    # As artifacts write them: with four decimals. (Between two that lie 1e-310 apart numpy finds no slope.)
    quantiles=st.lists(st.integers(-100_000, 100_000).map(lambda n: n / 1e4), min_size=2, max_size=50).map(sorted),
)
def test_known_is_a_share_that_never_falls_as_the_energy_rises(
    energies: list[float], location: float, spread: float, quantiles: list[float]
) -> None:
    rejection = dataclasses.replace(REJECTION, quantiles=tuple(quantiles))
    known = rejection.known(np.array(sorted(energies)), (location, spread))
    assert known.shape == (len(energies),)
    assert (known >= 0).all()
    assert (known <= 1).all()
    assert (np.diff(known) >= -1e-12).all()


def test_known_is_the_share_of_genuine_images_that_score_lower() -> None:
    known = REJECTION.known(np.array([-1e9, 4.0, 8.0, 10.0, 12.0, 14.0, 1e9]), (10.0, 2.0))
    np.testing.assert_allclose(known, [0, 0, 0.5, 0.75, 0.875, 1, 1])


def test_where_examples_were_held_out_their_energies_place_the_gauge() -> None:
    held_out = np.log([[3.0, 1.0], [6.0, 2.0]])  # energies log 4 and log 8
    location, spread = REJECTION.gauge((2, 8), held_out=held_out, rivals=np.full((10, 1), 99.0))
    way, shots, mean, deviation = math.log(2), math.log(5), 2.5 * math.log(2), math.log(math.log(2) / 2 + 0.1)
    assert location == pytest.approx(1 + 2 * way + 3 * shots + 1.5 * mean + 0.5 * deviation)
    assert spread == pytest.approx(2 * math.exp(0.1 * way - shots + 0.01 * mean + 0.2 * deviation))


def test_the_spread_is_no_less_than_that_of_the_examples_held_out() -> None:
    bounded = dataclasses.replace(REJECTION, spread_own=(math.log(1.5), 0.0, 0.0, 0.0, 1.0))
    alike, apart = np.log([[3.0, 1.0], [3.0, 1.0]]), np.log([[3.0, 1.0], [3e9, 1e9]])
    nothing = np.zeros((10, 1))
    assert bounded.gauge((2, 2), held_out=alike, rivals=nothing) == REJECTION.gauge(
        (2, 2), held_out=alike, rivals=nothing
    )
    before, found = (each.gauge((2, 2), held_out=apart, rivals=nothing) for each in (REJECTION, bounded))
    assert found == (before[0], pytest.approx(1.5 * (4.5 * math.log(10) + 0.1)))
    assert found[1] > before[1]


def test_a_one_shot_task_is_bounded_by_nothing() -> None:
    bounded = dataclasses.replace(REJECTION, spread_own=(9.0, 0.0, 0.0, 0.0, 1.0))
    rivals = np.log([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    gauges = [each.gauge((1, 1, 1), held_out=np.zeros((0, 3)), rivals=rivals) for each in (REJECTION, bounded)]
    assert gauges[0] == gauges[1]


def test_a_one_shot_task_is_placed_by_what_its_examples_score_among_the_others() -> None:
    nothing = np.zeros((0, 3), np.float32)
    rivals = np.log([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])  # energies log 2, log 4 and log 8
    location, spread = REJECTION.gauge((1, 1, 1), held_out=nothing, rivals=rivals)
    way, mean, deviation = math.log(3), 2 * math.log(2), math.log(math.log(2) * math.sqrt(2 / 3) + 0.1)
    assert location == pytest.approx(5 + 0.5 * way + 2 * mean + 0.25 * deviation)
    assert spread == pytest.approx(math.exp(0.1 + 0.2 * way + 0.03 * mean + 0.4 * deviation))


@pytest.mark.parametrize("way", [2, 5, 40])
@pytest.mark.parametrize("shot", [1, 2, 100])
def test_a_gauge_is_two_finite_numbers_for_tasks_of_any_size(way: int, shot: int) -> None:
    held_out = np.zeros((way * shot if shot > 1 else 0, way), np.float32)
    gauge = REJECTION.gauge((shot,) * way, held_out=held_out, rivals=np.zeros((way * shot, way - 1), np.float32))
    assert np.isfinite(gauge).all()
    assert gauge[1] > 0
    assert all(type(value) is float for value in gauge)  # as it is written into a head


@pytest.mark.parametrize("way", [2, 5, 20, 100])
def test_an_image_has_the_same_energy_alone_and_among_others(way: int) -> None:
    logits = np.random.default_rng(way).normal(0, 10, (64, way)).astype(np.float32)
    alone = np.concatenate([energy(logits[k : k + 1]) for k in range(64)])
    assert alone.tobytes() == energy(logits).tobytes()
    np.testing.assert_allclose(alone, np.logaddexp.reduce(logits.astype(np.float64), axis=1), rtol=1e-5, atol=1e-5)


# What a task's own examples say


def claimed(by: float, *, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, 5] that are `by` times what would be honest, and the classes [n] as the honest ones have them."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 1.5, (n, 5))
    truth = (np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)).cumsum(axis=1) > rng.random((n, 1))
    return by * honest, truth.argmax(axis=1)


def test_what_claims_too_much_is_divided_by_as_much_the_more_surely_the_more_examples_say_so() -> None:
    many = [divisor(1, *claimed(4, n=2000, seed=seed)) for seed in range(5)]
    assert np.mean(many) == pytest.approx(4, rel=0.25)
    few = [divisor(1, *claimed(4, n=25, seed=seed)) for seed in range(20)]
    assert all(found >= 1 for found in few)
    assert 1.5 < np.mean(few) < np.mean(many)


def test_it_is_the_likeliest_with_the_temperature_as_likely_as_ten_examples_make_it() -> None:
    logits, truth = claimed(4, n=25)
    grid = np.linspace(0, 3, 3001)
    shares = [softmax(logits / 2 / np.exp(value))[np.arange(25), truth] for value in grid]
    loss = [-np.log(share).sum() + 10 / 2 * value**2 for share, value in zip(shares, grid, strict=True)]
    assert divisor(2, logits, truth) == pytest.approx(2 * np.exp(grid[np.argmin(loss)]), rel=2e-3)


def test_what_claims_too_little_keeps_its_temperature() -> None:
    assert [divisor(0.7, *claimed(0.1, n=200, seed=seed)) for seed in range(5)] == [0.7] * 5


def test_without_examples_it_is_the_temperature() -> None:
    assert divisor(3.5, np.zeros((0, 5)), np.zeros(0, int)) == 3.5


@pytest.mark.slow
@settings(deadline=None, database=None)
@given(size=st.floats(0, 1e30), n=st.integers(1, 12), way=st.integers(2, 5), seed=st.integers(0, 99))
def test_whatever_is_claimed_it_is_bounded(size: float, n: int, way: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    by = divisor(0.5, size * rng.standard_normal((n, way)), rng.integers(way, size=n))
    assert 0.5 <= by <= 0.5 * math.exp(MOST)
