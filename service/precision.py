"""What the extractor computes in: on a CPU int8 where it loses next to nothing and is faster here, else float32.

What int8 loses was measured when the artifact was made; how fast it is depends on the processor (without instructions
for products of bytes it is slower than float32), so it is timed at the first start and kept in the data folder. The two
give slightly different features, and a task is to be answered by those that it was learned from: so the same computer
has to choose the same after every restart, also where nothing can be written and also while it is busy. Hence turns, of
which the quickest count. Knows nothing of requests.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from models.artifact import Artifact
from models.extractor import best_precision

log = logging.getLogger(__name__)

MOST_LOSS = 0.5  # points of accuracy
LEAST_GAIN = 1.2  # times as fast; below it the exact graph is the better one
KEPT = "precision.json"
BATCH = 4


def automatic(artifact: Artifact, folder: Path, *, device: str, keep: bool = True) -> str:
    """What FEWSHOT_PRECISION=auto is on this device."""
    if device == "cpu":
        return choose(artifact, folder, keep=keep)
    return best_precision(artifact) if device == "cuda" else "float32"


def choose(artifact: Artifact, folder: Path, *, keep: bool = True) -> str:
    """float32 or int8. `folder`: where an earlier choice is found, and this one kept if it can be written."""
    loss = int8_loss(artifact)
    if loss is None or loss > MOST_LOSS:
        return "float32"
    here = f"{artifact.digest} {platform.machine()} {_processor()}"
    file = folder / KEPT
    if found := _found(file, here):
        log.info("precision %s, as found at an earlier start (%s)", found, file)
        return found
    try:
        times = seconds(artifact)
    except ImportError:  # whoever loads the extractor says what is missing
        return "float32"
    precision = "int8" if times["int8"] * LEAST_GAIN <= times["float32"] else "float32"
    if keep:
        with suppress(OSError):  # it is timed again next time
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            precision = _kept(file, {"here": here, "precision": precision, "seconds": times})
    log.info(
        "precision %s: an image takes %.2f ms with float32 and %.2f ms with int8 here; int8 loses %.2f points",
        precision,
        1e3 * times["float32"],
        1e3 * times["int8"],
        loss,
    )
    return precision


def _found(file: Path, here: str) -> str | None:
    """What was chosen on this computer for this artifact."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text())
        if kept["here"] == here and kept["precision"] in ("float32", "int8"):
            return str(kept["precision"])
    return None


def _kept(file: Path, choice: dict[str, Any]) -> str:
    """Keeps a choice and returns it, or the one that another process, which started at the same time, kept first."""
    whole = file.with_name(f"{file.name}.{secrets.token_hex(8)}")  # containers share process numbers
    whole.write_text(json.dumps(choice) + "\n")
    try:
        os.link(whole, file)
    except OSError:  # something is there, or the folder knows no links
        if found := _found(file, choice["here"]):
            return found
        whole.replace(file)
    finally:
        whole.unlink(missing_ok=True)
    return str(choice["precision"])


def int8_loss(artifact: Artifact) -> float | None:
    """The most that int8 was measured to lose, in points of accuracy; None where it was not, or there is no int8."""
    found = [value for name, value in (artifact.manifest.int8 or {}).items() if name.startswith("loss_")]
    return max(found, default=None)


def seconds(artifact: Artifact, *, rounds: int = 5) -> dict[str, float]:
    """Seconds for an image in a batch, on one core, by precision: in turns, the quickest round after one to warm up."""
    from models.extractor_onnx import OnnxExtractor

    extractors = {name: OnnxExtractor(artifact, precision=name) for name in ("float32", "int8")}
    batch = np.zeros((BATCH, *artifact.decoder().shape), np.uint8)
    times: dict[str, list[float]] = {name: [] for name in extractors}
    for _ in range(rounds + 1):
        for name, extractor in extractors.items():
            start = time.perf_counter()
            extractor(batch)
            times[name].append(time.perf_counter() - start)
    return {name: min(found[1:]) / BATCH for name, found in times.items()}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
