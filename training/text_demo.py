"""All commands on texts that every Python carries: which module of the standard library is this passage from?

A class is a top-level module or package of the running Python, a text some lines of its source. The trunk learns from
the passages of three fifths of the modules without being told which module each is from, and is then asked about
modules that it never saw, a few passages of each given. Beside it stand features that need no training: how often each
byte occurs, and how often each run of three does. Knows nothing that `pretrain`, `metatrain`, `export` and `evaluate`
do not know.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models.artifact import Artifact
from models.extractor import load_extractor
from models.learners.prototype import Prototype
from training import data, evaluate, export, metatrain, pretrain, texts
from training.config import ExportConfig, MetatrainConfig, PretrainConfig, TextDemoConfig
from training.episodes import Pool, frozen
from training.intervals import interval

LENGTH = 160  # bytes of a passage
FEWEST, MOST = 30, 60  # passages of a module
# No modules of their own: tests, what is installed beside them, and tables.
LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "turtledemo",
    "distutils",
}
BUCKETS = 4096  # of runs of three bytes
SHOTS = (1, 5)


def modules(library: Path) -> dict[str, list[Path]]:
    """The sources of each top-level module or package."""
    found: dict[str, list[Path]] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not LEFT_OUT & set(parts):
            found.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return found


def passages(sources: list[Path], rng: random.Random) -> list[str]:
    """Some passages of a module's sources, in no order; short ones and what is no UTF-8 left out."""
    found = []
    for source in sources:
        try:
            pieces = [piece.decode().strip("\n") for piece in texts.cut(source.read_bytes(), LENGTH)]
        except UnicodeDecodeError:
            continue
        found += [piece for piece in pieces if len(piece) >= LENGTH // 2]
    rng.shuffle(found)
    return found[:MOST]


def write(file: Path, library: Path, *, seed: int = 0) -> int:
    """Writes the corpus as JSON lines; returns how many modules it has."""
    rng = random.Random(seed)
    rows: list[str] = []
    classes = 0
    for label, sources in modules(library).items():
        some = passages(sources, rng)
        if len(some) < FEWEST:
            continue
        classes += 1
        rows += [json.dumps({"label": label, "text": text}) for text in some]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + "\n")
    return classes


def bag(given: np.ndarray, run: int) -> np.ndarray:
    """How often each run of 1 to 3 bytes occurs, uint8 [n, length] -> shares [n, 256], or [n, BUCKETS] of hashes."""
    found = []
    for text in given:
        held = text[text != 0].astype(np.uint64)
        runs = np.lib.stride_tricks.sliding_window_view(held, run) @ (256 ** np.arange(run, dtype=np.uint64))
        # Knuth's multiplicative hash: the upper bits of a product with the golden ratio's.
        keys = runs if run == 1 else (runs * np.uint64(2654435761) % np.uint64(2**32)) // np.uint64(2**32 // BUCKETS)
        found.append(np.bincount(keys.astype(np.int64), minlength=256 if run == 1 else BUCKETS) / max(1, len(keys)))
    return np.array(found)


def untrained(given: np.ndarray, seen: np.ndarray, run: int) -> np.ndarray:
    """Bags as features: normalised as those of a trunk are, with the centre of the training texts `seen`."""
    rooted = np.sqrt(bag(given, run)) - np.sqrt(bag(seen, run)).mean(axis=0)
    return np.asarray(rooted / np.linalg.norm(rooted, axis=1, keepdims=True), np.float32)


def main(config: TextDemoConfig) -> list[dict[str, object]]:
    began = time.monotonic()
    corpus, run, artifact = config.out / "modules.jsonl", config.out / "run", config.out / "artifact"
    count = write(corpus, Path(sysconfig.get_paths()["stdlib"]))
    print(f"{count} modules of Python {platform.python_version()}: {corpus}", file=sys.stderr)
    made = PretrainConfig(
        data=corpus,
        out=run,
        shape="small-bytes",
        size=LENGTH,
        objectives="language=1,contrastive=1",
        epochs=config.epochs,
        batch=64,
        optimizer="adamw",
        lr=5e-3,
        weight_decay=0.01,
        device="cpu",
        precision="float32",
    )
    pretrain.main(made)
    metatrain.main(
        MetatrainConfig(
            data=corpus,
            out=run,
            tasks="pseudo",
            views=3,
            per_class=15,
            learners="prototype,ridge,whitened",
            steps=40,
            check_steps=20,
            max_shot=3,
            queries=1,
            device="cpu",
        )
    )
    if not artifact.exists():
        export.main(
            ExportConfig(checkpoint=run, data=corpus, out=artifact, name="text-demo", episodes=40, per_class=30)
        )
    seconds = time.monotonic() - began
    rows = list(measured(Artifact.load(artifact), corpus, config, seconds))
    print(f"\nHeld-out modules, 5-way, {config.episodes} episodes, 95 % intervals\n")
    print("| features | learner | 1-shot | 5-shot |\n|---|---|---|---|")
    for name, method in dict.fromkeys((row["features"], row["method"]) for row in rows):
        cells = [row for row in rows if (row["features"], row["method"]) == (name, method)]
        print(
            f"| {name} | {method} | " + " | ".join(f"{c['accuracy']:.2f} ± {c['interval']:.2f}" for c in cells) + " |"
        )
    if config.json_out:
        config.json_out.parent.mkdir(parents=True, exist_ok=True)
        with config.json_out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def measured(artifact: Artifact, corpus: Path, config: TextDemoConfig, seconds: float) -> Iterator[dict[str, object]]:
    """A row for each kind of features, learner and shot, all on the same episodes of the test modules."""
    decoder = artifact.decoder()
    test, train = (data.load(corpus, split, decoder) for split in ("test", "train"))
    pool, plain = Pool.of(test.labels), Prototype(np.array(np.log(10.0), np.float32))
    seen = train.pixels[::4]
    learned = evaluate.embed(load_extractor(artifact), test.pixels, threads=1)
    found = [("trunk", name, learner, learned) for name, learner in artifact.learners().items()]
    found += [
        ("bag of bytes", "prototype", plain, untrained(test.pixels, seen, 1)),
        ("bag of three bytes", "prototype", plain, untrained(test.pixels, seen, 3)),
    ]
    way = min(5, len(test.classes))
    for shot in SHOTS:
        episodes = frozen(pool, way=way, shot=shot, queries=15, count=config.episodes, seed=7)
        for name, method, learner, features in found:
            values = evaluate.run(learner, features, episodes)
            yield {
                "experiment": "text-demo",
                "data": f"standard library of Python {platform.python_version()}",
                "split": "test",
                "features": name,
                "method": method,
                "way": way,
                "shot": shot,
                "accuracy": round(100 * float(values.mean()), 2),
                "interval": round(100 * interval(values), 2),
                "episodes": len(values),
                "seed": 7,
                "labels": "none",
                "seconds": round(seconds, 1) if name == "trunk" else 0,
                "command": f"python -m training text-demo --epochs {config.epochs} --episodes {config.episodes}",
            }
