"""Examples of a class that show one thing."""

from __future__ import annotations

import numpy as np
import pytest

from models.twins import MOST, units

DIM = 64


def things(rng: np.random.Generator, shown: list[list[int]], *, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Unit features and classes; of each class which thing each of its examples shows."""
    features, labels = [], []
    for label, numbers in enumerate(shown):
        centre = rng.standard_normal(DIM)
        own = {number: centre + 0.7 * rng.standard_normal(DIM) for number in dict.fromkeys(numbers)}
        features += [own[number] + noise * rng.standard_normal(DIM) for number in numbers]
        labels += [label] * len(numbers)
    found = np.array(features)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32), np.array(labels)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_what_shows_one_thing_has_one_number(seed: int, noise: float) -> None:
    shown = [[0, 1, 0, 2, 3, 2], [0, 1, 2, 3], [0, 0, 0, 1, 2, 3, 4, 5]]
    features, labels = things(np.random.default_rng(seed), shown, noise=noise)
    assert units(features, labels, 3).tolist() == [number for numbers in shown for number in numbers]


def test_in_any_order_and_at_any_scale_they_are_the_same() -> None:
    rng = np.random.default_rng(0)
    features, labels = things(rng, [[0, 1, 0, 2], [0, 1, 2, 3, 3]])
    order = rng.permutation(len(labels))
    found = units(1000 * features[order], labels[order], 2)
    for label, twins in ((0, {0, 2}), (1, {7, 8})):
        numbers = {row: found[place] for place, row in enumerate(order) if labels[row] == label}
        (shared,) = {numbers[row] for row in twins}
        assert [row for row, number in numbers.items() if number == shared] == sorted(twins, key=order.tolist().index)
        assert sorted(set(numbers.values())) == list(range(len(numbers) - 1))


def test_different_things_have_numbers_of_their_own() -> None:
    features, labels = things(np.random.default_rng(1), [[*range(10)], [0], [*range(40)], [0, 1]])
    expected = [*range(10), 0, *range(40), 0, 1]
    assert units(features, labels, 4).tolist() == expected


def test_two_examples_are_held_against_what_is_usual_in_other_classes() -> None:
    features, labels = things(np.random.default_rng(0), [[0, 0], [0, 1], [0, 1, 2], [0, 1, 2]])
    assert units(features, labels, 4).tolist() == [0, 0, 0, 1, 0, 1, 2, 0, 1, 2]


def test_one_file_again_and_again_is_one_thing() -> None:
    features, labels = things(np.random.default_rng(0), [[0] * 4, [0, 1, 2]], noise=0.0)
    assert units(features, labels, 2).tolist() == [0, 0, 0, 0, 0, 1, 2]


def test_twins_of_a_twin_are_twins() -> None:
    steps = np.cumsum(np.eye(DIM, dtype=np.float32)[:4] * 0.5, axis=0)  # each near the next, the ends far apart
    rng = np.random.default_rng(0)
    features = np.concatenate([steps, 3 * rng.standard_normal((8, DIM)).astype(np.float32)])
    assert units(features, np.zeros(12, int), 1).tolist() == [0, 0, 0, 0, *range(1, 9)]


@pytest.mark.parametrize("wrong", [1, 2])
def test_examples_with_a_wrong_label_do_not_make_twins_of_the_others(wrong: int) -> None:
    """Classes so far apart that those that belong together are near each other beside one that does not."""
    rng = np.random.default_rng(0)
    centres = 5 * rng.standard_normal((3, DIM))
    truth = np.repeat([0, 1, 2], 4)
    features = (centres[truth] + 0.5 * rng.standard_normal((12, DIM))).astype(np.float32)
    labels = truth.copy()
    labels[:wrong] = 1  # of the first class
    assert sorted(units(features, labels, 3)) == sorted([*range(4 - wrong), *range(4 + wrong), *range(4)])


def test_classes_that_are_empty_or_very_large_are_left_as_they_are() -> None:
    labels = np.array([2] * (MOST + 1) + [0])
    features = np.ones((len(labels), 4), np.float32)
    assert units(features, labels, 4).tolist() == [*range(MOST + 1), 0]
