"""`make bench`: the service over HTTP against the floor of the same run on the same machine.

The floor is what the work costs without a server: decoding and the extractor in one process, with as many callers as
cores, on the same images. Floor and service are measured in turns, and the median of each is taken, so that a machine
that slows down slows both. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.artifact import Artifact  # noqa: E402
from models.extractor_onnx import OnnxExtractor  # noqa: E402

CORES = os.cpu_count() or 1


def pictures(count: int, *, seed: int) -> list[bytes]:
    """JPEGs of 240 x 180 pixels with structure at several scales, so that they decode like photographs."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        image = np.zeros((180, 240, 3))
        for cells in (3, 12, 48):
            coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
            image += np.asarray(coarse.resize((240, 180), Image.Resampling.BICUBIC), float) / 3
        buffer = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=85)
        out.append(buffer.getvalue())
    return out


class Floor:
    """Decode and extract in this process."""

    def __init__(self, artifact: Artifact, precision: str, images: list[bytes]):
        self.decoder = artifact.decoder()
        self.extractor = OnnxExtractor(artifact, precision=precision)
        self.images = images

    def forward(self, images: list[bytes]) -> None:
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

    def single(self, rounds: int = 200) -> float:
        """Median milliseconds of one image at a time."""
        times = []
        for number in range(rounds):
            start = time.perf_counter()
            self.forward([self.images[number % len(self.images)]])
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)

    def together(self, images: list[bytes], rounds: int = 10) -> float:
        """Median milliseconds of decoding and extracting all images, split over the cores."""
        parts = [images[number::CORES] for number in range(CORES)]
        times = []
        with ThreadPoolExecutor(CORES) as pool:
            for _ in range(rounds):
                start = time.perf_counter()
                list(pool.map(self.forward, parts))
                times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)


