"""The table of results in docs/reliability.md, made from the lines that the faults printed.

    python -m tests.torture >> docs/reliability.jsonl
    python -m tests.torture.table            writes the table anew; a test holds the page to it

Of several lines of one fault the one with the most trials counts, and of these the last. Knows nothing of how faults
are run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.torture.line import Fault, everything

DOCS = Path(__file__).resolve().parents[2] / "docs"
LINES, PAGE = DOCS / "reliability.jsonl", DOCS / "reliability.md"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"


def best(lines: str) -> dict[str, dict[str, Any]]:
    """The line that counts, of each fault that has one."""
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, lines.splitlines()):
        before = found.get(line["fault"])
        if before is None or line["n"] >= before["n"]:
            found[line["fault"]] = line
    return found


def control(value: Mapping[str, Any] | str) -> str:
    return value if isinstance(value, str) else ", ".join(f"{key} {_short(item)}" for key, item in value.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_short, value)) or "none"
    return str(value)


def row(fault: Fault, line: Mapping[str, Any] | None) -> str:
    if line is None:
        return f"| `{fault.name}` | {fault.goal} | {fault.says} | not run | | | |"
    trials = f"{line['n']:,}" if line["n"] >= fault.n else f"{line['n']:,} of {fault.n:,}"
    broken = "; ".join([*line["wrong"], *line["missed"]]) or "none"
    cells = (f"`{fault.name}`", fault.goal, fault.says, trials, f"{line['lost']} of {line['acknowledged']:,}")
    return "| " + " | ".join((*cells, broken, control(line["control"]).replace("|", "/"))) + " |"


def table(lines: str) -> str:
    found = best(lines)
    head = "| fault | goal | what is promised | trials | lost of acknowledged | other expectations not met | control |"
    return "\n".join(
        [head, "|---|---|---|---|---|---|---|", *(row(f, found.get(f.name)) for f in everything().values())]
    )


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(LINES.read_text()) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
