"""Raw results: one JSON line per measured number, which says what it is. Knows nothing of what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from training.config import Config

SILENT = {"results"}  # flags that change nothing of what is measured


def command(name: str, config: Config) -> str:
    """What to type for this configuration, without flags at their defaults; DATA/ stands for where the data lie."""
    words = [f"python -m training {name}"]
    for field, info in type(config).model_fields.items():
        value = getattr(config, field)
        if field in SILENT or (not info.is_required() and value == info.default):
            continue
        flag = "--" + field.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words.append(f"{flag} {f'DATA/{value.name}' if field == 'data' else value}")
    return " ".join(words)


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
