"""Many tasks: what each takes in Redis and in SQLite, and whether the service answers more slowly for them.

    python deploy/many.py --tasks 100000
    python deploy/many.py --tasks 10000 --sizes

Fills a store by its own `commit` with tasks of random features; while it is filled it need not sync, what it writes is
the same. Then a service on it is asked about one task, 64, all of them evenly, and all by Zipf's law: by 64 connections
in windows that take turns, and by one connection whose requests are mixed, so that what else the machine does weighs on
all alike. Among them are tasks it is asked about for the first time and again, and tasks whose heads were thrown away.
Everything lies in a folder of its own, which goes at the end. Prints tables and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]

from filled import DURABLE, GIB, RedisBeneath, SqliteBeneath, fill, name_of  # noqa: E402
from floor import pictures  # noqa: E402
from load import WARM_S, Closed, percentiles, run  # noqa: E402

from models.artifact import Artifact  # noqa: E402

MILLION = 1_000_000
FRESH = 4000  # tasks asked about for the first time, then again: as many as the service keeps in memory
ONE, CASES = "one task", ("one task", "64 tasks", "all, evenly", "all, by Zipf")
FIRST, AGAIN, WIPED = "for the first time", "the same again", "head thrown away"


@contextmanager
def service(artifact: Path, folder: Path, settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The address and the process id of a service with those settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
    given = {"port": 0, "artifact": artifact, "log_level": "warning", "data_dir": folder / "unused", **settings}
    environment |= {f"FEWSHOT_{name.upper()}": str(value) for name, value in given.items()}
    with (folder / "service.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "service"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout
            found = next((m[1] for line in process.stdout if (m := re.search(r"ready at (\S+)", line))), None)
            if found is None:
                raise SystemExit((folder / "service.log").read_text())
            yield found, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(40)
            if process.stdout:
                process.stdout.close()


def rss(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


class Asked(Closed):
    """Asks about tasks as they are drawn, each with the case it stands for, until there are no more.

    With 0 seconds only then, and from the first answer on.
    """

    def __init__(
        self, url: str, drawn: Iterator[tuple[str, int]], images: list[bytes], seconds: float, connections: int
    ):
        super().__init__(url, images, seconds or 600, deadline_s=60, connections=connections)
        if not seconds:
            self.begins -= WARM_S
        self.drawn = drawn
        self.case = ""
        self.by_case: dict[str, list[float]] = defaultdict(list)  # seconds; of one connection

    def next(self) -> bytes:
        image = super().next()
        found = next(self.drawn, None)
        if found is None and self.ends:
            self.ends, self.seconds = 0.0, time.perf_counter() - self.begins  # the others have ended soon, too
        self.case, task = found or ("", 0)
        head = f"POST /v1/tasks/{name_of(task)}/classify HTTP/1.1\r\nHost: service\r\nContent-Type: image/jpeg\r\n"
        return f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image

    def count(self, status: str, due: float) -> None:
        super().count(status, due)
        if due >= self.begins and self.case:
            self.by_case[self.case].append(time.perf_counter() - due)


def draws(case: str, tasks: int) -> Iterator[tuple[str, int]]:
    """Tasks that one case asks about, without end."""
    rng = np.random.default_rng()
    if case == "all, by Zipf":
        # The most popular lie anywhere in the store, the same ones each time.
        places = np.random.default_rng(3).permutation(tasks)
        ends = np.cumsum(np.arange(1, tasks + 1) ** -1.1)
        while True:
            numbers = places[np.searchsorted(ends, rng.uniform(0, ends[-1], 10_000))]
            yield from ((case, number) for number in numbers.tolist())
    most = min({ONE: 1, "64 tasks": 64}.get(case, tasks), tasks)
    while True:
        yield from ((case, number) for number in rng.integers(0, most, 10_000).tolist())


def mixed(draw: list[Iterator[tuple[str, int]]]) -> Iterator[tuple[str, int]]:
    """One of each in turn, as they come by chance, until one of them has no more."""
    dice = random.Random(4)
    while True:
        found = [next(one, None) for one in draw]
        if None in found:
            return
        dice.shuffle(found)
        yield from (one for one in found if one)


def classify(
    url: str, drawn: Iterator[tuple[str, int]], images: list[bytes], seconds: float, connections: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What was measured, and the latencies of each case."""

    async def ask() -> tuple[dict[str, Any], dict[str, list[float]]]:
        asked = Asked(url, drawn, images, seconds, connections)
        return await asked.measure(), asked.by_case

    found: tuple[dict[str, Any], dict[str, list[float]]] = run(ask())
    found[0]["bad"] = sum(count for status, count in found[0]["statuses"].items() if status != "200")
    return found


