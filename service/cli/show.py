"""What commands print: tables on a terminal, lines of tab-separated fields in a pipe, JSON when it is asked for.

Answers go to stdout; what is said about them goes to stderr. Knows nothing of requests.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service.client import Prediction, Rejected, TaskState
from service.client.pictures import File

OBEYED = re.compile("[\x7f-\x9f]")  # by a terminal, and not escaped in JSON


class Failure(Exception):
    """A command cannot do what it was asked to; the message is one sentence."""


def is_terminal() -> bool:
    return sys.stdout.isatty()


def as_json(document: object) -> None:
    text = json.dumps(plain(document), indent=2 if is_terminal() else None, ensure_ascii=False)
    print(OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def plain(value: object) -> Any:
    """Values of the client as JSON knows them; a task's name is called what the API calls it."""
    if isinstance(value, TaskState):
        fields = {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {"task": fields.pop("name"), **fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, datetime | Path):
        return value.isoformat() if isinstance(value, datetime) else str(value)
    return value


def rows(columns: Sequence[str], lines: Sequence[Sequence[object]], *, look: Callable[..., Any] | None = None) -> None:
    """A table, or a line for each row. `look` makes a row of a terminal's table from a row of fields."""
    if not is_terminal():
        for line in lines:
            print("\t".join(_field(item) for item in line))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*(look(*line) if look else map(_cell, line)))
    Console().print(table)


def _field(item: object) -> str:
    """Text that is one field whatever it holds: labels and file names may hold anything."""
    text = "" if item is None else f"{item:.6g}" if isinstance(item, float) else str(item)
    return harmless("".join(" " if character in "\t\r\n" else character for character in text))


def harmless(text: str) -> str:
    """Without what a terminal would obey: names of files, and what a service says, are somebody else's."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c != "\n" else c for c in text)


def _cell(item: object) -> RenderableType:
    return _words(_field(item))


def _words(text: str, style: str = "") -> Text:
    return Text(harmless(text), style)


def say(text: str) -> None:
    print(harmless(text), file=sys.stderr)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while images are sent; nothing where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as shown:
        bar = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(bar, completed=done, total=total)


def left_out(rejected: Sequence[Rejected]) -> None:
    for item in rejected:
        say(f"Left out {item.name or f'image {item.index}'}: {item.detail}")


def task(found: TaskState, *, json: bool, versions: Sequence[Any] | None = None, with_examples: bool = False) -> None:
    """A task with its report."""
    left_out(found.rejected)
    if json:
        as_json({**plain(found), **({} if versions is None else {"versions": plain(versions)})})
        return
    report = found.report
    facts: list[tuple[object, ...]] = [
        ("task", found.name),
        ("version", found.version),
        ("method", found.method),
        ("head", found.head),
    ]
    for item in found.classes:
        facts.append(("class", item.label, item.shots))
        if with_examples:
            facts += [("example", item.label, e.id) for e in found.examples if e.label == item.label]
    if found.unlabelled:
        facts.append(("unlabelled", found.unlabelled))
    if report.accuracy is not None:
        facts.append(("accuracy", report.accuracy, *(report.interval or ())))
    facts += [("confusion", item.label, item.taken_for, item.count) for item in report.confusions]
    facts += [
        ("suspect", item.name or item.example, item.label, item.looks_like, item.example) for item in report.suspects
    ]
    if report.advice:
        facts.append(("advice", report.advice))
    if found.expires_at is not None:
        facts.append(("expires", found.expires_at.isoformat(timespec="seconds")))
    facts += [
        (
            "kept",
            v.version,
            v.head,
            v.created_at and v.created_at.isoformat(timespec="seconds"),
            v.method,
            v.classes,
            v.examples,
        )
        for v in versions or ()
    ]
    if not is_terminal():
        rows((), facts)
        return
    grid = Table.grid(padding=(0, 2))
    for kind, *rest in facts:
        grid.add_row(_words(str(kind), style="dim"), _sentence(str(kind), rest))
    Console().print(grid)


def _sentence(kind: str, fact: Sequence[Any]) -> Text:
    match kind, fact:
        case "class", (label, shots):
            return _words(f"{label}  ") + _words(f"{shots} example{'s' * (shots != 1)}", style="dim")
        case "accuracy", (value, low, high):
            percent = [f"{share * 100:.0f}" for share in (value, low, high)]
            return _words("{} % of its own examples, each held out in turn (95 %: {} to {})".format(*percent))
        case "confusion", (label, taken_for, count):
            return _words(f"{label!r} was taken for {taken_for!r} {'once' if count == 1 else f'{count} times'}")
        case "example", (_, example):
            return _words(example, style="dim")
        case "suspect", (name, label, looks_like, example):
            said = _words(f"{name} is called {label!r} and looks like {looks_like!r}", style="yellow")
            return said if name == example else said + _words(f" ({example})", style="dim")
        case "advice", (text,):
            return _words(text, style="bold")
        case "kept", (version, head, None, *_):
            return _words(f"version {version}  ") + _words(head, style="dim")
        case "kept", (version, head, at, method, classes, examples):
            return _words(f"version {version}  {at}  {method}, {classes} classes, {examples} examples  ") + _words(
                head, style="dim"
            )
        case _:
            return _words(" ".join(_field(item) for item in fact))


def predictions(files: Sequence[File], found: Sequence[Prediction], *, explain: bool) -> None:
    """One line for each image: its name, label, probability, how known it looks, and what is to be said of it."""
    columns = ["image", "label", "probability", "known", "", *(["nearest"] if explain else [])]
    lines: list[tuple[object, ...]] = []
    for file, row in zip(files, found, strict=True):
        remark = row.error.code if row.error else row.reason
        nearest = [", ".join(f"{n.label} {n.example} {n.similarity:.3f}" for n in row.nearest)] if explain else []
        lines.append((file.name, row.label, row.probability, row.known, remark, *nearest))

    def look(name: str, label: str | None, p: float | None, known: float | None, remark: str | None, *more: str) -> Any:
        answer = _words(label) if label is not None else _words((remark or "").replace("_", " "), style="yellow")
        bar: RenderableType = ""
        if p is not None:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(total=1, completed=p, width=20), f"{p * 100:3.0f} %")
        return _words(name), answer, bar, "" if known is None else f"{known:.2f}", "", *map(_words, more)

    rows(columns, lines, look=look)


def check(found: Any) -> None:
    """One line of the doctor's, and what to do."""
    if not is_terminal():
        rows((), [(found.status, found.name, found.found, found.fix)])
        return
    colour = {"ok": "green", "note": "blue", "warn": "yellow", "fail": "bold red"}[found.status]
    line = _words(f"{found.status:5}", style=colour) + _words(f"{found.name:9} ", style="bold") + _words(found.found)
    if found.fix:
        line += _words(f"\n{'':15}{found.fix}", style=colour if found.status == "fail" else "")
    Console(soft_wrap=True).print(line, highlight=False)
