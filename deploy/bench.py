"""`make bench`: the service over HTTP against the floor of the same run, and which goals are reached.

    python deploy/bench.py                      # float32, then int8: some five minutes
    python deploy/bench.py --precision int8 --seconds 2 --rounds 2
    python deploy/bench.py --all                # and deploy/many.py and deploy/peers.py: an hour

The floor is what the work costs without a server (deploy/floor.py). Floor and service are measured in turns and each
window of the service is put beside the floor just before and after it, so that a machine that slows down slows both;
then the median over the rounds is taken. The service is as it ships, with keys, metrics, rejection and log. Prints a
table for each precision, what is behind it, and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]

from floor import CORES, Floor, never_seen, pictures, steadiness  # noqa: E402
from goals import Figure, figure, table  # noqa: E402
from serving import Service  # noqa: E402

from models.artifact import Artifact  # noqa: E402
from service.precision import int8_loss  # noqa: E402

MANY = [f"many-{number}" for number in range(64)]
SUPPORTS = ((5, 5), (20, 5), (100, 10))  # way, shot
LARGE = "adapt-100-10"
BEHIND_S = 0.6  # for what is learned behind an answer
COLD = 100  # tasks whose heads are not in memory, and as many whose heads are thrown away
TIMES = 4  # the overload, over the peak


class Bench:
    """One artifact at one precision; `detail` is what the figures were made from."""

    def __init__(self, artifact: Artifact, precision: str, folder: Path, *, seconds: float, rounds: int):
        self.artifact, self.precision, self.folder = artifact, precision, folder
        self.seconds, self.rounds = seconds, rounds
        self.images = pictures(64, seed=1)
        self.many = pictures(max(way * shot for way, shot in SUPPORTS), seed=2)  # no file is sent under two labels
        self.files = []
        for number, image in enumerate(self.images):
            (folder / f"{number}.jpg").write_bytes(image)
            self.files.append(str(folder / f"{number}.jpg"))
        self.floor = Floor(artifact, precision, self.images)
        self.floor.throughput(1)
        self.detail: dict[str, Any] = {"precision": precision}

    def run(self) -> list[Figure]:
        with Service(self.artifact.path, self.precision, self.folder) as service:
            for task in ("bench", *MANY):
                service.adapt(task, never_seen(self.images, 25 if task == "bench" else 10), 5)
            figures = [*self.under_load(service), *self.adaptation(service)]
            figures += [*self.addition(service), *self.refit(service), *self.overload(service)]
            memory = service.memory()
        figures += [*self.started_again(), figure("memory", memory)]
        if self.precision == "int8" and (loss := int8_loss(self.artifact)) is not None:
            figures.append(figure("loss int8", loss))
        return figures

    def under_load(self, service: Service) -> list[Figure]:
        """Closed loops of 64, 8 and 1 connections, and of 64 on as many tasks, each beside the floor of its round."""
        loops = {"64": {"connections": 64}, "tasks": {"connections": 64, "tasks": ",".join(MANY)}}
        loops |= {"8": {"connections": 8}, "1": {"connections": 1}}
        windows: dict[str, list[dict[str, Any]]] = {name: [] for name in loops}
        floors, singles = [self.floor.throughput(self.seconds)], []
        for _ in range(self.rounds):
            for name, options in loops.items():
                if name == "1":
                    singles.append(self.floor.single())
                windows[name].append(service.load(self.files, self.seconds, **options))
            floors.append(self.floor.throughput(self.seconds))
        beside = [tuple(map(statistics.mean, zip(*pair, strict=True))) for pair in itertools.pairwise(floors)]
        self.detail["floor"] = {
            "per_s": [round(per_s, 1) for per_s, _ in floors],
            "cpu_ms": [round(1e3 * cpu, 3) for _, cpu in floors],
            "single_ms": [round(single, 3) for single in singles],
        }
        self.detail["loops"] = {
            name: [{key: row[key] for key in ("per_s", "p50_ms", "p99_ms", "cpu_ms", "bad")} for row in rows]
            for name, rows in windows.items()
        }

        def share(name: str) -> list[float]:
            return [row["per_s"] / limit for row, (limit, _) in zip(windows[name], beside, strict=True)]

        cpu = [row["cpu_ms"] / 1e3 / each for row, (_, each) in zip(windows["64"], beside, strict=True)]
        bare = zip(windows["1"], singles, strict=True)
        return [
            figure(f"share_64 {self.precision}", share("64")),
            figure(f"cpu_64 {self.precision}", cpu),
            figure("tasks_64", [a["per_s"] / b["per_s"] for a, b in zip(windows["tasks"], windows["64"], strict=True)]),
            figure("p50_1", [row["p50_ms"] / single for row, single in bare]),
            figure("share_8", share("8")),
        ]

    def adaptation(self, service: Service) -> list[Figure]:
        """Each size in turns with its images bare; images that the service has not seen, after one that warms up."""
        figures = []
        for way, shot in SUPPORTS:
            count = way * shot
            task = f"adapt-{way}-{shot}"
            times = []
            for number in range(1 + max(1, round(self.rounds * min(3, 250 / count)))):
                bare = self.floor.together(never_seen(self.many, count))
                served = service.adapt(task, never_seen(self.many, count), way)
                if number or count > 250:  # a thousand images warm up by themselves
                    times.append((served, bare))
            self.detail[task] = [(round(served, 1), round(bare, 1)) for served, bare in times]
            figures.append(figure(f"adapt {way} x {shot}", [served / bare for served, bare in times]))
        return figures

    def addition(self, service: Service) -> list[Figure]:
        """Told in full, and in brief: then a pause follows, for the learning behind the answer.

        After a pause an image takes longer, bare as well: so its floor is one image after the same pause.
        """
        figures = []
        for name, brief in (("add", False), ("add brief", True)):
            times = []
            for number in range(5 * self.rounds + 1):
                bare = self.floor.single(1 if brief else 20, start=number)
                time.sleep(BEHIND_S * brief)
                new = never_seen(self.images[number % 64 :], 1)
                served = service.adapt(LARGE, new, 1, method="POST", path="/examples", brief=brief)
                times.append((served, bare))
                time.sleep(BEHIND_S * brief)
            self.detail[name] = [(round(served, 2), round(bare, 2)) for served, bare in times[1:]]
            figures.append(figure(name, [served / bare for served, bare in times[1:]]))
        return figures

    def refit(self, service: Service) -> list[Figure]:
        """The task with the examples of the hundred classes learns them with each learner in turn."""
        methods, figures = list(self.artifact.manifest.methods), []
        for name, brief in (("refit", False), ("refit brief", True)):
            times: dict[str, list[float]] = {}
            for number in range(3 * self.rounds * len(methods)):
                method = methods[number % len(methods)]
                spent = service.connection.ask("PATCH", f"/v1/tasks/{LARGE}?method={method}", brief=brief)
                times.setdefault(method, []).append(spent)
                time.sleep(BEHIND_S * brief)
            medians = {method: statistics.median(found) for method, found in times.items()}
            self.detail[f"{name}_ms"] = {method: round(median, 1) for method, median in medians.items()}
            slowest = max(medians, key=medians.__getitem__)
            others = ", ".join(
                f"{method} {median:.0f}" for method, median in sorted(medians.items()) if method != slowest
            )
            figures.append(figure(name, times[slowest], f"`{slowest}`; {others} ms"))
        return figures

    def overload(self, service: Service) -> list[Figure]:
        """An open loop at four times the peak that was found just before and is found again just after."""
        peaks, found = [service.load(self.files, self.seconds, connections=64)], []
        for _ in range(max(1, self.rounds // 2)):
            options = {"rate": TIMES * peaks[-1]["goodput_per_s"], "deadline_ms": 400 + 2 * peaks[-1]["p99_ms"]}
            found.append(service.load(self.files, 2 * self.seconds, **options))
            peaks.append(service.load(self.files, self.seconds, connections=64))
        self.detail["overload"] = [
            {key: row[key] for key in ("rate", "goodput_per_s", "statuses", "by_status", "lag_p99_ms")} for row in found
        ]
        good = [
            row["goodput_per_s"] * 2 / (a["goodput_per_s"] + b["goodput_per_s"])
            for row, a, b in zip(found, peaks, peaks[1:], strict=False)
        ]
        refused = [row["by_status"]["503"]["p99_ms"] for row in found if "503" in row["by_status"]]
        undeclared = [
            sum(count for status, count in row["statuses"].items() if status not in ("200", "503")) for row in found
        ]
        figures = [figure("goodput", good), figure("undeclared", undeclared)]
        return [*figures, figure("refused", refused)] if refused else figures  # on a starved machine all give up first

    def started_again(self) -> list[Figure]:
        """On the same data: the time to the first answer, and what one costs whose head is not in memory.

        The heads of all tasks so far are thrown away; those of as many that are taught after that are in the store.
        """
        for kind in ("gone", "cold"):
            with Service(self.artifact.path, self.precision, self.folder) as service:
                for number in range(COLD):
                    service.adapt(f"{kind}-{number}", never_seen(self.images, 25), 5)
            if kind == "gone":
                with closing(sqlite3.connect(self.folder / "data" / "fewshot.sqlite3", isolation_level=None)) as store:
                    store.execute("DELETE FROM heads")
        starts, rounds = [], []
        for number in range(self.rounds):
            with Service(self.artifact.path, self.precision, self.folder) as service:
                service.classify("bench", self.images[0])
                starts.append(time.perf_counter() - service.started)
                for turn in range(20):
                    service.classify("bench", self.images[turn])
                times: dict[str, list[float]] = {"warm": [], "cold": [], "gone": []}
                for turn, one in enumerate(range(number, COLD, self.rounds)):
                    tasks = {"warm": "bench", "cold": f"cold-{one}", "gone": f"gone-{one}"}
                    for kind in list(tasks) if turn % 2 else reversed(tasks):
                        times[kind].append(service.classify(tasks[kind], self.images[turn % 64]))
                rounds.append({kind: round(statistics.median(found), 3) for kind, found in times.items()})
        self.detail["starts_s"] = [round(start, 2) for start in starts]
        self.detail["heads_ms"] = rounds
        over = {kind: [one[kind] / one["warm"] for one in rounds] for kind in ("cold", "gone")}
        return [*(figure(kind, found) for kind, found in over.items()), figure("first", starts)]


def bench(artifact: Artifact, precision: str, *, seconds: float, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        one = Bench(artifact, precision, Path(name), seconds=seconds, rounds=rounds)
        figures = one.run()
    print(f"\n## {artifact.manifest.name}, {' x '.join(map(str, artifact.decoder().shape))}, {precision}\n")
    print(table(figures))
    floor = one.detail["floor"]
    print(
        f"\nfloor: {statistics.median(floor['per_s']):.0f} images/s ({min(floor['per_s']):.0f} to "
        f"{max(floor['per_s']):.0f}), {statistics.median(floor['cpu_ms']):.2f} ms CPU an image, "
        f"{statistics.median(floor['single_ms']):.2f} ms for one alone",
        flush=True,
    )
    return {**one.detail, "figures": [found.row() for found in figures]}


def of_others(name: str, *options: str) -> dict[str, Any]:
    """Runs another of the scripts beside this one, showing what it prints; the JSON of its last line."""
    command = [sys.executable, "-u", str(ROOT / "deploy" / f"{name}.py"), *options]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode:
        raise SystemExit(process.returncode)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def many_tasks(found: dict[str, Any]) -> list[Figure]:
    """Of each store: the head of one task, and one connection's p50 over all tasks by Zipf's law."""
    figures = []
    for store in found["results"]:
        name = store["store"]
        if name == "redis":  # what it takes there, key and all
            figures.append(figure("head", store["parts"]["head"] / 1024, name))
        alone = [row for row in store["rows"] if row["connections"] == 1 and row["case"] == "all, by Zipf"]
        note = f"{name}, {found['tasks']:,} tasks"
        figures.append(figure("zipf", [row["p50_ms over one"] for row in alone], note))
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ROOT / "models" / "pretrained" / "photos")
    parser.add_argument("--precision", default="float32,int8")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="run deploy/many.py and deploy/peers.py as well")
    parser.add_argument("--tasks", type=int, default=100_000, help="how many for deploy/many.py")
    given = parser.parse_args(arguments)
    artifact = Artifact.load(given.artifact)
    machine = f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}"
    print(f"{machine}; medians of {given.rounds} windows of {given.seconds:g} s, in turns with the floor")
    half, most = steadiness()
    print(f"how steady the machine is: the same work takes {half} ms, and {most} ms one time in a hundred", flush=True)
    result: dict[str, Any] = {"machine": machine, "steadiness_ms": [half, most], "artifact": artifact.digest}
    result["results"] = [
        bench(artifact, precision, seconds=given.seconds, rounds=given.rounds)
        for precision in given.precision.split(",")
    ]
    if given.all:
        same = ["--artifact", str(given.artifact), "--seconds", str(given.seconds), "--rounds", str(given.rounds)]
        result["many"] = of_others("many", *same, "--tasks", str(given.tasks))
        print("\n" + table(many_tasks(result["many"])))
        result["peers"] = of_others("peers", *same, "--precision", given.precision)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
