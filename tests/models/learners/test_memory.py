from __future__ import annotations

import numpy as np

from models.learners.memory import attention


def test_a_sharp_question_reads_the_value_of_its_key() -> None:
    keys = np.eye(3)
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_allclose(attention(100 * keys[[2, 0]], keys) @ values, values[[2, 0]])


def test_a_question_about_nothing_reads_the_mean() -> None:
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(attention(np.zeros((1, 3)), np.eye(3)[:2]) @ values, [[2.0, 3.0]])