def ask(beneath: Any, wiped: int, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    images = pictures(64, seed=1)
    tasks = given.tasks - wiped  # that have their heads
    fresh = min(FRESH, tasks // (2 * given.rounds))
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with service(given.artifact, folder, {**beneath.settings, "precision": given.precision}) as (url, pid):
        classify(url, draws(ONE, tasks), images, 1, 64)
        before = rss(pid)
        for turn in range(given.rounds):
            # From the other end than the 64, for those are to be in memory.
            block = range(tasks - fresh * (turn + 1), tasks - fresh * turn)
            for case in (FIRST, AGAIN):
                rows[case].append(classify(url, ((case, task) for task in block), images, 0, 64)[0])
            for case in CASES:
                rows[case].append(classify(url, draws(case, tasks), images, given.seconds, 64)[0])
        after = rss(pid)
        thrown = ((WIPED, task) for task in range(tasks, given.tasks))
        together = mixed([*(draws(case, tasks) for case in CASES), thrown])
        found, alone = classify(url, together, images, given.seconds * given.rounds * (len(CASES) + 1), 1)
    return {"rows": rows, "alone": alone, "bad": found["bad"], "rss_mb": [round(before, 1), round(after, 1)]}


def figures(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each case, with what it is over one task."""
    found = []
    for case, windows in asked["rows"].items():
        row: dict[str, Any] = {"connections": 64, "case": case}
        for name in ("per_s", "p50_ms", "p99_ms"):
            row[name] = statistics.median(window[name] for window in windows)
        # Each window over the one task's of its own round.
        for name in ("per_s", "p50_ms"):
            one = [window[name] for window in asked["rows"][ONE]]
            ratios = [window[name] / other for window, other in zip(windows, one, strict=True)]
            row[f"{name} over one"] = round(statistics.median(ratios), 3)
        row["bad"] = sum(window["bad"] for window in windows)
        found.append(row)
    for case in (*CASES, WIPED):
        latencies = asked["alone"][case]
        row = {"connections": 1, "case": case, "answers": len(latencies), **percentiles(latencies)}
        row["p50_ms over one"] = round(statistics.median(latencies) / statistics.median(asked["alone"][ONE]), 3)
        found.append(row)
    return found


def measure(kind: type, artifact: Artifact, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir()
    beneath = kind(folder)
    try:
        written = run(fill(beneath, artifact, given))
        show_size(beneath.name, written, given)
        if hasattr(beneath, "start"):
            beneath.stop()
            written["restart_s"] = round(beneath.start(), 1)
            print(f"Redis started again with all of them in {written['restart_s']} s.")
        if given.sizes:
            return {"store": beneath.name, **written}
        asked = ask(beneath, written["wiped"], folder, given)
    finally:
        beneath.stop()
    lines = figures(asked)
    show_times(lines, asked["rss_mb"])
    bad = asked["bad"] + sum(row.get("bad", 0) for row in lines)
    print(f"{bad} answers were not 200.")
    return {"store": beneath.name, **written, "rss_mb": asked["rss_mb"], "bad": bad, "rows": lines}


def show_size(store: str, written: dict[str, Any], given: argparse.Namespace) -> None:
    print(
        f"\n## {store}: {given.tasks:,} tasks, {given.way} classes of {given.shots}\n\n"
        f"commit {written['commit_ms']} ms, synced and alone; filled in {written['fill_s']} s "
        f"({written['fill_per_s']} a second, not synced)\n\n"
        f"| | bytes a task | of these {given.tasks:,} | of a million |\n|---|---|---|---|"
    )
    for kind, slope in written["bytes"].items():
        print(f"| {kind} | {slope:,} | {written['whole_gib'][kind]} GiB | {slope * MILLION / GIB:.1f} GiB |")
    parts = {kind: f"{size:,} B" for kind, size in written["parts"].items()}
    print("\nof one task: " + ", ".join(f"{kind} {size}" for kind, size in parts.items()))


def show_times(lines: list[dict[str, Any]], rss_mb: list[float]) -> None:
    print("\n| connections | tasks | images/s | over one task | p50 ms | over one task | p99 ms |\n|---|" + 6 * "---|")
    for row in lines:
        speed = (f"{row['per_s']:.0f}", f"{row['per_s over one']:.3f}") if "per_s" in row else ("", "")
        times = f"{row['p50_ms']:.2f}", f"{row['p50_ms over one']:.3f}", f"{row['p99_ms']:.2f}"
        print("| " + " | ".join((str(row["connections"]), row["case"], *speed, *times)) + " |")
    print(f"\nthe service took {rss_mb[0]:.0f} MB with one task in memory, {rss_mb[1]:.0f} MB with as many as it keeps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--stores", default="redis,sqlite")
    parser.add_argument("--artifact", type=Path, default=ROOT / "models" / "pretrained" / "photos")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--seconds", type=float, default=3, help="of a window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", action="store_true", help="only what they take; no service is asked")
    parser.add_argument("--folder", type=Path, help="where the data are put; a temporary folder by default")
    given = parser.parse_args()
    if given.tasks <= 2 * DURABLE:
        parser.error(f"--tasks: at least {2 * DURABLE + 1}")
    artifact = Artifact.load(given.artifact)
    kinds = {"redis": RedisBeneath, "sqlite": SqliteBeneath}
    results = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for store in given.stores.split(","):
            results.append(measure(kinds[store], artifact, Path(name) / store, given))
            shutil.rmtree(Path(name) / store)
    settings = {key: getattr(given, key) for key in ("tasks", "way", "shots", "precision", "seconds", "rounds")}
    print("\n" + json.dumps({**settings, "artifact": artifact.digest, "results": results}))


if __name__ == "__main__":
    main()
