"""What was aimed at, and whether it was reached: each goal is looked up in the raw results.

A goal is a line of `goals.jsonl`: `goal` and `text`, the fields that a result must have (`where`), the `field` that is
read and what it must reach (`least`), stay under (`most`), or both. `less` and `over` name another result in the same
way, which is subtracted, or divided by. `why` is what we believe holds back one that is not reached, and what was
tried. Knows nothing of how results were made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from training.accuracy import distinct
from training.raw import Line
from training.tables import NOTHING, Commands, fits, half, markdown, seed_of, spread


def goals_table(goals: Sequence[Line], lines: Sequence[Line], commands: Commands) -> str:
    found = distinct(lines)
    rows = [_row(goal, found, commands) for goal in goals]
    return markdown(["goal", "what", "aim", "ours", "episodes", "reached", "command"], rows)


def reasons(goals: Sequence[Line]) -> str:
    """What is said of the goals that are not reached, one a line."""
    return "\n".join(f"- **{goal['goal']}**, {goal['text']}: {goal['why']}" for goal in goals if "why" in goal)


def _row(goal: Line, found: Sequence[Line], commands: Commands) -> list[str]:
    aim = " and ".join(f"{sign} {goal[name]:g}" for name, sign in (("least", "≥"), ("most", "≤")) if name in goal)
    start = [goal["goal"], goal["text"], aim]
    mine, value = _mean(goal, "where", found)
    beside = [_mean(goal, name, found) for name in ("less", "over") if name in goal]
    if not mine or not all(others for others, _ in beside):
        return [*start, "not measured", NOTHING, NOTHING, NOTHING]
    for _, other in beside:
        value = value - other if "less" in goal else value / other
    width = _width(goal, mine, [others for others, _ in beside])
    seeds = "" if len(mine) == 1 else f" (mean of {len(mine)} seeds)"
    ours = f"{value:.2f}" + ("" if width is None else f" ± {width:.2f}") + seeds
    episodes = f"{mine[0]['episodes']:,}" if "episodes" in mine[0] else NOTHING
    made = commands.refer([*mine, *(line for others, _ in beside for line in others)])
    return [*start, ours, episodes, _verdict(goal, value, width or 0.0), made]


def _mean(goal: Line, name: str, found: Sequence[Line]) -> tuple[list[Line], float]:
    """The results that a goal speaks of, and the mean of their field."""
    mine = [line for line in found if fits(line, goal[name])]
    mine = [line for line in mine if isinstance(line.get(goal["field"]), int | float)]
    return mine, statistics.mean(line[goal["field"]] for line in mine) if mine else math.nan


def _width(goal: Line, mine: Sequence[Line], beside: Sequence[Sequence[Line]]) -> float | None:
    """Half the width of the 95 % interval: over the seeds, where there are several, else over the episodes.

    Of a difference or a ratio over the seeds that both sides have; None where they have not the same. Of a difference
    of one result and another, as if they had nothing in common.
    """
    name = goal["field"]
    if not beside:
        return half(mine[0], name) if len(mine) == 1 else spread([line[name] for line in mine])
    sides = [{repr(seed_of(line)): float(line[name]) for line in lines} for lines in (mine, *beside)]
    halves = [half(lines[0], name) for lines in (mine, *beside)]
    if "less" in goal and all(len(lines) == 1 for lines in (mine, *beside)) and None not in halves:
        return math.hypot(*(width for width in halves if width is not None))
    if len(mine) < 2 or any(side.keys() != sides[0].keys() or len(side) < len(mine) for side in sides):
        return None
    values = []
    for seed, value in sides[0].items():
        for side in sides[1:]:
            value = value - side[seed] if "less" in goal else value / side[seed]
        values.append(value)
    return spread(values)


def _verdict(goal: Line, value: float, width: float) -> str:
    short = max(goal["least"] - value if "least" in goal else -math.inf, value - goal.get("most", math.inf))
    if short <= -width:
        return "yes"
    if short <= 0:
        return "yes, within the interval of the aim"
    return f"no, by {short:.2f}" + (" (within the interval)" if short <= width else "")