class Service:
    """A service of its own process on a free port."""

    def __init__(self, artifact: Path, precision: str, folder: Path):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
        environment |= {
            "FEWSHOT_PORT": "0",
            "FEWSHOT_ARTIFACT": str(artifact),
            "FEWSHOT_PRECISION": precision,
            "FEWSHOT_DATA_DIR": str(folder),
            "FEWSHOT_LOG_LEVEL": "info",
        }
        start = time.perf_counter()
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "service"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout
        for line in self.process.stdout:
            if "ready at" in line:
                self.url = line.split()[4]
                break
        else:
            self.log.seek(0)
            raise SystemExit(self.log.read())
        self.ready_s = time.perf_counter() - start

    def ask(self, method: str, path: str, body: bytes, kind: str) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind}, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
        return found

    def adapt(self, task: str, images: list[bytes], way: int) -> float:
        """Milliseconds to learn `way` classes from images dealt among them."""
        boundary = "b0unDary"
        head = '--{}\r\nContent-Disposition: form-data; name="class{}"; filename="x.jpg"\r\n\r\n'
        parts = [head.format(boundary, index % way).encode() + image + b"\r\n" for index, image in enumerate(images)]
        body = b"".join(parts) + f"--{boundary}--\r\n".encode()
        start = time.perf_counter()
        self.ask("PUT", f"/v1/tasks/{task}", body, f"multipart/form-data; boundary={boundary}")
        return 1e3 * (time.perf_counter() - start)

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))

    def load(self, files: list[str], connections: int, seconds: float) -> dict[str, Any]:
        before = self.cpu()
        command = [
            sys.executable,
            str(ROOT / "deploy" / "load.py"),
            self.url,
            "bench",
            *files,
            "--connections",
            str(connections),
            "--seconds",
            str(seconds),
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found: dict[str, Any] = json.loads(out)
        # The warm-up of half a second is in the CPU time too.
        found["cpu_ms"] = 1e3 * (self.cpu() - before) * seconds / (seconds + 0.5) / found["answers"]
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        if self.process.stdout:
            self.process.stdout.close()
        self.log.close()


def bench(artifact: Artifact, precision: str, *, seconds: float, rounds: int) -> dict[str, Any]:
    images = pictures(64, seed=1)
    floor = Floor(artifact, precision, images)
    floor.throughput(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = []
        for number, image in enumerate(images):
            (folder / f"{number}.jpg").write_bytes(image)
            files.append(str(folder / f"{number}.jpg"))
        service = Service(artifact.path, precision, folder)
        try:
            service.adapt("bench", images[:25], 5)
            floors, singles, loads = [], [], {1: [], 8: [], 64: []}  # type: ignore[var-annotated]
            for _ in range(rounds):
                floors.append(floor.throughput(seconds))
                singles.append(floor.single())
                for connections, found in loads.items():
                    found.append(service.load(files, connections, seconds))
            floors.append(floor.throughput(seconds))
            bare, adapts = [], []
            for number in range(5):
                # Both are measured warm: three times in a row, the service with new images each time.
                supports = [pictures(25, seed=100 + 3 * number + k) for k in range(3)]
                bare.append(floor.together(supports[0], rounds=3))
                adapts.extend(service.adapt("adapt", support, 5) for support in supports)
            memory = service.memory()
        finally:
            service.stop()
    limit = statistics.median(value for value, _ in floors)
    cpu = 1e3 * statistics.median(value for _, value in floors)
    single = statistics.median(singles)
    print(f"\n{artifact.manifest.name} {precision}: floor {limit:.0f} images/s, {cpu:.2f} ms CPU an image, ", end="")
    print(
        f"{single:.2f} ms for one alone\n\n| connections | images/s | of the floor | CPU of the floor's | p50 ms ",
        end="",
    )
    print("| p99 ms | not 200 |\n|---|---|---|---|---|---|---|")
    rows = []
    for connections, found in loads.items():
        per_s = statistics.median(row["per_s"] for row in found)
        spread = (min(row["per_s"] for row in found), max(row["per_s"] for row in found))
        row = {
            "connections": connections,
            "per_s": per_s,
            "spread": spread,
            "share": round(per_s / limit, 3),
            "cpu": round(statistics.median(row["cpu_ms"] for row in found) / cpu, 2),
            "p50_ms": statistics.median(row["p50_ms"] for row in found),
            "p99_ms": statistics.median(row["p99_ms"] for row in found),
            "bad": sum(count for row in found for status, count in row["statuses"].items() if status != "200"),
        }
        rows.append(row)
        figures = (f"{row['share']:.2f}", f"{row['cpu']:.2f} x", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}")
        between = f"{per_s:.0f} ({spread[0]:.0f} to {spread[1]:.0f})"
        print("| " + " | ".join((str(connections), between, *figures, str(row["bad"]))) + " |")
    ratio = statistics.median(adapts) / statistics.median(bare)
    print(
        f"adapting 5 x 5: {statistics.median(adapts):.1f} ms, {ratio:.2f} x the bare {statistics.median(bare):.1f} ms; "
    )
    print(f"one connection's p50: {rows[0]['p50_ms'] / single:.2f} x bare; ", end="")
    print(f"ready in {service.ready_s:.2f} s; {memory:.0f} MB")
    return {
        "precision": precision,
        "floor_per_s": round(limit, 1),
        "floor_spread": [round(min(v for v, _ in floors), 1), round(max(v for v, _ in floors), 1)],
        "floor_cpu_ms": round(cpu, 3),
        "single_ms": round(single, 3),
        "rows": rows,
        "adapt_ms": round(statistics.median(adapts), 1),
        "adapt_ratio": round(ratio, 3),
        "ready_s": round(service.ready_s, 2),
        "memory_mb": round(memory, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ROOT / "models" / "pretrained" / "photos")
    parser.add_argument("--precision", default="float32,int8")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    artifact = Artifact.load(given.artifact)
    machine = f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}"
    print(f"{machine}; medians of {given.rounds} windows of {given.seconds:g} s, in turns with the floor")
    results = [bench(artifact, p, seconds=given.seconds, rounds=given.rounds) for p in given.precision.split(",")]
    print("\n" + json.dumps({"machine": machine, "artifact": artifact.digest, "results": results}))


if __name__ == "__main__":
    main()
