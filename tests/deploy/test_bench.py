"""deploy/bench.py: what it makes of what floor and service say, with both played."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import bench
from deploy.bench import Bench
from models.artifact import Artifact
from tests.deploy import ROOT


class Floor:
    """100 images a second, then 200: a machine that gets faster."""

    def __init__(self) -> None:
        self.windows = itertools.count()

    def throughput(self, seconds: float) -> tuple[float, float]:
        return (100.0, 0.010) if next(self.windows) == 0 else (200.0, 0.005)

    def single(self, rounds: int = 200, *, start: int = 0) -> float:
        return 2.0 if rounds > 1 else 3.0  # one image after a pause takes longer

    def together(self, images: list[bytes]) -> float:
        return 10.0 * len(images)


class Service:
    def __init__(self, *_: object) -> None:
        self.started = time.perf_counter() - 1
        self.connection = SimpleNamespace(ask=self._ask)
        self.learned: list[tuple[str, int, int]] = []

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _ask(self, method: str, path: str, *, brief: bool) -> float:
        return 1.5 if brief else 7.0 if path.endswith("lstm") else 3.0

    def load(self, files: list[str], seconds: float, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"p50_ms": 2.5, "p99_ms": 50.0, "cpu_ms": 9.0, "bad": 0}
        if "rate" in options:
            assert options == {"rate": 4 * 120.0, "deadline_ms": 500.0}
            found |= {"rate": options["rate"], "goodput_per_s": 90.0, "statuses": {"200": 900, "503": 3000, "late": 5}}
            return found | {"by_status": {"503": {"p99_ms": 4.0}}, "lag_p99_ms": 1.0}
        per_s = {64: 120.0, 8: 75.0, 1: 30.0}[options["connections"]] - (6 if "tasks" in options else 0)
        return found | {"per_s": per_s, "goodput_per_s": per_s}

    def adapt(self, task: str, images: list[bytes], way: int, *, brief: bool = False, **_: object) -> float:
        if brief:
            return 3.3
        self.learned.append((task, way, len(images)))
        return 11.0 * len(images) if len(images) > 1 else 2.2

    def classify(self, task: str, image: bytes) -> float:
        return {"cold": 4.2, "gone": 4.8}.get(task.partition("-")[0], 4.0)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Bench]:
    found = Bench.__new__(Bench)
    found.artifact = Artifact.load(ROOT / "models" / "pretrained" / "characters")
    found.precision, found.folder, found.seconds, found.rounds = "int8", tmp_path, 1.0, 1
    found.images = found.many = [b"\xff\xd8" + bytes([number]) for number in range(64)]
    found.files, found.detail = [], {}
    found.floor = Floor()  # type: ignore[assignment]
    (tmp_path / "data").mkdir()
    with closing(sqlite3.connect(tmp_path / "data" / "fewshot.sqlite3", isolation_level=None)) as store:
        store.execute("CREATE TABLE heads (head TEXT)")
        store.execute("INSERT INTO heads VALUES ('kept')")
        yield found
        assert store.execute("SELECT * FROM heads").fetchall() == []


def values(figures: list[Any]) -> dict[str, float]:
    return {found.goal: round(found.value, 4) for found in figures}


def test_each_figure_is_a_ratio_to_what_was_measured_beside_it(one: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Service", Service)
    service = Service()
    assert values(one.under_load(service)) == {
        "share_64 int8": 0.8,  # 120 beside 150, the mean of the floor before and after
        "cpu_64 int8": 1.2,
        "tasks_64": 0.95,
        "p50_1": 1.25,
        "share_8": 0.5,
    }
    assert values(one.adaptation(service)) == {"adapt 5 x 5": 1.1, "adapt 20 x 5": 1.1, "adapt 100 x 10": 1.1}
    assert set(service.learned) == {("adapt-5-5", 5, 25), ("adapt-20-5", 20, 100), ("adapt-100-10", 100, 1000)}
    monkeypatch.setattr(bench, "BEHIND_S", 0)
    assert values(one.addition(service)) == {"add": 1.1, "add brief": 1.1}
    refit, brief = one.refit(service)
    assert brief.value == 1.5
    assert (refit.value, refit.note) == (7.0, "`lstm`; gradient 3, prototype 3, ridge 3, whitened 3 ms")
    assert values(one.overload(service)) == {"goodput": 0.75, "undeclared": 5, "refused": 4.0}
    again = values(one.started_again())
    assert again["cold"] == pytest.approx(1.05)
    assert again["gone"] == pytest.approx(1.2)
    assert 1 <= again["first"] < 60


def test_what_many_tasks_cost_is_read_from_the_other_script() -> None:
    rows = [
        {"connections": 1, "case": "all, by Zipf", "p50_ms over one": 1.02},
        {"connections": 64, "case": "all, by Zipf", "p50_ms over one": 9.0},
        {"connections": 1, "case": "one task", "p50_ms over one": 1.0},
    ]
    stores = [{"store": name, "parts": {"head": 3072}, "rows": rows} for name in ("redis", "sqlite")]
    found = bench.many_tasks({"tasks": 1000, "results": stores})
    assert [(one.goal, one.value, one.reached()) for one in found] == [
        ("head", 3.0, "moonshot"),
        ("zipf", 1.02, "moonshot"),
        ("zipf", 1.02, "moonshot"),
    ]
