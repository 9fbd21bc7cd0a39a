"""A head at rest as float32, float16 and int8: what it takes, how long writing and reading it takes, what it then says.

    python deploy/heads.py --data DATA/mini_imagenet

Heads are learned by the artifact's own learner in frozen episodes of the validation classes, and their weights rounded:
to float16, to int8 with one scale for the head, to int8 with a scale for each class, which is what models/head.py
keeps. Prints a table and, last, one JSON line. Knows nothing of stores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.arrays import softmax  # noqa: E402
from models.artifact import Artifact  # noqa: E402
from models.extractor import load_extractor  # noqa: E402
from models.head import Affine, Head  # noqa: E402
from training import data  # noqa: E402
from training.episodes import Pool, frozen  # noqa: E402
from training.evaluate import embed, support_of  # noqa: E402
from training.intervals import interval  # noqa: E402

QUERIES = 15
SEED = 7


def float16(weight: np.ndarray) -> np.ndarray:
    return weight.astype(np.float16).astype(np.float32)


def one_scale(weight: np.ndarray) -> np.ndarray:
    scale = np.abs(weight).max() / 127
    return np.asarray(np.rint(weight / scale) * scale, np.float32)


def scale_per_class(weight: np.ndarray) -> np.ndarray:
    """By the product's own code."""
    way = len(weight)
    bias = np.zeros(way, np.float32)
    head = Head(Affine(weight, bias), tuple(map(str, range(way))), (1,) * way, "any", "any")
    return np.asarray(head.affine.weight)


# Name -> what becomes of a weight [way, dim], and the bytes of the numbers of a head, of which the bias is float32.
FORMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[int, int], int]]] = {
    "float32": (lambda weight: weight, lambda way, dim: 4 * way * dim + 4 * way),
    "float16": (float16, lambda way, dim: 2 * way * dim + 4 * way),
    "int8, one scale": (one_scale, lambda way, dim: way * dim + 4 * way + 4),
    "int8, a scale per class": (scale_per_class, lambda way, dim: way * dim + 8 * way),
}


def measure(
    artifact: Artifact, features: np.ndarray, pool: Pool, given: argparse.Namespace, shot: int
) -> list[dict[str, Any]]:
    episodes = frozen(pool, way=given.way, shot=shot, queries=QUERIES, count=given.episodes, seed=SEED)
    learner = artifact.learners()[artifact.manifest.default]
    by = artifact.manifest.methods[artifact.manifest.default].at(given.way, (shot,) * given.way)
    right: dict[str, list[float]] = {form: [] for form in FORMS}
    apart: dict[str, float] = dict.fromkeys(FORMS, 0.0)
    other: dict[str, int] = dict.fromkeys(FORMS, 0)
    for episode in episodes:
        affine = learner.adapt(support_of(features, episode))
        weight, bias = np.asarray(affine.weight / by, np.float32), np.asarray(affine.bias / by, np.float32)
        questions = features[episode.query]
        exact = softmax(questions @ weight.T + bias)
        for form, (rounded, _) in FORMS.items():
            found = softmax(questions @ rounded(weight).T + bias)
            right[form].append(100 * float((found.argmax(axis=1) == episode.answers).mean()))
            apart[form] = max(apart[form], float(np.abs(found - exact).max()))
            other[form] += int((found.argmax(axis=1) != exact.argmax(axis=1)).sum())
    return [
        {
            "form": form,
            "way": given.way,
            "shot": shot,
            "bytes": size(given.way, features.shape[1]),
            "accuracy": round(float(np.mean(right[form])), 3),
            "interval": round(interval(np.array(right[form])), 3),
            "difference": round(float(np.mean(np.subtract(right[form], right["float32"]))), 4),
            "difference_interval": round(interval(np.subtract(right[form], right["float32"])), 4),
            "other_answers": other[form],
            "questions": len(episodes) * QUERIES * given.way,
            "most_apart": apart[form],
        }
        for form, (_, size) in FORMS.items()
    ]


def times(way: int, dim: int, *, rounds: int = 200) -> dict[str, float]:
    """Microseconds of CPU to write and to read a head as the service does, the quickest of some rounds."""
    weight = np.random.default_rng(1).normal(size=(way, dim)).astype(np.float32)
    labels = tuple(f"class {number}" for number in range(way))
    head = Head(Affine(weight, np.zeros(way, np.float32)), labels, (5,) * way, "whitened", "sha256:" + "0" * 64)
    kept = head.to_bytes()
    found = {"whole_bytes": float(len(kept))}
    for name, work in (("write_us", head.to_bytes), ("read_us", lambda: Head.from_bytes(kept))):
        spent = []
        for _ in range(rounds):
            start = time.thread_time_ns()
            work()
            spent.append(time.thread_time_ns() - start)
        found[name] = round(min(spent) / 1e3, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="labelled images with a split named val")
    parser.add_argument("--artifact", type=Path, default=ROOT / "models" / "pretrained" / "photos")
    parser.add_argument("--precision", default="int8", help="of the extractor")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shots", default="1,5")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--per-class", type=int, help="images of a class, at most")
    given = parser.parse_args()
    artifact = Artifact.load(given.artifact)
    images = data.load(given.data, "val", artifact.decoder(), per_class=given.per_class)
    features = embed(load_extractor(artifact, device="cpu", precision=given.precision), images.pixels, threads=1)
    features = features.astype(np.float16).astype(np.float32)  # as a record keeps them
    pool = Pool.of(images.labels)
    rows = [row for shot in given.shots.split(",") for row in measure(artifact, features, pool, given, int(shot))]
    print("| weights | shots | bytes | accuracy | over float32, paired | other answers | probabilities apart |")
    print("|---|" + 6 * "---|")
    for row in rows:
        accuracy = f"{row['accuracy']:.2f} ± {row['interval']:.2f}"
        difference = f"{row['difference']:+.3f} ± {row['difference_interval']:.3f}"
        others = f"{row['other_answers']} of {row['questions']:,}"
        cells = (row["form"], row["shot"], f"{row['bytes']:,}", accuracy, difference, others)
        print("| " + " | ".join(map(str, (*cells, f"{row['most_apart']:.1e}"))) + " |")
    spent = times(given.way, artifact.manifest.dim)
    print(
        f"\nA head of {given.way} classes with all that belongs to it: {spent['whole_bytes']:,.0f} bytes, written in "
        f"{spent['write_us']} us, read in {spent['read_us']} us"
    )
    print("\n" + json.dumps({"artifact": artifact.digest, "rows": rows, **spent}))


if __name__ == "__main__":
    main()
