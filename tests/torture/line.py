"""What a fault reports, and the list of all faults. Knows nothing of services or stores."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tests.torture


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened. `control`: the same without what protects from the fault, and what it lost: it must lose.

    `wrong` names each expectation that was not met, with figures; `missed` each bound of time that was, which breaks
    the promise at full length only: the short form runs on machines that do something else as well.
    """

    acknowledged: int  # promises that were made
    lost: int  # and of those, not kept
    control: Mapping[str, Any] | str  # or a sentence: why there is none
    figures: Mapping[str, Any] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    goal: str  # number in the table of goals of docs/reliability.md
    says: str  # the promise, in a sentence
    run: Callable[[int, int, Path], Outcome]  # n, seed, an empty folder
    n: int
    quick: int

    def line(self, n: int, seed: int) -> dict[str, Any]:
        """Runs the fault n times and tells what came of it."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
            found = self.run(n, seed, Path(folder))
        return {
            "fault": self.name,
            "goal": self.goal,
            "n": n,
            "acknowledged": found.acknowledged,
            "lost": found.lost,
            "control": found.control,
            **found.figures,
            "wrong": list(found.wrong),
            "missed": list(found.missed),
            "kept": found.lost == 0 and not found.wrong and not (found.missed and n > self.quick),
            "seed": seed,
            "seconds": round(time.perf_counter() - start, 1),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "day": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": commit(),
        }


def commit() -> str:
    """What was run, where that is known: of a tree that was changed since, with a plus."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [git, "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


FAULTS: dict[str, Fault] = {}


def fault(
    goal: str, *, n: int, quick: int
) -> Callable[[Callable[[int, int, Path], Outcome]], Callable[[int, int, Path], Outcome]]:
    """Enters a function, named and described as it is, into the list. `n` and `quick`: how often, long and short."""

    def enter(run: Callable[[int, int, Path], Outcome]) -> Callable[[int, int, Path], Outcome]:
        name = run.__name__.replace("_", "-")
        assert name not in FAULTS, name
        assert run.__doc__, f"{name} promises nothing"
        FAULTS[name] = Fault(name, goal, run.__doc__.strip().splitlines()[0], run, n, quick)
        return run

    return enter


def everything() -> Mapping[str, Fault]:
    """All faults of all modules here, by name."""
    for module in pkgutil.iter_modules(tests.torture.__path__):
        if not module.name.startswith(("test_", "_")):
            importlib.import_module(f"tests.torture.{module.name}")
    return FAULTS


def shown(line: Mapping[str, Any]) -> str:
    return json.dumps(line, default=str)
