"""What the work costs without a server: decoding and the extractor in this process, with as many callers as cores.

The floor that everything in deploy/bench.py and deploy/peers.py is a ratio to, and the pictures that they use. The size
of what the extractor takes is the artifact's affair. Knows nothing of HTTP.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.artifact import Artifact  # noqa: E402
from models.extractor_onnx import OnnxExtractor  # noqa: E402

CORES = os.cpu_count() or 1
NUMBERS = itertools.count(int(time.time()) << 20)


def pictures(count: int, *, seed: int) -> list[bytes]:
    """JPEGs of 240 x 180 pixels with structure at several scales, so that they decode like photographs.

    Each has more of one scale than of another, and colours of its own: to an extractor they are no twins of each other.
    """
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        image = np.zeros((180, 240, 3))
        darkest, lightest = np.sort(rng.integers(0, 255, (2, 3)), axis=0)
        for cells, share in zip(rng.integers((2, 8, 30), (6, 20, 70)), rng.dirichlet((1, 1, 1)), strict=True):
            coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
            image += share * np.asarray(coarse.resize((240, 180), Image.Resampling.BICUBIC), float) / 255
        image = darkest + (lightest - darkest) * image
        buffer = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=85)
        out.append(buffer.getvalue())
    return out


def never_seen(images: Sequence[bytes], count: int) -> list[bytes]:
    """So many files that no service has seen before: the given JPEGs in turn, each with a comment of its own."""
    found = []
    for image in itertools.islice(itertools.cycle(images), count):
        comment = next(NUMBERS).to_bytes(8, "big")
        found.append(image[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + image[2:])
    return found


def steadiness(seconds: float = 3.0) -> tuple[float, float]:
    """Milliseconds of the same small piece of work, done again every two, while nothing else is: p50 and p99.

    Where the computer's host gives the cores to others as well, the second is many times the first, and so long waits
    whatever is woken for each request.
    """
    work = [{"number": number, "values": list(range(20))} for number in range(10_000)]
    times, ends = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        json.dumps(work[50 * (len(times) % 200) :][:50])
        times.append(1e3 * (time.perf_counter() - began))
        time.sleep(0.002)
    times.sort()
    return round(times[len(times) // 2], 2), round(times[int(0.99 * len(times))], 2)


class Floor:
    """Decode and extract in this process."""

    def __init__(self, artifact: Artifact, precision: str, images: list[bytes]):
        self.decoder = artifact.decoder()
        self.extractor = OnnxExtractor(artifact, precision=precision)
        self.images = images

    def forward(self, images: Sequence[bytes]) -> None:
        self.extractor(np.stack([self.decoder(image) for image in images]))

    def throughput(self, seconds: float, *, batch: int = 8) -> tuple[float, float]:
        """Images per second with one caller per core, and CPU seconds per image."""
        ends = time.perf_counter() + seconds

        def caller(number: int) -> int:
            done = number
            while time.perf_counter() < ends:
                self.forward([self.images[(done + k) % len(self.images)] for k in range(batch)])
                done += batch
            return done - number

        cpu, start = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            total = sum(pool.map(caller, range(CORES)))
        return total / (time.perf_counter() - start), (time.process_time() - cpu) / total

    def single(self, rounds: int = 200, *, start: int = 0) -> float:
        """Median milliseconds of one image at a time, beginning with the one at `start`."""
        times = []
        for number in range(start, start + rounds):
            began = time.perf_counter()
            self.forward([self.images[number % len(self.images)]])
            times.append(time.perf_counter() - began)
        return 1e3 * statistics.median(times)

    def together(self, images: Sequence[bytes], *, batch: int = 16) -> float:
        """Milliseconds of decoding and extracting all images, dealt to the cores, in batches.

        A support set of a thousand in one call would need gigabytes, and take longer.
        """
        parts = [images[number::CORES] for number in range(CORES)]

        def caller(part: Sequence[bytes]) -> None:
            for at in range(0, len(part), batch):
                self.forward(part[at : at + batch])

        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(lambda _: None, parts))  # its threads are there before the clock starts
            start = time.perf_counter()
            list(pool.map(caller, parts))
            return 1e3 * (time.perf_counter() - start)
