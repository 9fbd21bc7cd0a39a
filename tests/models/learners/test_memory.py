from __future__ import annotations

import numpy as np

from models.learners.memory import attend


def test_a_sharp_question_reads_the_value_of_its_key() -> None:
    keys = np.eye(3)
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_allclose(attend(100 * keys[[2, 0]], keys, values), values[[2, 0]])


def test_a_question_about_nothing_reads_the_mean() -> None:
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(attend(np.zeros((1, 3)), np.eye(3)[:2], values), [[2.0, 3.0]])


def test_what_the_mask_hides_is_not_read() -> None:
    keys, values = np.eye(3), np.eye(3)
    mask = np.array([[0.0, 1.0, 1.0]])
    read = attend(100 * keys[:1], keys, values, mask=mask)
    np.testing.assert_allclose(read, [[0.0, 0.5, 0.5]])


def test_where_all_is_hidden_zeros_are_read() -> None:
    assert not attend(np.ones((2, 3)), np.eye(3), np.eye(3), mask=np.zeros((2, 3))).any()
