"""Learners compared on the same episodes: the mean of the differences and its 95 % interval.

What makes an episode easy or hard is the same for both sides and goes away in the difference, so its interval is much
narrower than those of two accuracies side by side. Knows nothing of how the accuracies came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from training.evaluate import Row


@dataclass(frozen=True, slots=True)
class PairedRow:
    """How much better a learner is than another, in points of accuracy."""

    data: str
    split: str
    method: str
    against: str
    way: int
    shot: int
    difference: float
    interval: float  # half the width of the 95 % interval of the mean difference
    episodes: int
    queries: int
    seed: int
    episode_list: str
    precision: str


def rows(measured: Sequence[Row], single: Mapping[tuple[str, int, int], np.ndarray], against: str) -> list[PairedRow]:
    """One row for each that was measured of another learner; `single` holds the accuracy of every episode, in 0..1."""
    found = []
    for row in measured:
        if row.method == against:
            continue
        gain = 100 * (single[row.method, row.way, row.shot] - single[against, row.way, row.shot])
        found.append(
            PairedRow(
                row.data,
                row.split,
                row.method,
                against,
                row.way,
                row.shot,
                round(float(gain.mean()), 2),
                round(float(1.96 * gain.std(ddof=1) / np.sqrt(len(gain))), 2),
                len(gain),
                row.queries,
                row.seed,
                row.episode_list,
                row.precision,
            )
        )
    return found


def table(differences: Sequence[PairedRow]) -> str:
    """The rows as a Markdown table: learners down, way and shot across."""
    cells = sorted({(row.way, row.shot) for row in differences})
    methods = list(dict.fromkeys(row.method for row in differences))
    value = {(row.method, row.way, row.shot): f"{row.difference:+.2f} ± {row.interval:.2f}" for row in differences}
    lines = [
        "| learner | " + " | ".join(f"{way}-way {shot}-shot" for way, shot in cells) + " |",
        "|---|" + "---|" * len(cells),
    ]
    lines += [f"| {m} | " + " | ".join(value[m, way, shot] for way, shot in cells) + " |" for m in methods]
    return "\n".join(lines)
