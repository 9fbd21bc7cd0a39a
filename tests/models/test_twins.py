"""Examples of a class that show one thing."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from models.twins import MOST, _merged, doubles, units

DIM = 64
NEAR = 0.2  # different things are at some 0.7, pictures of one at less than 0.1


def things(rng: np.random.Generator, shown: list[list[int]], *, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
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
@pytest.mark.parametrize(
    "shown",
    [
        [[0, 1, 0, 2, 3, 2], [0, 1, 2, 3], [0, 0, 0, 1, 2, 3, 4, 5]],
        [[0, 0], [0, 1], [0]],
        [[0] * 8 + [1, 2], [0, 1, 2]],  # however many of a class are alike
        [[0] * 5, [0] * 5],
        [[*range(10)], [0], [*range(40)], [0, 1]],
    ],
)
def test_what_shows_one_thing_has_one_number(shown: list[list[int]], seed: int) -> None:
    features, labels = things(np.random.default_rng(seed), shown)
    assert units(features, labels, len(shown), near=NEAR).tolist() == [n for numbers in shown for n in numbers]


def test_in_any_order_they_are_the_same() -> None:
    rng = np.random.default_rng(0)
    features, labels = things(rng, [[0, 1, 0, 2], [0, 1, 2, 3, 3]])
    order = rng.permutation(len(labels))
    found = units(features[order], labels[order], 2, near=NEAR)
    for label, twins in ((0, {0, 2}), (1, {7, 8})):
        numbers = {row: found[place] for place, row in enumerate(order) if labels[row] == label}
        (shared,) = {numbers[row] for row in twins}
        assert {row for row, number in numbers.items() if number == shared} == twins
        assert sorted(set(numbers.values())) == list(range(len(numbers) - 1))


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0]], ids=["right", "two wrong"])
def test_other_labels_make_no_twins_and_part_none(labels: list[int]) -> None:
    """Three examples a class, as in the first task of many: what is far from them does not make the others near."""
    features, _ = things(np.random.default_rng(0), [[0, 1, 2], [0, 1, 2]])
    assert sorted(units(features, np.array(labels), 2, near=NEAR)) == [0, 0, 1, 1, 2, 2]
    features, _ = things(np.random.default_rng(0), [[0, 0, 0], [0, 1, 2]])
    found = units(features, np.array([0, 0, 1, 1, 1, 1]), 2, near=NEAR)
    assert found.tolist() == [0, 0, 0, 1, 2, 3]


def test_one_file_under_two_labels_is_no_trouble() -> None:
    features, _ = things(np.random.default_rng(0), [[0, 1, 2]], noise=0.0)
    twice = np.concatenate([features, features])
    assert units(twice, np.repeat([0, 1], 3), 2, near=NEAR).tolist() == [0, 1, 2, 0, 1, 2]
    again = np.concatenate([features[[0, 0, 1]], features[[0, 0, 1]]])
    assert units(again, np.repeat([0, 1], 3), 2, near=NEAR).tolist() == [0, 0, 1, 0, 0, 1]


def test_twins_of_a_twin_are_twins_in_a_chain_of_any_length() -> None:
    steps = np.cumsum(0.3 * np.eye(200, dtype=np.float32)[:150], axis=0)  # each near the next, the ends far apart
    order = np.random.default_rng(0).permutation(150)
    assert not units(steps[order], np.zeros(150, int), 1, near=0.1).any()
    assert len(set(units(steps[order], np.zeros(150, int), 1, near=0.08))) == 150


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_twins_of_nobody(bad: float) -> None:
    """Whoever made them is told elsewhere."""
    features = np.ones((4, 8), np.float32)
    features[1] = bad
    with np.errstate(invalid="ignore"):
        assert units(features, np.zeros(4, int), 1, near=NEAR).tolist() == [0, 1, 0, 0]


def test_where_it_is_not_known_how_near_twins_are_nobody_looks() -> None:
    assert units(np.ones((4, 8), np.float32), np.zeros(4, int), 1, near=0).tolist() == [0, 1, 2, 3]


def test_classes_that_are_empty_or_very_large_are_left_as_they_are() -> None:
    labels = np.array([2] * (MOST + 1) + [0])
    features = np.ones((len(labels), 4), np.float32)
    assert units(features, labels, 4, near=NEAR).tolist() == [*range(MOST + 1), 0]


def test_rows_that_are_the_same_under_several_labels_are_doubles() -> None:
    features, labels = things(np.random.default_rng(0), [[0, 1, 2], [0, 1, 2], [0, 1]])
    assert doubles(features, labels) == ()
    features[[1, 4, 7]] = features[1]
    features[6] = features[3]
    features[2] = features[0]  # of one class: twins, and no contradiction
    assert doubles(features, labels) == ((1, 4, 7), (3, 6))


@pytest.mark.parametrize("n", [2, 40, 2000])
def test_what_was_seen_in_another_batch_is_the_same_and_a_frame_of_a_burst_is_not(n: int) -> None:
    rng = np.random.default_rng(n)
    features = rng.standard_normal((n, 512))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features[n // 2 :] = features[: n // 2]  # each once more, of another class
    frames = features + rng.standard_normal(features.shape) * 0.01 / np.sqrt(512)
    features *= 1 + rng.standard_normal(features.shape) * 2e-4  # float16 rounds to one in two thousand
    labels = np.arange(n) // (n // 2)
    pairs = tuple((k, k + n // 2) for k in range(n // 2))
    assert doubles(features.astype(np.float16).astype(np.float32), labels) == pairs
    frames[: n // 2] = features[: n // 2]
    assert doubles(frames.astype(np.float16).astype(np.float32), labels) == ()


@pytest.mark.parametrize("n", [3, 600])
def test_where_all_look_the_same_they_are_one_group_and_it_takes_no_longer(n: int) -> None:
    features = np.random.default_rng(0).standard_normal((1, 512)).astype(np.float32).repeat(n, axis=0)
    tracemalloc.start()
    try:
        assert doubles(features, np.arange(n) % 3) == (tuple(range(n)),)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_of_features_that_are_no_numbers_none_are_doubles() -> None:
    assert doubles(np.full((3, 8), np.nan, np.float32), np.arange(3)) == ()
    assert doubles(np.zeros((3, 8), np.float32), np.arange(3)) == ()


def test_rows_that_are_joined_take_those_along_that_they_were_joined_with() -> None:
    group = _merged(np.arange(13), np.array([10, 10]), np.array([11, 12]))
    assert _merged(group, np.array([11, 12]), np.array([5, 3])).tolist() == [*range(5), 3, *range(6, 10), 3, 3, 3]


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_joined_as_one_pair_after_the_other_would_be(seed: int) -> None:
    dice = np.random.default_rng(seed)
    group, sets = np.arange(40), [{row} for row in range(40)]
    for _ in range(6):
        first, second = dice.integers(0, 40, (2, 4))
        group = _merged(group, first, second)
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            joined = sets[one] | sets[other]
            for row in joined:
                sets[row] = joined
        assert group.tolist() == [min(joined) for joined in sets]
