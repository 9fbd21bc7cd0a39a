"""Rows that are worked on with those that show the same."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from models.learners.things import by_thing, sums

THINGS = np.array([7, 2, 7, 5, 2, 7, 4])  # of three rows, of two, and twice of one
VALUES = np.arange(14, dtype=np.float32).reshape(7, 2)


def test_each_thing_is_given_whole_and_put_back_where_it_was() -> None:
    given: list[list[list[float]]] = []

    def call(rows: np.ndarray) -> np.ndarray:
        given.extend(rows[:, :, 0].tolist())
        return rows * 10

    np.testing.assert_array_equal(by_thing(THINGS, call, VALUES), VALUES * 10)
    assert given == [[12.0], [6.0], [2.0, 8.0], [0.0, 4.0, 10.0]]


def test_several_values_come_together_and_the_answer_may_have_another_length() -> None:
    ranks = np.arange(7)

    def call(rows: np.ndarray, rank: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, rank[:, :, None], np.full((*rank.shape, 1), rank.shape[1])], axis=2)

    found = by_thing(THINGS, call, VALUES, ranks)
    np.testing.assert_array_equal(found[:, :2], VALUES)
    assert found[:, 2].tolist() == ranks.tolist()
    assert found[:, 3].tolist() == [3, 2, 3, 1, 2, 3, 1]


def test_a_sum_is_of_all_rows_of_a_thing() -> None:
    expected = [VALUES[thing == THINGS].sum(axis=0) for thing in THINGS]
    np.testing.assert_array_equal(sums(THINGS, VALUES), expected)
    np.testing.assert_array_equal(sums(np.arange(7), VALUES), VALUES)


@pytest.mark.torch
def test_torch_sums_as_numpy_does(torch: ModuleType) -> None:
    found = sums(THINGS, torch.from_numpy(VALUES))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), sums(THINGS, VALUES))
