"""Which graph of the artifact runs on a CPU: int8 where it loses next to nothing and is faster here, else float32.

What int8 loses was measured when the artifact was made; how fast it is depends on the processor (without instructions
for products of bytes it is slower than float32), so it is timed at the first start and kept beside the data: the same
computer serves the same numbers after every restart. Knows nothing of requests.
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from models.artifact import Artifact
from service.settings import Settings

log = logging.getLogger(__name__)

MOST_LOSS = 0.5  # points of accuracy
LEAST_GAIN = 1.2  # times as fast; below it the exact graph is the better one
KEPT = "precision.json"
BATCH = 8


def keep_in(settings: Settings) -> Path | None:
    """The folder for the choice: that of the embedded store. Beside a Redis there is none, and every start times."""
    return None if settings.redis_url else settings.data_dir


def choose(artifact: Artifact, folder: Path | None, *, keep: bool = True) -> str:
    """float32 or int8. `folder`: where an earlier choice is found, and this one kept."""
    loss = int8_loss(artifact)
    if loss is None or loss > MOST_LOSS:
        return "float32"
    here = f"{artifact.digest} {platform.machine()} {_processor()}"
    file = None if folder is None else folder / KEPT
    if file is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text())
            if kept["here"] == here and kept["precision"] in ("float32", "int8"):
                log.info("precision %s, as found at an earlier start (%s)", kept["precision"], file)
                return str(kept["precision"])
    times = {precision: seconds(artifact, precision) for precision in ("float32", "int8")}
    precision = "int8" if times["int8"] * LEAST_GAIN <= times["float32"] else "float32"
    log.info(
        "precision %s: an image takes %.2f ms with float32 and %.2f ms with int8 here; int8 loses %.2f points",
        precision,
        1e3 * times["float32"],
        1e3 * times["int8"],
        loss,
    )
    if file is not None and keep:
        with suppress(OSError):  # it is timed again next time
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.write_text(json.dumps({"here": here, "precision": precision, "seconds": times}) + "\n")
    return precision


def int8_loss(artifact: Artifact) -> float | None:
    """The most that int8 was measured to lose, in points of accuracy; None where it was not, or there is no int8."""
    found = [value for name, value in (artifact.manifest.int8 or {}).items() if name.startswith("loss_")]
    return max(found, default=None)


def seconds(artifact: Artifact, precision: str, *, rounds: int = 5) -> float:
    """Seconds for an image in a batch, on one core: the median of some rounds, after one that warms up."""
    from models.extractor_onnx import OnnxExtractor

    extractor = OnnxExtractor(artifact, precision=precision)
    batch = np.zeros((BATCH, *artifact.decoder().shape), np.uint8)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        extractor(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / BATCH


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
