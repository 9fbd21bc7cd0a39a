"""The temperature of tasks of each size, how near twins are, and what "none of these" goes by."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from models.calibration import Rejection, Temperature, energy
from models.learners.prototype import Prototype
from training import calibrate
from training.calibrate import LOG_TEMPERATURES, RATE, Answered, apart, fit_rejection, fit_temperature
from training.episodes import Pool

SIZES = [(way, shot) for way in (2, 5, 20) for shot in (1, 5)]


def curves(bests: list[float], bends: list[float]) -> np.ndarray:
    """The loss at each temperature: least at `bests`, and the steeper around there the greater `bends`."""
    return np.array([bend * (LOG_TEMPERATURES - best) ** 2 for best, bend in zip(bests, bends, strict=True)])


def test_what_fits_all_sizes_is_found() -> None:
    bests = [0.3 + 0.2 * float(np.log(way)) - 0.4 * float(np.log(shot)) for way, shot in SIZES]
    fit = Temperature(**fit_temperature(SIZES, curves(bests, [1.0] * 6)))
    for (way, shot), best in zip(SIZES, bests, strict=True):
        assert abs(np.log(fit.at(way, (shot,) * way)) - best) < 0.04  # of a grid of steps of 0.05


def test_a_size_that_answers_well_at_any_temperature_does_not_spoil_the_others() -> None:
    bests, bends = [0.0] * 6, [1.0] * 6
    bests[0], bends[0] = -2.5, 1e-4  # two classes: hardly an error, so the best is chance
    fit = Temperature(**fit_temperature(SIZES, curves(bests, bends)))
    for way, shot in SIZES[1:]:
        assert abs(np.log(fit.at(way, (shot,) * way))) < 0.2  # counted like the others, it moves one by 0.9


def test_where_a_wrong_temperature_costs_nothing_the_best_is_taken_as_it_is() -> None:
    hollow = -curves([3.0] * 6, [1e-3] * 6)  # the surer the better: concave at its low end
    fit = Temperature(**fit_temperature(SIZES, hollow))
    assert abs(np.log(fit.at(5, (1,) * 5)) - LOG_TEMPERATURES[0]) < 0.01


def test_a_best_temperature_at_the_end_of_the_grid_is_taken_as_it_is() -> None:
    fit = Temperature(**fit_temperature(SIZES, curves([float(LOG_TEMPERATURES[0])] * 6, [1.0] * 6)))
    assert abs(np.log(fit.at(5, (1,) * 5)) - LOG_TEMPERATURES[0]) < 0.01


def cloud(classes: int, each: int, *, groups: bool = False) -> tuple[np.ndarray, Pool]:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((classes * each, 64)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = np.repeat(np.arange(classes), each)
    return features, Pool.of(labels, np.tile(np.arange(each) // 2, classes) if groups else None)


def test_twins_are_nearer_than_a_quarter_of_what_one_pair_in_ten_thousand_is() -> None:
    features, pool = cloud(10, 60)
    distances = np.concatenate(
        [
            ((features[k * 60 : k * 60 + 60, None] - features[None, k * 60 : k * 60 + 60]) ** 2).sum(axis=2)[
                np.triu_indices(60, 1)
            ]
            for k in range(10)
        ]
    )
    assert abs(apart(features, pool) - np.quantile(distances, 1e-4) / 4) < 1e-3
    assert 0.15 < apart(features, pool) < 0.4


def test_pictures_of_one_thing_do_not_count_as_different() -> None:
    features, pool = cloud(10, 120, groups=True)
    features[1::2] = features[::2]  # the second of each thing is the first once more
    assert apart(features, pool) > 0.15


def test_of_few_pairs_nothing_is_told() -> None:
    assert apart(*cloud(3, 20)) == 0


@pytest.mark.parametrize(
    ("least", "said"),
    [
        (11, ""),
        (5, "'oak' has 5 .* of more than 4 examples"),
        (2, "'oak' has 2 .* no learner will say \"none of these\""),
    ],
)
def test_the_class_that_limits_the_calibration_is_named_with_what_is_lost(least: int, said: str) -> None:
    pool = Pool.of(np.repeat([0, 1], [20, least]))
    found = calibrate.limits(pool, ["elm", "oak"])
    assert re.search(said, found)
    assert bool(found) == bool(said)
    learners = {"prototype": Prototype(np.float32(2.0))}
    features = np.random.default_rng(0).normal(size=(20 + least, 4)).astype(np.float32)
    _, rejections, _ = calibrate.calibrate(learners, features, pool, episodes=10, queries=2, seed=0)
    assert bool(rejections["prototype"]) == (least > 2)


# "None of these"


def told(level: float, *, wide: float = 1.0, shot: int = 5, way: int = 5, seed: int = 0) -> Answered:
    """A task whose energies lie around `level` and are so `wide`."""
    rng = np.random.default_rng(seed)

    def logits(n: int, width: int, around: float) -> np.ndarray:
        rows = np.tile(rng.normal(around, wide, (n, 1)), width)
        return np.asarray(rows - np.log(width))  # of which the energy is what was drawn

    truth = np.repeat(np.arange(way), shot)
    held = logits(way * shot if shot > 1 else 0, way, level)
    return Answered(
        0,
        (shot,) * way,
        logits(100, way, level),
        np.repeat(np.arange(way), 100 // way),
        held,
        truth[: len(held)],
        logits(way * shot, way - 1, level),
    )


def turned_away(rejection: Rejection, task: Answered) -> float:
    gauge = rejection.gauge(task.shots, held_out=task.held_out, rivals=task.rivals)
    return float((rejection.known(energy(task.logits), gauge) < RATE).mean())


def rejection_of(tasks: list[Answered], *, pinned: bool = False) -> Rejection:
    fit = fit_rejection(tasks, Temperature(), pinned=pinned)
    return Rejection(**{name: tuple(values) for name, values in fit.items()})


HOME = [told(0.3 * np.sin(k), shot=shot, seed=k) for k in range(60) for shot in (1, 5)]


@pytest.mark.parametrize("shot", [1, 5])
def test_at_home_as_many_are_turned_away_as_is_said_with_one_example_a_class_as_with_more(shot: int) -> None:
    rejection = rejection_of(HOME)
    shares = [turned_away(rejection, task) for task in HOME if task.shots[0] == shot]
    assert abs(np.mean(shares) - RATE) < 0.01


def test_where_examples_are_spread_more_widely_than_at_home_so_are_questions() -> None:
    rejection = rejection_of(HOME)
    elsewhere = [told(0.0, wide=3.0, seed=k) for k in range(1000, 1060)]
    assert abs(np.mean([turned_away(rejection, task) for task in elsewhere]) - RATE) < 0.02
    unbounded = dataclasses.replace(rejection, spread_own=())  # the control
    assert np.mean([turned_away(unbounded, task) for task in elsewhere]) > 4 * RATE


def test_only_examples_that_tell_nothing_move_nothing() -> None:
    """Elsewhere the only examples score much higher among the other classes, and questions as at home."""
    elsewhere = [told(0.0, shot=1, seed=k) for k in range(1000, 1060)]
    elsewhere = [dataclasses.replace(task, rivals=task.rivals + 4) for task in elsewhere]
    pinned, others = rejection_of(HOME, pinned=True), rejection_of(HOME)
    assert abs(np.mean([turned_away(pinned, task) for task in elsewhere]) - RATE) < 0.02
    assert np.mean([turned_away(others, task) for task in elsewhere]) > 4 * RATE
