"""Ways to run the service, in turns on one machine: what each answers, and what it takes for an image.

    python deploy/variants.py                   # int8 at 64 connections: some six minutes
    python deploy/variants.py --only "2 processes,3 lanes" --rounds 5

Each window stands between two of the floor (deploy/floor.py), and each variant beside the first, the service as it is
shipped, in its own round. What a variant changes is a setting, how long a thread keeps the interpreter while others
wait for it, the number of services, which share the machine as replicas do, or where lanes do their work
(deploy/forked.py). Prints a table and, last, one JSON
line. What is better here, and on what, is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]

from floor import CORES, Floor, never_seen, pictures  # noqa: E402
from peers import rss_mb  # noqa: E402
from serving import Service  # noqa: E402

from models.artifact import Artifact  # noqa: E402

CONNECTIONS = 64


@dataclass(frozen=True)
class Variant:
    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    processes: int = 1
    program: Sequence[str] = ("-m", "service")


def switching(seconds: float) -> Sequence[str]:
    """The service, whose threads keep the interpreter for so long while others wait for it; Python's own is 5 ms."""
    main = "from service.__main__ import main; sys.exit(main())"
    return "-c", f"import sys; sys.setswitchinterval({seconds}); {main}"


VARIANTS = (
    Variant("as shipped"),
    Variant("interpreter handed over after 1 ms", program=switching(0.001)),
    Variant("interpreter handed over after 0.2 ms", program=switching(0.0002)),
    Variant("interpreter handed over after 20 ms", program=switching(0.02)),
    Variant(f"{CORES + 1} lanes", {"LANES": CORES + 1}),
    Variant(f"{2 * CORES} lanes", {"LANES": 2 * CORES}),
    Variant("batches of 8", {"MAX_BATCH": 8}),
    Variant("batches of 32", {"MAX_BATCH": 32}),
    Variant("no log", {"LOG_LEVEL": "warning"}),
    Variant(f"{CORES} processes", {"LANES": 1}, processes=CORES),
    Variant("lanes in forked processes", program=("-m", "deploy.forked")),
)


def window(services: Sequence[Service], files: Sequence[str], seconds: float) -> dict[str, Any]:
    """All of them asked at once, by as many connections in all as one would be."""
    with ThreadPoolExecutor(len(services)) as pool:
        each = CONNECTIONS // len(services)
        found = list(pool.map(lambda one: one.load(files, seconds, connections=each), services))
    per_s = sum(one["per_s"] for one in found)
    return {
        "per_s": per_s,
        "cpu_ms": sum(one["cpu_ms"] * one["per_s"] for one in found) / max(1.0, per_s),
        "p50_ms": statistics.mean(one["p50_ms"] for one in found),
        "p99_ms": max(one["p99_ms"] for one in found),
        "bad": sum(one["bad"] for one in found),
    }


def compare(artifact: Artifact, variants: Sequence[Variant], given: argparse.Namespace) -> list[dict[str, Any]]:
    images = pictures(64, seed=1)
    floor = Floor(artifact, given.precision, images)
    floor.throughput(1)
    windows: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        files = []
        for number, image in enumerate(images):
            files.append(f"{name}/{number}.jpg")
            Path(files[-1]).write_bytes(image)
        running: dict[str, list[Service]] = {}
        for variant in variants:
            for number in range(variant.processes):
                folder = Path(name) / f"{variant.name} {number}"
                folder.mkdir()
                service = Service(
                    artifact.path, given.precision, folder, settings=variant.settings, program=variant.program
                )
                running.setdefault(variant.name, []).append(stack.enter_context(service))
                service.adapt("bench", never_seen(images, 25), 5)
                service.load(files, 0.5, connections=CONNECTIONS)
        before = floor.throughput(given.seconds)
        for _ in range(given.rounds):
            for variant in variants:
                found = window(running[variant.name], files, given.seconds)
                after = floor.throughput(given.seconds)
                found["share"] = 2 * found["per_s"] / (before[0] + after[0])
                found["cpu"] = 2 * found["cpu_ms"] / 1e3 / (before[1] + after[1])
                windows[variant.name].append(found)
                before = after
        memory = {
            variant: sum(rss_mb(service.process.pid) for service in services) for variant, services in running.items()
        }
    first = windows[variants[0].name]
    rows = []
    for variant, found in windows.items():
        row: dict[str, Any] = {"variant": variant, "memory_mb": round(memory[variant])}
        for figure in ("share", "cpu", "p50_ms", "p99_ms"):
            row[figure] = round(statistics.median(one[figure] for one in found), 3)
        ratios = [one["share"] / other["share"] for one, other in zip(found, first, strict=True)]
        row["over_first"] = round(statistics.median(ratios), 3)
        row["spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
        row["bad"] = sum(one["bad"] for one in found)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ROOT / "models" / "pretrained" / "photos")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--only", help="names of variants, with commas between; the first always runs")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    wanted = given.only.split(",") if given.only else [variant.name for variant in VARIANTS]
    variants = [variant for variant in VARIANTS if variant is VARIANTS[0] or variant.name in wanted]
    rows = compare(Artifact.load(given.artifact), variants, given)
    print(
        "| | images/s of the floor | over the first, in turns | CPU an image over the floor's | p50 ms | p99 ms "
        "| memory MB | not 200 |\n|---|" + 7 * "---|"
    )
    for row in rows:
        turns = f"{row['over_first']:.3f} ({row['spread'][0]:.3f} to {row['spread'][1]:.3f})"
        cells = (row["variant"], f"{row['share']:.3f}", turns, f"{row['cpu']:.2f} x")
        print("| " + " | ".join(map(str, (*cells, row["p50_ms"], row["p99_ms"], row["memory_mb"], row["bad"]))) + " |")
    print("\n" + json.dumps({"precision": given.precision, "cores": CORES, "rows": rows}))


if __name__ == "__main__":
    main()
