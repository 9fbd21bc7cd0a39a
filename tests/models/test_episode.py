from __future__ import annotations

import numpy as np
import pytest

from models.episode import Support
from models.errors import InvalidSupport


def support(labels: list[int], way: int) -> Support:
    return Support(np.ones((len(labels), 4), np.float32), np.array(labels, np.int64), way)


@pytest.mark.parametrize("labels", [[0, 1], [1, 0], [0, 0, 0, 1], list(range(30))])
def test_labels_that_count_up_from_zero_make_a_support_set(labels: list[int]) -> None:
    assert support(labels, max(labels) + 1).way == max(labels) + 1


@pytest.mark.parametrize(("labels", "way"), [([0, 2], 3), ([1, 2], 2), ([0, 1, 2], 2), ([-1, 0, 1], 2), ([], 2)])
def test_a_gap_a_surplus_or_nothing_is_refused(labels: list[int], way: int) -> None:
    with pytest.raises(InvalidSupport, match=rf"Labels must be 0\.\.{way - 1} with no gap"):
        support(labels, way)


@pytest.mark.parametrize(("labels", "way"), [([0, 0], 1), ([], 0), ([0], -1)])
def test_one_class_is_no_task(labels: list[int], way: int) -> None:
    with pytest.raises(InvalidSupport, match="at least two classes"):
        support(labels, way)
