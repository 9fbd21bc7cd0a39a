from __future__ import annotations

import numpy as np
import pytest

from training import paired
from training.evaluate import Row


def a_row(method: str, shot: int = 1) -> Row:
    return Row("d", "test", method, 5, shot, 50.0, 0.5, 4, 15, 7, f"list{shot}", "float32")


def single(**values: list[float]) -> dict[tuple[str, int, int], np.ndarray]:
    return {(method, 5, 1): np.array(accuracy) for method, accuracy in values.items()}


def test_the_difference_is_the_mean_over_episodes_and_its_interval_is_that_of_the_differences() -> None:
    values = single(ridge=[0.2, 0.4, 0.6, 0.8], lstm=[0.3, 0.4, 0.8, 0.9])
    (row,) = paired.rows([a_row("ridge"), a_row("lstm")], values, "ridge")
    gains = np.array([10, 0, 20, 10])
    assert (row.method, row.against, row.episodes) == ("lstm", "ridge", 4)
    assert row.difference == pytest.approx(10)
    assert row.interval == pytest.approx(1.96 * gains.std(ddof=1) / 2, abs=0.005)
    assert (row.data, row.split, row.way, row.shot, row.queries) == ("d", "test", 5, 1, 15)
    assert (row.seed, row.episode_list, row.precision) == (7, "list1", "float32")


def test_what_makes_an_episode_hard_for_both_is_not_in_the_interval() -> None:
    hard = np.random.default_rng(0).uniform(0.2, 0.8, 100)
    values = single(ridge=hard.tolist(), lstm=(hard + 0.01).tolist())
    (row,) = paired.rows([a_row("ridge"), a_row("lstm")], values, "ridge")
    assert (row.difference, row.interval) == (1.0, 0.0)


def test_a_learner_is_not_compared_with_itself() -> None:
    values = single(ridge=[0.1, 0.2])
    assert paired.rows([a_row("ridge")], values, "ridge") == []


def test_the_table_has_learners_down_and_signs() -> None:
    values = single(ridge=[0.5, 0.5], lstm=[0.6, 0.6], prototype=[0.4, 0.4])
    found = paired.rows([a_row("ridge"), a_row("lstm"), a_row("prototype")], values, "ridge")
    assert paired.table(found).splitlines() == [
        "| learner | 5-way 1-shot |",
        "|---|---|",
        "| lstm | +10.00 ± 0.00 |",
        "| prototype | -10.00 ± 0.00 |",
    ]
