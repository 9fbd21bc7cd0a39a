"""Checkpoints -> an artifact: graphs, weights, learners, calibration, probe, manifest.

Everything that is measured here is measured after the weights were rounded. The export is refused when the runtimes
disagree.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import save_file

from models.artifact import ARRAYS, FORMAT, GRAPH, INT8_GRAPH, KINDS, MANIFEST, PROBE, WEIGHTS, Artifact
from models.extractor import Decoder
from models.extractor_onnx import OnnxExtractor
from models.extractor_torch import TorchExtractor
from models.learners import build
from training import checkpoint, data, evaluate, inputs, metatrain, practice, probe, raw, splits
from training.calibrate import SHOTS, apart, calibrate, limits
from training.config import ExportConfig, MetatrainConfig, PretrainConfig
from training.folders import DataError
from training.graphs import graph, rounded, share_weights
from training.int8 import after_pool, int8_loss, quantise
from training.pretrained import classes_of, digest, epochs, labelled, load_extractor

MEASURED = {field.name for field in dataclasses.fields(evaluate.Row)}  # what the manifest keeps of a line
PARITY = 1e-4  # largest difference between torch and onnxruntime, of features of unit length


def _calibration_tasks(
    config: ExportConfig, extractor: inputs.Network, pretrained: PretrainConfig, decoder: Decoder
) -> tuple[practice.Tasks, data.Images]:
    """Held-out tasks: classes with labels, or images with their views."""
    images = data.load(config.data, config.calibration_split, decoder, per_class=config.per_class or None)
    views = max(SHOTS) + 5 if config.tasks == "pseudo" else 0
    made = MetatrainConfig(
        data=config.data, out=config.checkpoint, tasks=config.tasks, views=views, rotations=config.rotations
    )
    tasks = practice.cached(extractor, images, made, pretrained, seed=config.seed)
    return tasks, images


def check_default(name: str, known: Iterable[str]) -> None:
    """Ends the process with a sentence where a default learner is none of those that there will be."""
    names = list(known)
    if name and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        sys.exit(
            f"--default: no learner '{name}'. " + (f"Is {near[0]} meant? " if near else "") + f"{', '.join(names)}."
        )


def figures(config: ExportConfig) -> list[raw.Line]:
    """The lines of --metrics that are for the manifest, each once. Raises DataError for what is not of this artifact.

    Of several views none are kept, for the manifest is of one.
    """
    found: list[raw.Line] = []
    for file in filter(None, config.metrics.split(",")):
        if not Path(file).is_file():
            raise DataError(f"--metrics: {file} does not exist.")
        for line in raw.read(Path(file)):
            if line.get("experiment", "accuracy") != "accuracy" or {"views", "spread"} & set(line) or line in found:
                continue
            if line.get("artifact", config.name) != config.name:
                raise DataError(f"--metrics: {file} measured '{line['artifact']}', and this is '{config.name}'.")
            if line.get("split", "test") not in ("test", "val"):
                raise DataError(f"--metrics: {file} measured on the split '{line['split']}', which was learned from.")
            found.append(line)
    return found


def _kept(lines: Iterable[raw.Line], weights: str) -> list[raw.Line]:
    """What the manifest keeps of them. Raises DataError where they were measured with other weights."""
    kept: list[raw.Line] = []
    for line in lines:
        if line.get("weights_digest", weights) != weights:
            raise DataError(
                f"--metrics holds figures of other weights ({line['weights_digest']}) than these ({weights})."
            )
        own = {name: value for name, value in line.items() if name in MEASURED}
        if own not in kept:  # measured twice
            kept.append(own)
    return kept


def main(config: ExportConfig) -> Path:
    """Writes the artifact folder, whole or not at all, and returns it."""
    if config.out.exists():
        sys.exit(f"{config.out} exists; an artifact is never edited, choose another --out.")
    measured = figures(config)
    extractor, pretrained = load_extractor(config.checkpoint)
    arrays = metatrain.load_learners(config.checkpoint)
    metatrain.fits(config.checkpoint, digest(extractor))
    check_default(config.default, arrays)
    practised = checkpoint.load(config.checkpoint / metatrain.CHECKPOINT)
    learned_from = practised["config"]
    extractor = rounded(extractor)
    decoder, given = inputs.decoder(pretrained), inputs.described(pretrained)
    int8 = config.int8 and given["kind"] == "image"  # the trunk for texts is small, and not quantised
    tasks, images = _calibration_tasks(config, extractor, pretrained, decoder)
    if config.tasks == "labels":
        turns = 4 if config.rotations else 1
        if lost := limits(tasks.pool, [name for name in images.classes for _ in range(turns)]):
            print(lost, file=sys.stderr)
    kept = {method: {n: stored(v) for n, v in fields.items()} for method, fields in arrays.items()}
    learners = {method: build(method, fields) for method, fields in kept.items()}
    temperatures, rejections, scores = calibrate(
        learners, tasks.features, tasks.pool, episodes=config.episodes, queries=5, seed=config.seed
    )
    default = config.default or max(scores, key=lambda method: scores[method])

    work = config.out.with_name(config.out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    weights = {name: np.ascontiguousarray(value.half().numpy()) for name, value in extractor.state_dict().items()}
    save_file(weights, work / WEIGHTS)
    proto = graph(extractor, decoder.shape, name=KINDS[given["kind"]])
    onnx.save(share_weights(proto, work / WEIGHTS), work / GRAPH)
    save_file({f"{m}/{n}": v for m, fields in kept.items() for n, v in fields.items()}, work / ARRAYS)
    accuracy = _kept(measured, raw.weights({name: _sha(work / name) for name in (WEIGHTS, ARRAYS)}))

    rng = np.random.default_rng(config.seed)
    some = images.pixels[rng.choice(len(images), min(len(images), 384), replace=False)]
    expected = _torch(extractor, some[:16])
    shown = probe.drawn(decoder.shape)
    save_file({KINDS[given["kind"]]: shown, "features": _torch(extractor, shown)}, work / PROBE)
    if int8:
        quantise(proto, some, work / INT8_GRAPH, keep=after_pool(proto))
    manifest = {
        "format": FORMAT,
        "name": config.name,
        "description": config.description,
        "dim": extractor.backbone.shape.dim,
        "shape": dataclasses.asdict(extractor.backbone.shape),
        "input": given,
        "methods": {method: {"temperature": temperatures[method], "rejection": rejections[method]} for method in kept},
        "default": default,
        # Views of one image, which pseudo-tasks are made of, do not tell how near different images are.
        "twins": apart(tasks.features, tasks.pool) if config.tasks == "labels" else 0.0,
        "training": {
            "data": pretrained.data.name,
            "split": pretrained.split,
            "shape": pretrained.shape,
            "objectives": pretrained.objectives,
            # Of a cell from elsewhere nothing is known, so it counts. Calibration: see below.
            "labels_used": labelled(pretrained) or learned_from["tasks"] == "labels" or bool(learned_from.get("cell")),
            "epochs": epochs(pretrained),
            "seed": pretrained.seed,
            "precision": pretrained.precision,
            "calibration": f"{config.tasks} of {config.calibration_split}",
        },
        "classes": {
            "learned": splits.together(classes_of(config.checkpoint), practised.get("classes", "")),
            "calibrated": splits.digests(images.classes),
        },
        "accuracy": accuracy,
        "int8": None,
    }
    artifact = seal(work, manifest)
    difference = _parity(artifact, some[:16], expected)
    print(f"parity torch / onnxruntime: {difference:.1e} (limit {PARITY:.0e})", file=sys.stderr)
    if int8:
        # Half a point decides: that takes more episodes than a calibration.
        manifest["int8"] = int8_loss(artifact, images, episodes=5 * config.episodes, seed=config.seed)
        print(f"int8: {manifest['int8']}", file=sys.stderr)
        seal(work, manifest)
    work.rename(config.out)
    for method, value in sorted(scores.items(), key=lambda item: -item[1]):
        print(
            f"{method:10} {100 * value:.2f} % on calibration tasks{' (default)' * (method == default)}", file=sys.stderr
        )
    size = sum(file.stat().st_size for file in config.out.iterdir()) / 1e6
    print(f"{config.out}: {size:.1f} MB, {Artifact.load(config.out).digest}", file=sys.stderr)
    return config.out


def stored(value: np.ndarray) -> np.ndarray:
    """Matrices in half precision, numbers and vectors as they are."""
    return np.ascontiguousarray(value.astype(np.float16 if value.ndim > 1 else np.float32))


def _torch(extractor: inputs.Network, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(extractor(torch.from_numpy(pixels)).numpy())


def seal(folder: Path, manifest: dict[str, Any]) -> Artifact:
    """Writes the manifest with the digest of every other file, and loads the result as the service would."""
    files = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
    for name in files:  # whoever serves it may be another user than whoever trained it
        (folder / name).chmod(0o644)
    manifest["files"] = {name: _sha(folder / name) for name in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return Artifact.load(folder)


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _parity(artifact: Artifact, pixels: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference between the features expected and what the runtimes give from the files; must be small."""
    found = (OnnxExtractor(artifact)(pixels), TorchExtractor(artifact, device="cpu")(pixels))
    difference = max(float(np.abs(features - expected).max()) for features in found)
    if not difference <= PARITY:
        sys.exit(f"The runtimes disagree by {difference:.1e}; nothing was exported.")
    return difference
