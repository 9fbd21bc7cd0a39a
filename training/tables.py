"""Raw lines as Markdown tables: any experiment's, known or not, with its seeds together and its commands numbered.

A number with an interval is one cell; what is the same in every row is said once, above the table. Knows nothing of
what an experiment means.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.intervals import student
from training.raw import Line

# Fields that name a line or tell how it was made, and are shown elsewhere or not at all.
BESIDE = {"experiment", "labels", "command", "digest", "weights_digest", "episode_list", "measured_in_s", "default"}
NOTHING = "–"


@dataclass
class Commands:
    """Every command once, under a number, in the order in which the page names them."""

    known: dict[str, int] = field(default_factory=dict)

    def refer(self, lines: Iterable[Line]) -> str:
        """The numbers of the commands that made these lines, as links to the list."""
        found = dict.fromkeys(str(line["command"]) for line in lines if line.get("command"))
        numbers = sorted(self.known.setdefault(command, len(self.known) + 1) for command in found)
        return ", ".join(f"[{number}](#commands)" for number in numbers) or NOTHING


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def shown(value: Any) -> str:
    """One value as text."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    return str(value)


def half(line: Line, name: str) -> float | None:
    """The interval that belongs to a field: `<field>_interval`, or `interval` for accuracy and error."""
    own = line.get(f"{name}_interval")
    found = own if own is not None else line.get("interval") if name in ("accuracy", "error") else None
    return float(found) if isinstance(found, int | float) else None


def quantity(line: Line, name: str) -> str:
    """A field with its interval."""
    value, interval = line.get(name), half(line, name)
    if isinstance(value, int | float) and interval is not None:
        return f"{value:.2f} ± {interval:.2f}"
    return shown(value)


def fits(line: Line, where: Line) -> bool:
    """Whether a line is what a goal asks for: in one view an image, its examples not spread, unless it says so."""
    return all(line.get(key) == value for key, value in {"views": None, "spread": None, **where}.items())


def spread(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean over training seeds."""
    return float(student(len(values)) * statistics.stdev(values) / len(values) ** 0.5)


def over_seeds(values: Sequence[float]) -> str:
    """The mean over training seeds, its interval, and each."""
    return f"{statistics.mean(values):.2f} ± {spread(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def seed_of(line: Line) -> Any:
    return line.get("training_seed", line.get("seed"))


def kin(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines that differ in nothing but the training seed and what was measured, together."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        same = {
            key: value
            for key, value in line.items()
            if key not in {*BESIDE, "seed", "training_seed", "episodes", "steps"}
            and not isinstance(value, float | list | dict)
        }
        same.pop("seconds", None)
        groups.setdefault(repr(sorted(same.items(), key=lambda item: item[0])), []).append(line)
    found: list[list[Line]] = []
    for group in groups.values():
        seeds = [seed_of(line) for line in group]
        found += [group] if len(set(map(repr, seeds))) == len(group) else [[line] for line in group]
    return found


def together(group: Sequence[Line], name: str) -> str:
    """A field of one line, or of the same line with several training seeds."""
    values = [line.get(name) for line in group]
    if len(group) > 1:
        if name in ("seed", "training_seed"):
            return ", ".join(str(value) for value in values if value is not None)
        numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == len(group) and any(isinstance(value, float) for value in values) and len(set(numbers)) > 1:
            return over_seeds(numbers)
        if len(numbers) == len(group) and len(set(numbers)) > 1:  # a count: how many fitted into the time, perhaps
            return shown(round(statistics.mean(numbers)))
    if name in ("seed", "training_seed"):
        return str(values[0]) if values[0] is not None else NOTHING
    return quantity(group[0], name)


def general(lines: Sequence[Line], commands: Commands, columns: Sequence[str] | None = None) -> str:
    """Any lines as a table; what all of them share goes before it."""
    names = list(dict.fromkeys(name for line in lines for name in line)) if columns is None else list(columns)
    names = [n for n in names if n not in BESIDE and n != "interval" and not n.endswith("_interval")]
    if {"way", "shot"} <= set(names) and columns is None:
        at = min(names.index("way"), names.index("shot"))
        names = [*names[:at], "task", *names[at:]]
        names = [name for name in names if name not in ("way", "shot")]
    groups = kin(lines)
    table: dict[str, list[str]] = {}
    for name in names:
        if name == "task":
            table[name] = [task(group[0]) for group in groups]
        else:
            table[name] = [together(group, name) for group in groups]
    table = {name: cells for name, cells in table.items() if set(cells) != {NOTHING}}
    fixed = [n for n, cells in table.items() if len(set(cells)) == 1 and len(groups) > 1 and not _measured(groups, n)]
    before = ", ".join(f"{words(name)} {table[name][0]}" for name in fixed)
    left = [name for name in table if name not in fixed]
    rows = [[*(table[name][k] for name in left), commands.refer(group)] for k, group in enumerate(groups)]
    head = [*map(words, left), "command"]
    return (f"For every row: {before}.\n\n" if before else "") + markdown(head, rows)


def _measured(groups: Sequence[Sequence[Line]], name: str) -> bool:
    return any(isinstance(line.get(name), float) for group in groups for line in group)


def task(line: Line) -> str:
    """Its own name, where it has one."""
    if "task" in line:
        return str(line["task"])
    return f"{line['way']}-way {line['shot']}-shot" if "way" in line and "shot" in line else NOTHING


def words(name: str) -> str:
    return name.replace("_", " ")
