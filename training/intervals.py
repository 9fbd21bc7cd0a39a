"""Intervals of means. Student, "The Probable Error of a Mean", 1908: of few values a deviation is itself unsure."""

from __future__ import annotations

import numpy as np

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def student(n: int) -> float:
    """Half the width of the 95 % interval of a mean over n values, two or more, is so many deviations over the root of
    n. Beyond the table by Fisher's expansion, which is right to a thousandth there."""
    if n in T95:
        return T95[n]
    x, f = 1.959964, n - 1
    return x + (x**3 + x) / (4 * f) + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * f**2)


def interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean of values [n]."""
    return float(student(len(values)) * values.std(ddof=1) / np.sqrt(len(values)))
