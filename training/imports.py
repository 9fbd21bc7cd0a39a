"""A backbone that was trained elsewhere -> an artifact: learners, calibration, graphs, probe, manifest.

The backbone itself is not trained. What it gives for the images of the training classes centres the features and
teaches the learners; the validation classes decide and calibrate, as they do for an extractor of our own.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import save_file

from models.artifact import ARRAYS, FORMAT, GRAPH, INT8_GRAPH, PROBE, WEIGHTS, Artifact
from models.errors import ArtifactInvalid
from models.extractor_onnx import OnnxExtractor, session
from models.images import ImageDecoder
from models.learners import LEARNERS, build
from training import data, evaluate, metatrain, onnx_file, probe, splits
from training.backbone import Backbone, Refused
from training.calibrate import apart, calibrate, limits
from training.config import ImportConfig, MetatrainConfig
from training.export import check_default, seal, stored
from training.folders import DataError
from training.int8 import int8_loss, quantise
from training.practice import Tasks, own_source
from training.stepping import choose_device
from training.wrap import PARITY, ROUNDING, Normalisation, in_float, normalised, save, vectors_of

INT8_LOSS = 0.5  # points of accuracy; a graph that loses more is left out
INT8_KINDS = ("Conv", "MatMul", "Gemm", "MaxPool")


class _Vectors:
    """A graph of `wrap.vectors_of` on disk, as an extractor."""

    def __init__(self, file: Path, dim: int):
        self._session = session(str(file))
        self.dim = dim

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run(["vectors"], {"images": batch})[0])


def read(config: ImportConfig) -> Backbone:
    """Raises Refused, with one sentence, for what does not fit."""
    if config.backbone.is_dir():
        from training import huggingface

        return huggingface.read(config.backbone, config)
    if config.backbone.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise Refused(
            f"{config.backbone} is pickled, which may run code when read; give ONNX or a folder of safetensors."
        )
    if config.backbone.suffix == ".safetensors":
        raise Refused(f"{config.backbone} is weights alone; give the folder that has its config.json too.")
    if not config.backbone.is_file():
        raise Refused(f"{config.backbone} does not exist.")
    return onnx_file.read(config.backbone, config)


def images_of(backbone: Backbone, config: ImportConfig) -> tuple[data.Images, data.Images]:
    """Those of the training and of the validation classes. Raises DataError, also where they are too few."""
    decoder = ImageDecoder(backbone.height, backbone.width, backbone.channels)
    found = [data.load(config.data, split, decoder, per_class=config.per_class or None) for split in ("train", "val")]
    for split, images in zip(("train", "val"), found, strict=True):
        if len(images.classes) < 2:
            raise DataError(f"{config.data} has one class in its split '{split}'; two can be told apart.")
    return found[0], found[1]


def write_graph(backbone: Backbone, pixels: np.ndarray, work: Path) -> tuple[onnx.ModelProto, bool]:
    """The graph "images" -> "vectors", and whether the weights that were written are rounded to half precision.

    They are unless that moves features, which are read around their mean, by more than ROUNDING.
    """
    model = vectors_of(backbone, pixels[:3])
    expected = backbone.reference(backbone.given(pixels))
    features = Normalisation.of(expected)
    save(model, work / WEIGHTS, work / GRAPH, half=True)
    found = _Vectors(work / GRAPH, expected.shape[1])(pixels)
    moved = float(np.linalg.norm(features(found) - features(expected), axis=1).max())
    half = moved <= ROUNDING
    print(
        f"weights in {'half' if half else 'full'} precision: half moves features by {moved:.1e} (limit {ROUNDING})",
        file=sys.stderr,
    )
    if not half:
        save(model, work / WEIGHTS, work / GRAPH, half=False)
    return model, half


def vectors(work: Path, images: data.Images, dim: int) -> np.ndarray:
    """What the backbone gives, [n, dim]. Raises DataError where that is not finite."""
    return evaluate.embed(_Vectors(work / GRAPH, dim), images.pixels, batch=16)


def learn(config: ImportConfig, seen: Tasks, held_out: Tasks, work: Path) -> dict[str, Any]:
    """The arrays of each learner, as they are stored."""
    asked = MetatrainConfig(data=config.data, out=work, learners=config.learners, steps=config.steps, seed=config.seed)
    metatrain.train(asked, seen, [own_source(seen, asked)], held_out, choose_device(asked.device))
    arrays = metatrain.load_learners(work)
    return {method: {name: stored(value) for name, value in fields.items()} for method, fields in arrays.items()}


def try_int8(model: onnx.ModelProto, pixels: np.ndarray, work: Path) -> str | None:
    """Writes the int8 graph; a sentence where there is none."""
    if any(node.op_type == "Scan" for node in model.graph.node):
        return "images are taken one at a time"
    try:
        quantise(model, pixels, work / INT8_GRAPH, keep=in_float(model), kinds=INT8_KINDS)
    except Exception as error:  # the quantiser has no one error for what it cannot do to a stranger's graph
        (work / INT8_GRAPH).unlink(missing_ok=True)
        return f"it cannot be quantised ({type(error).__name__})"
    return None


def holds(artifact: Artifact, loss: dict[str, float]) -> bool:
    """Whether the int8 graph is worth having: little accuracy lost, and features where the service expects them."""
    try:
        artifact.check(OnnxExtractor(artifact, precision="int8"), precision="int8")
    except ArtifactInvalid:
        return False
    return max(value for name, value in loss.items() if name.startswith("loss")) <= INT8_LOSS


def main(config: ImportConfig) -> Path:
    """Writes the artifact folder, whole or not at all, and returns it. Raises Refused or DataError."""
    if config.out.exists():
        sys.exit(f"{config.out} exists; an artifact is never edited, choose another --out.")
    if not set(config.learners.split(",")) <= set(LEARNERS):
        sys.exit(f"--learners: known learners are {', '.join(LEARNERS)}.")
    check_default(config.default, config.learners.split(","))
    backbone = read(config)
    if not backbone.raw and not backbone.preparation.known:
        print("no preprocessor_config.json: colours are prepared as for ImageNet (--mean, --std)", file=sys.stderr)
    seen, held_out = images_of(backbone, config)
    work = config.out.with_name(config.out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "learners").mkdir(parents=True)
    try:
        return _make(config, backbone, seen, held_out, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make(config: ImportConfig, backbone: Backbone, seen: data.Images, held_out: data.Images, work: Path) -> Path:
    some = held_out.pixels[np.random.default_rng(config.seed).permutation(len(held_out))[:128]]
    model, half = write_graph(backbone, some[:16], work)
    dim = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    raw = vectors(work, seen, dim)
    if np.ptp(raw, axis=0).max() < 1e-6:
        raise Refused("The backbone gives the same vector whatever the image.")
    normalisation = Normalisation.of(raw)
    features = normalisation(vectors(work, held_out, dim))
    tasks = Tasks(normalisation(raw), seen.labels, seen.groups, plain=len(seen))
    check = Tasks(features, held_out.labels, held_out.groups, plain=len(held_out))
    if lost := limits(check.pool, held_out.classes):
        print(lost, file=sys.stderr)
    arrays = learn(config, tasks, check, work / "learners")
    shutil.rmtree(work / "learners")
    learners = {method: build(method, fields) for method, fields in arrays.items()}
    temperatures, rejections, scores = calibrate(
        learners, features, check.pool, episodes=config.episodes, queries=5, seed=config.seed
    )
    default = config.default or max(scores, key=lambda method: scores[method])

    see = _Vectors(work / GRAPH, dim)
    expected = normalisation(see(some[:16]))
    shown = probe.drawn(some.shape[1:])
    told = normalisation(see(shown))
    model = normalised(model, normalisation)
    save(model, work / WEIGHTS, work / GRAPH, half=half)
    save_file({f"{m}/{n}": v for m, fields in arrays.items() for n, v in fields.items()}, work / ARRAYS)
    save_file({"images": shown, "features": told}, work / PROBE)
    why_not = try_int8(model, some, work) if config.int8 else "it was not asked for"
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": config.name,
        "description": config.description,
        "dim": dim,
        "shape": {"network": backbone.name},
        "input": {
            "kind": "image",
            "height": backbone.height,
            "width": backbone.width,
            "channels": backbone.channels,
        },
        "methods": {
            method: {"temperature": temperatures[method], "rejection": rejections[method]} for method in arrays
        },
        "default": default,
        "twins": apart(features, check.pool),
        "training": {
            "data": config.data.name,
            "split": "train",
            "shape": backbone.name,
            "objectives": "imported",
            "source": digest(config.backbone),
            "labels_used": True,  # by the learners
            "seed": config.seed,
            "calibration": "labels of val",
        },
        # What the backbone itself learned from nobody says.
        "classes": {"learned": splits.digests(seen.classes), "calibrated": splits.digests(held_out.classes)},
        "accuracy": [],
        "int8": None,
    }
    artifact = seal(work, manifest)
    difference = float(np.abs(OnnxExtractor(artifact)(some[:16]) - expected).max())
    if not difference <= PARITY:
        raise Refused(f"The artifact that was made gives other features than the backbone, by {difference:.1e}.")
    print(f"parity of the artifact: {difference:.1e} (limit {PARITY:.0e})", file=sys.stderr)
    if why_not is None:
        manifest["int8"] = int8_loss(artifact, held_out, episodes=config.episodes, seed=config.seed)
        if not holds(artifact, manifest["int8"]):
            why_not = f"it does not hold ({manifest.pop('int8')})"
            manifest["int8"] = None
            (work / INT8_GRAPH).unlink()
        artifact = seal(work, manifest)
    print(f"int8: {manifest['int8'] or 'none, ' + str(why_not)}", file=sys.stderr)
    work.rename(config.out)
    size = sum(file.stat().st_size for file in config.out.iterdir()) / 1e6
    print(f"{config.out}: {size:.1f} MB, {artifact.digest}, default {default}", file=sys.stderr)
    return config.out


def digest(source: Path) -> str:
    """Names the weights that came in."""
    file = source / "model.safetensors" if source.is_dir() else source
    with file.open("rb") as opened:
        return "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
