"""Files of JSON lines, raw results and logs: read, added to, and cut. Knows nothing of what a line tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cut(path: Path, last: Callable[[dict[str, Any]], bool]) -> None:
    """Takes out of a log what a run that goes on from a checkpoint will write again, and what a kill left half written.

    `last` tells of a line whether it stays.
    """
    if not path.exists():
        return
    before = path.read_text()
    kept = []
    for text in before.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and last(line):
            kept.append(text + "\n")
    if "".join(kept) != before:
        partial = path.with_suffix(".partial-log")
        partial.write_text("".join(kept))
        partial.replace(path)


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
