"""What is to be reached, and what was: the rows that deploy/bench.py prints.

A goal is a bound that must hold and one that is hoped for, on a figure that is a ratio to the floor of the same run
wherever it can be. Knows nothing of how figures are measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    what: str
    must: float | None  # None: it is only told
    moonshot: float | None
    form: str = "{:.2f} x"
    least: bool = False  # whether the figure is to be at least that, rather than at most


SHARE, CPU = "64 connections, images/s of the floor", "64 connections, CPU an image over the floor's"
GOALS = {
    "share_64 float32": Goal(SHARE, 0.85, 0.95, "{:.3f}", least=True),
    "share_64 int8": Goal(SHARE, 0.80, 0.90, "{:.3f}", least=True),
    "cpu_64 float32": Goal(CPU, 1.15, 1.05),
    "cpu_64 int8": Goal(CPU, None, None),
    "loss int8": Goal("points of accuracy that int8 loses, measured by `export`", 0.5, 0.5, "{:.2f}"),
    "tasks_64": Goal("64 tasks in flight, images/s over one task's", 0.95, 0.99, "{:.3f}", least=True),
    "p50_1": Goal("1 connection, p50 over one image bare", 1.30, 1.15),
    "share_8": Goal("8 connections, images/s of the floor", 0.70, 0.85, "{:.3f}", least=True),
    "adapt 5 x 5": Goal("learn 5 classes of 5, over its images bare", 1.25, 1.10),
    "adapt 20 x 5": Goal("learn 20 classes of 5, over its images bare", 1.25, 1.08),
    "adapt 100 x 10": Goal("learn 100 classes of 10, over its images bare", 1.25, 1.08),
    "add": Goal("add an image to a task of 1,000, over one image bare", 1.50, 1.10),
    "add brief": Goal("the same, learned behind the answer (`Prefer: return=minimal`); both rested", 1.50, 1.10),
    "refit": Goal("learn 1,000 features with another learner, the slowest of them", 20, 5, "{:.1f} ms"),
    "refit brief": Goal("the same, learned behind the answer", 20, 5, "{:.1f} ms"),
    "cold": Goal("classify with a head in the store and not in memory, p50 over warm", 1.10, 1.02, "{:.3f} x"),
    "gone": Goal("the same with a head in neither, which has to be made again", 1.10, 1.02, "{:.3f} x"),
    "goodput": Goal("asked for 4 times the peak, goodput over the peak", 0.80, 0.95, "{:.3f}", least=True),
    "refused": Goal("the same, p99 of refusals", 20, 5, "{:.1f} ms"),
    "undeclared": Goal("the same, answers that are neither 200 nor 503", 0, 0, "{:.0f}"),
    "first": Goal("start to first answer", 2.0, 0.7, "{:.2f} s"),
    "memory": Goal("memory after all this", 500, 350, "{:.0f} MiB"),
    "head": Goal("a head of 5 classes at rest, as in Redis", 6.5, 3.2, "{:.2f} KiB"),
    "zipf": Goal("p50 over many tasks by Zipf's law, over one task", 1.10, 1.03, "{:.3f} x"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A goal's figure in each round, or as often as it was measured."""

    goal: str
    values: tuple[float, ...]
    note: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    def reached(self) -> str:
        """moonshot, must, no; or nothing where there is no goal."""
        goal = GOALS[self.goal]
        if goal.must is None or goal.moonshot is None:
            return ""
        sign = -1 if goal.least else 1
        for name, bound in (("moonshot", goal.moonshot), ("must", goal.must)):
            if sign * self.value <= sign * bound:
                return name
        return "no"

    def row(self) -> dict[str, Any]:
        spread = [min(self.values), max(self.values)]
        return {
            "goal": self.goal,
            "value": self.value,
            "spread": spread,
            "n": len(self.values),
            "reached": self.reached(),
            "note": self.note,
        }


def figure(goal: str, values: float | Iterable[float], note: str = "") -> Figure:
    return Figure(goal, (values,) if isinstance(values, (int, float)) else tuple(values), note)


def table(figures: Sequence[Figure]) -> str:
    """Markdown: each figure's median, how far its rounds lay apart, the goals, and which was reached."""
    lines = ["| | median | spread (n) | must | moonshot | reached |", "|---|---|---|---|---|---|"]
    for found in figures:
        goal = GOALS[found.goal]
        sign = "≥" if goal.least else "≤"
        bounds = ["" if bound is None else f"{sign} {goal.form.format(bound)}" for bound in (goal.must, goal.moonshot)]
        spread = f"{goal.form.format(min(found.values))} to {goal.form.format(max(found.values))} ({len(found.values)})"
        what = f"{goal.what} ({found.note})" if found.note else goal.what
        lines.append("| " + " | ".join((what, goal.form.format(found.value), spread, *bounds, found.reached())) + " |")
    return "\n".join(lines)
