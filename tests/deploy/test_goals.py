"""What deploy/bench.py makes of its figures, and the pictures that it sends."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.floor import never_seen, pictures
from deploy.goals import GOALS, figure, table
from models.images import ImageDecoder


@pytest.mark.parametrize(
    ("goal", "values", "reached"),
    [
        ("share_64 int8", [0.9, 0.5, 0.91], "moonshot"),  # at least 0.80, 0.90: the median counts
        ("share_64 int8", [0.85], "must"),
        ("share_64 int8", [0.79], "no"),
        ("p50_1", [1.15], "moonshot"),  # at most 1.30, 1.15
        ("p50_1", [1.2, 9.0, 1.2], "must"),
        ("p50_1", [1.31], "no"),
        ("undeclared", [0, 1, 1], "no"),
        ("cpu_64 int8", [5.0], ""),  # only told
    ],
)
def test_a_figure_tells_which_goal_it_reaches(goal: str, values: list[float], reached: str) -> None:
    assert figure(goal, values).reached() == reached


def test_every_hope_is_no_easier_than_what_must_be() -> None:
    for name, goal in GOALS.items():
        if goal.must is not None and goal.moonshot is not None:
            assert (goal.moonshot >= goal.must) if goal.least else (goal.moonshot <= goal.must), name


def test_the_table_has_a_row_for_each_figure() -> None:
    lines = table([figure("share_64 int8", [0.7, 0.85, 0.82]), figure("refit", 4.0, "`ridge`")]).splitlines()
    assert len(lines) == 4
    assert "| 0.820 | 0.700 to 0.850 (3) | ≥ 0.800 | ≥ 0.900 | must |" in lines[2]
    assert "(`ridge`) | 4.0 ms | 4.0 ms to 4.0 ms (1) | ≤ 20.0 ms | ≤ 5.0 ms | moonshot |" in lines[3]


def test_pictures_that_were_never_seen_have_bytes_of_their_own_and_the_same_pixels() -> None:
    given = pictures(2, seed=1)
    found = never_seen(given, 5)
    assert len({*given, *found}) == 7
    decode = ImageDecoder(84, 84, 3)
    for number, image in enumerate(found):
        assert np.array_equal(decode(image), decode(given[number % 2]))
