"""What a GPU gives: images per second of the extractor against the card's floor, and where adapting is quicker.

    python deploy/gpu.py [ARTIFACT] [--data FOLDER] [--seconds 1] [--out FILE]

The floor of a batch is the larger of two times: its multiplications over the rate at which the card multiplies large
matrices, and the bytes it cannot do without (weights, images, features) over the rate at which the card copies. Both
rates are measured in the same run. With --data, also how often the validation classes are told apart with features of
either precision, on the same episodes. `--device torch-cpu` runs a little of everything on a CPU, to see that it runs.
Prints tables and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import report  # noqa: E402
from models.arrays import fetch, place  # noqa: E402
from models.artifact import Artifact  # noqa: E402
from models.episode import Support  # noqa: E402
from models.extractor import Extractor, load_extractor  # noqa: E402
from models.extractor_torch import SIZES, has_bfloat16, network_of  # noqa: E402
from models.learners import Learner  # noqa: E402

BATCHES = (1, 16, 128, 1024)
TASKS = ((5, 1), (5, 5), (20, 5), (20, 20), (100, 10), (100, 50))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES = {"float32": 4, "bfloat16": 2}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median(work: Callable[[], object], device: str, *, seconds: float) -> float:
    """Seconds of a call, the median of all that fit in the time, three at least, after one to warm up."""
    work()
    wait(device)
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < ends:
        begin = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def rates(device: str, seconds: float) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and operations a second of a product of large matrices."""
    side, megabytes = (8192, 1024) if device == "cuda" else (1024, 64)
    found = {}
    source = torch.rand(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    found["bytes_per_s"] = 2 * source.nbytes / median(lambda: target.copy_(source), device, seconds=seconds)
    for name, dtype in DTYPES.items():
        a = torch.randn(side, side, device=device).to(dtype)
        found[f"{name}_per_s"] = 2 * side**3 / median(lambda a=a: a @ a, device, seconds=seconds)
    return found


def operations(artifact: Artifact) -> tuple[int, int]:
    """Operations of the convolutions for one image, and how many weights there are."""
    network, total = network_of(artifact), 0

    def count(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        total += 2 * weight[0].numel() * out[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.zeros((1, *artifact.decoder().shape), dtype=torch.uint8))
    return total, sum(value.numel() for value in network.parameters())


def extractors(artifact: Artifact, device: str) -> Iterator[tuple[str, Extractor]]:
    yield "float32", load_extractor(artifact, device=device)
    if device != "cuda" or has_bfloat16():
        yield "bfloat16", load_extractor(artifact, device=device, precision="bfloat16")


def throughput(artifact: Artifact, device: str, card: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    work, weights = operations(artifact)
    rng, shape, rows = np.random.default_rng(0), artifact.decoder().shape, []
    where = device.removeprefix("torch-")
    eager = network_of(artifact).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for batch in BATCHES if where == "cuda" else BATCHES[:2]:
        images = rng.integers(0, 255, (batch, *shape), dtype=np.uint8)
        resident = torch.from_numpy(images).to(where)
        with torch.inference_mode(), torch.autocast(where, dtype=torch.bfloat16):
            plain = median(lambda x=resident: eager(x), device, seconds=seconds)
        for name, extractor in extractors(artifact, device):
            taken = median(lambda e=extractor, x=images: e(x), device, seconds=seconds)
            moved = BYTES[name] * weights + images.nbytes + 4 * batch * artifact.manifest.dim
            floor = max(batch * work / card[f"{name}_per_s"], moved / card["bytes_per_s"])
            row: dict[str, Any] = {"precision": name, "batch": batch, "ms": 1e3 * taken, "images_per_s": batch / taken}
            row |= {"floor_ms": 1e3 * floor, "share": floor / taken}
            if device == "cuda" and batch <= SIZES[-1]:
                graph = extractor._recorded[batch].graph  # type: ignore[attr-defined]
                alone = median(graph.replay, device, seconds=seconds)
                row |= {"graph_ms": 1e3 * alone, "graph_share": floor / alone}
            if name == "bfloat16":
                row["one_by_one_ms"] = 1e3 * plain  # kernels asked for one by one, images there already
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def adapt(learner: Learner, features: np.ndarray, labels: np.ndarray, way: int, where: str) -> None:
    support = Support(place(features, where), place(labels, where), way)
    affine, leave_out = report.fitted(learner, support)
    fetch(affine.weight), fetch(affine.bias)
    leave_out()


def adapting(artifact: Artifact, device: str, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds to adapt and to hold each example out once, on the host and on the device, features on the host."""
    rng, rows = np.random.default_rng(0), []
    sides = {"cpu": artifact.learners("cpu"), device: artifact.learners(device)}
    for way, shot in TASKS:
        labels = np.repeat(np.arange(way, dtype=np.int32), shot)
        features = (rng.normal(size=(way, artifact.manifest.dim)).astype(np.float32)[labels]) + rng.normal(
            size=(way * shot, artifact.manifest.dim)
        ).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        for method in artifact.manifest.methods:
            row: dict[str, Any] = {"task": f"{way} x {shot}", "method": method}
            for where, learners in sides.items():
                work = partial(adapt, learners[method], features, labels, way, where)
                row["host_ms" if where == "cpu" else "device_ms"] = 1e3 * median(work, device, seconds=seconds / 2)
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def accuracy(artifact: Artifact, device: str, data: Path) -> dict[str, float]:
    """5-way accuracy of the default learner on 2,000 episodes of the validation classes, by precision."""
    from training import evaluate
    from training.data import load
    from training.episodes import Pool, frozen

    images = load(data, "val", artifact.decoder())
    pool, learner, found = Pool.of(images.labels), artifact.learners()[artifact.manifest.default], {}
    for name, extractor in extractors(artifact, device):
        parts = [extractor(images.pixels[at : at + 128]) for at in range(0, len(images), 128)]
        for shot in (1, 5):
            episodes = frozen(pool, way=min(5, len(images.classes)), shot=shot, queries=15, count=2000, seed=7)
            right = evaluate.run(learner, np.concatenate(parts), episodes)
            found[f"{name} {shot}-shot"] = 100 * float(right.mean())
    print("  ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("artifact", type=Path, nargs="?", default=ROOT / "models" / "pretrained" / "photos")
    parser.add_argument("--data", type=Path, help="folder or zip with one folder per class")
    parser.add_argument("--device", choices=("cuda", "torch-cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--out", type=Path, help="also write the JSON line there")
    given = parser.parse_args()
    artifact = Artifact.load(given.artifact)
    device: str = given.device
    where = "cpu" if device == "torch-cpu" else device
    card: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if device == "cuda" else "none",
        "torch": torch.__version__,
    }
    card |= rates(where, given.seconds)
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in card.items()), flush=True)
    found: dict[str, Any] = {"artifact": artifact.manifest.name, "card": card}
    found["throughput"] = throughput(artifact, device, card, given.seconds)
    if given.data:
        found["accuracy"] = accuracy(artifact, device, given.data)
    found["adapting"] = adapting(artifact, where, given.seconds)
    line = json.dumps(found)
    if given.out:
        given.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
