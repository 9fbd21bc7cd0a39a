"""What an answer costs around decoding and the extractor: each step alone, in microseconds of one thread's CPU.

    python deploy/parts.py

The quickest of many rounds counts, so that it can be repeated on a machine that does other things as well; what threads
cost each other is not in it. Decoding is there for comparison. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]

from floor import pictures  # noqa: E402
from load import run  # noqa: E402

from models.artifact import Artifact  # noqa: E402
from models.containers import unwrap  # noqa: E402
from models.head import Affine, Head  # noqa: E402
from service import logs  # noqa: E402
from service.answering import Predictions, answered  # noqa: E402
from service.metrics import Metrics  # noqa: E402
from service.stores import Pointer  # noqa: E402
from service.web import answers  # noqa: E402

WAY = 5
ROUNDS, CALLS = 20, 50


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of a call: the quickest round's, and the median."""
    start = time.thread_time()
    work()
    calls = max(1, min(CALLS, round(2e-3 / (time.thread_time() - start))))  # a round takes some milliseconds
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        for _ in range(calls):
            work()
        times.append((time.thread_time_ns() - start) / calls / 1e3)
    return min(times), statistics.median(times)


async def deadline() -> tuple[float, float]:
    """The same of a deadline that does not pass, on the event loop that serves."""
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        for _ in range(CALLS):
            async with asyncio.timeout(30):
                pass
        times.append((time.thread_time_ns() - start) / CALLS / 1e3)
    return min(times), statistics.median(times)


def steps(artifact: Artifact) -> dict[str, Callable[[], object]]:
    manifest, rng = artifact.manifest, np.random.default_rng(1)
    weight = rng.normal(size=(WAY, manifest.dim)).astype(np.float32)
    labels = tuple(f"class {number}" for number in range(WAY))
    head = Head(Affine(weight, weight[:, 0]), labels, (5,) * WAY, manifest.default, artifact.digest, (1.0, 1.0))
    features = rng.normal(size=(1, manifest.dim)).astype(np.float32)
    rejection = manifest.rejections.get(manifest.default)
    pointer = Pointer(version=1, head="hd_" + "0" * 40)
    times = {"queue": 30.1234, "decode": 1.2345, "embed": 2.3456, "head": 0.1234}
    found = Predictions("bench", pointer, head, pointer.head, answered(features, head, rejection), times)
    metrics = Metrics()
    route = "/v1/tasks/{task}/classify"
    fields = {"request_id": "0" * 32, "method": "POST", "route": route, "status": 200, "duration_ms": 12.34}
    log = logging.getLogger("fewshot.access")
    record = log.makeRecord(log.name, logging.INFO, "", 0, "request", (), None, extra={"fields": fields})
    form, stages = logs.Json(), dict.fromkeys(("queue", "decode", "embed"), 3.0)
    mac = hmac.new(bytes(32), digestmod="sha256")
    key = b"fsk_live_" + b"a" * 12 + b"_" + b"b" * 43

    def checked() -> str:
        copy = mac.copy()
        copy.update(key)
        return copy.hexdigest()

    def counted() -> None:
        metrics.observe("classify", stages, good=1, bad=0)
        metrics.observe_answer(route, 200, 0.05)
        metrics.head_found.inc()
        metrics.none_of_these.inc(0)

    (image,) = pictures(1, seed=1)
    decoder = artifact.decoder()
    return {
        "the key's MAC": checked,
        "features and head to an answer, with rejection": lambda: answered(features, head, rejection),
        "the answer to JSON and a response": lambda: answers.predictions({}, found, reject=0.05),
        "all metrics": counted,
        "a line for the log, made": lambda: log.info("request", extra={"fields": fields}),
        "a line for the log, written": lambda: form.format(record),
        "reading the container of a JPEG": lambda: unwrap(image),
        "opening it, all limits": lambda: decoder.open(image),
        "decoding it": lambda: decoder(image),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ROOT / "models" / "pretrained" / "photos")
    given = parser.parse_args()
    with open(os.devnull, "w") as nowhere:
        handler = logs.Later(nowhere, logs.Json())
        logging.basicConfig(level="INFO", handlers=[handler])
        found = {name: cost(work) for name, work in steps(Artifact.load(given.artifact)).items()}
        handler.close()
    found["a deadline for the body"] = run(deadline())
    print("| step | quickest, us | median, us |\n|---|---|---|")
    for name, (quickest, median) in found.items():
        print(f"| {name} | {quickest:.1f} | {median:.1f} |")
    print("\n" + json.dumps({name: [round(value, 2) for value in pair] for name, pair in found.items()}))


if __name__ == "__main__":
    main()
