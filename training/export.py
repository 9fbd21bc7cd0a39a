"""Checkpoints -> an artifact: graphs, weights, learners, calibration, probe, manifest.

Weights are rounded to half precision once, and everything that is measured here is measured after that. The graph
reads them from the same file as torch does: ONNX external data that points into the safetensors file, with a Cast
behind each, which onnxruntime folds away when it loads. The export is refused when the runtimes disagree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.numpy import save_file

from models.artifact import ARRAYS, FORMAT, GRAPH, INT8_GRAPH, MANIFEST, PROBE, WEIGHTS, Artifact
from models.calibration import Temperature, energy, size_of
from models.extractor_onnx import OnnxExtractor
from models.extractor_torch import TorchExtractor
from models.images import ImageDecoder
from models.learners import Learner, build
from models.learners.prototype import Prototype
from models.report import held_out, without_own
from models.resnet import ImageExtractor, fold
from training import checkpoint, data, evaluate, metatrain, practice
from training.config import ExportConfig, MetatrainConfig, PretrainConfig
from training.episodes import Indices, Pool, frozen
from training.pretrain import load_extractor

PARITY = 1e-4  # largest difference between torch and onnxruntime, of features of unit length
SHOTS = (1, 2, 5, 10)
SHIFT, SHIFT_ONE_SHOT = 1.0, 0.5  # of the location, per unit of the energies it is read from; see fit_rejection


def rounded(extractor: ImageExtractor) -> ImageExtractor:
    """Batch normalisation folded in, and every weight rounded to half precision."""
    fold(extractor.backbone)
    extractor.load_state_dict({name: value.half().float() for name, value in extractor.state_dict().items()})
    return extractor.eval()


def graph(extractor: ImageExtractor, size: int) -> onnx.ModelProto:
    """uint8 "images" [n, size, size, C] -> float32 "features" [n, dim], any n."""
    example = torch.zeros(2, size, size, extractor.backbone.shape.channels, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            extractor,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            input_names=["images"],
            output_names=["features"],
            verbose=False,
        )
    proto: onnx.ModelProto = program.model_proto
    for node in proto.graph.node:  # where in the source a node came from is nobody's business
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return proto


def share_weights(proto: onnx.ModelProto, weights: Path) -> onnx.ModelProto:
    """The same graph with every large weight read, in half precision, from the safetensors file beside it."""
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    shared = onnx.ModelProto()
    shared.CopyFrom(proto)
    kept, casts = [], []
    for tensor in shared.graph.initializer:
        entry = header.get(tensor.name)
        if entry is None or list(tensor.dims) != entry["shape"]:
            kept.append(tensor)
            continue
        begin, end = entry["data_offsets"]
        half = onnx.TensorProto(name=tensor.name + ".half", data_type=onnx.TensorProto.FLOAT16, dims=tensor.dims)
        half.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", weights.name), ("offset", 8 + length + begin), ("length", end - begin)):
            half.external_data.add(key=key, value=str(value))
        kept.append(half)
        casts.append(onnx.helper.make_node("Cast", [half.name], [tensor.name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *shared.graph.node]
    for field, values in (("initializer", kept), ("node", nodes)):
        shared.graph.ClearField(field)
        getattr(shared.graph, field).extend(values)
    return shared


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: np.ndarray):
        self.parts: Iterator[np.ndarray] = iter(np.array_split(pixels, max(1, len(pixels) // 32)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self.parts, None)
        return None if part is None else {"images": part}


def quantise(proto: onnx.ModelProto, pixels: np.ndarray, out: Path) -> None:
    """Writes the int8 graph: unsigned activations and signed weights per channel, which fast CPU kernels want.

    Only convolutions and what lies between them; pooling and normalisation of features stay in float.
    """
    after_pool = [node.name for node in proto.graph.node]
    pools = [index for index, node in enumerate(proto.graph.node) if node.op_type == "ReduceMean"]
    with tempfile.TemporaryDirectory() as folder:
        plain, ready = Path(folder) / "plain.onnx", Path(folder) / "ready.onnx"
        onnx.save(proto, plain)
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(out),
            _Reader(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Add", "MaxPool"],
            nodes_to_exclude=after_pool[pools[0] :],
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """What one learner said in one calibration task."""

    cell: int
    shots: tuple[int, ...]
    logits: np.ndarray  # [q, way] of the questions
    answers: np.ndarray  # [q]
    held_out: np.ndarray  # [m, way] of support examples that were held out
    rivals: np.ndarray  # [n, way - 1] of support examples, without their own class


def calibrate(
    learners: Mapping[str, Learner], features: np.ndarray, pool: Pool, *, episodes: int, queries: int, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]], dict[str, float]]:
    """Temperatures and rejections by learner, and mean accuracy on 5-way tasks, which the default is chosen by."""
    most = min(len(rows) for rows in pool.classes) - 1
    ways = sorted({min(way, len(pool.classes)) for way in (2, 5, 10, 20)})
    cells: list[tuple[int, int, list[Indices]]] = []
    for way in ways:
        for shot in [shot for shot in SHOTS if shot <= most]:
            count = max(10, episodes * 5 // max(5, way))
            cells.append((way, shot, frozen(pool, way=way, shot=shot, queries=queries, count=count, seed=seed)))
    sizes = np.array([[1.0, np.log(way), np.log(shot)] for way, shot, _ in cells])
    temperatures, rejections, scores = {}, {}, {}
    grid = np.linspace(np.log(0.05), np.log(20), 121)
    for method, learner in learners.items():
        found = [_answered(learner, features, task, cell) for cell, (_, _, tasks) in enumerate(cells) for task in tasks]
        logs, right = [], []
        for cell, (way, _, _) in enumerate(cells):
            stacked = np.concatenate([task.logits for task in found if task.cell == cell])
            truth = np.concatenate([task.answers for task in found if task.cell == cell])
            losses = [_nll(stacked / np.exp(value), truth) for value in grid]
            logs.append(grid[int(np.argmin(losses))])
            if way == min(5, len(pool.classes)):
                right.append(float((stacked.argmax(axis=1) == truth).mean()))
        fit = np.linalg.lstsq(sizes, np.array(logs), rcond=None)[0]
        names = ("constant", "by_way", "by_shot")
        temperatures[method] = {name: round(float(value), 4) for name, value in zip(names, fit, strict=True)}
        scores[method] = float(np.mean(right))
        rejections[method] = fit_rejection(found, Temperature(**temperatures[method]))
    return temperatures, rejections, scores


def _answered(learner: Learner, features: np.ndarray, task: Indices, cell: int) -> Answered:
    support = evaluate.support_of(features, task)
    affine = learner.adapt(support)
    own = features[task.support] @ affine.weight.T + affine.bias
    shots = tuple(int(count) for count in np.bincount(task.labels, minlength=task.way))
    return Answered(
        cell,
        shots,
        features[task.query] @ affine.weight.T + affine.bias,
        task.answers,
        held_out(learner, support).logits,
        without_own(own, task.labels),
    )


def fit_rejection(tasks: list[Answered], temperature: Temperature) -> dict[str, list[float]]:
    """The numbers of a Rejection, by least squares on tasks whose questions all show one of their classes.

    How the location follows the task's own energies is not fitted: within one domain they hardly differ and the fit
    would all but ignore them, but from domain to domain they shift as a whole.
    """
    fits: dict[str, list[float]] = {}
    scaled = []
    for many, suffix in ((True, ""), (False, "_one_shot")):
        chosen = [task for task in tasks if (len(task.held_out) > 0) == many]
        if not chosen:
            return {}  # too few images a class to know tasks of this kind: then nothing is rejected
        sizes, genuine = [], []
        for task in chosen:
            t = temperature.at(len(task.shots), task.shots)
            sizes.append(size_of(task.shots, energy((task.held_out if many else task.rivals) / t)))
            genuine.append(energy(task.logits / t))
        inputs = np.array(sizes).reshape(len(chosen), 5)
        slope = SHIFT if many else SHIFT_ONE_SHOT
        means = np.array([values.mean() for values in genuine])
        size = np.linalg.lstsq(inputs[:, :3], means - slope * inputs[:, 3], rcond=None)[0]
        location = np.array([*size, slope, 0.0])
        off = [values - row @ location for values, row in zip(genuine, inputs, strict=True)]
        widths = np.log([np.sqrt(np.mean(values**2)) + 1e-6 for values in off])
        spread = np.linalg.lstsq(inputs, np.array(widths), rcond=None)[0]
        scaled += [values / np.exp(row @ spread) for values, row in zip(off, inputs, strict=True)]
        fits[f"location{suffix}"] = [round(float(value), 5) for value in location]
        fits[f"spread{suffix}"] = [round(float(value), 5) for value in spread]
    quantiles = np.quantile(np.concatenate(scaled), np.linspace(0, 1, 201))
    fits["quantiles"] = [round(float(value), 4) for value in quantiles]
    return fits


def _nll(logits: np.ndarray, truth: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(truth)), truth]))


def _calibration_tasks(
    config: ExportConfig, extractor: ImageExtractor, pretrained: PretrainConfig, decoder: ImageDecoder
) -> tuple[practice.Tasks, data.Images]:
    """Held-out tasks: classes with labels, or images with their views."""
    images = data.load(config.data, config.calibration_split, decoder, per_class=config.per_class or None)
    views = max(SHOTS) + 5 if config.tasks == "pseudo" else 0
    made = MetatrainConfig(
        data=config.data, out=config.checkpoint, tasks=config.tasks, views=views, rotations=config.rotations
    )
    tasks = practice.cached(extractor, images, made, pretrained, seed=config.seed)
    return tasks, images


def main(config: ExportConfig) -> Path:
    """Writes the artifact folder, whole or not at all, and returns it."""
    if config.out.exists():
        sys.exit(f"{config.out} exists; an artifact is never edited, choose another --out.")
    extractor, pretrained = load_extractor(config.checkpoint)
    arrays = metatrain.load_learners(config.checkpoint)
    learned_from = checkpoint.load(config.checkpoint / metatrain.CHECKPOINT)["config"]["tasks"]
    extractor = rounded(extractor)
    decoder = ImageDecoder(pretrained.size, pretrained.size, extractor.backbone.shape.channels)
    tasks, images = _calibration_tasks(config, extractor, pretrained, decoder)
    stored = {method: {n: _stored(v) for n, v in fields.items()} for method, fields in arrays.items()}
    learners = {method: build(method, fields) for method, fields in stored.items()}
    temperatures, rejections, scores = calibrate(
        learners, tasks.features, tasks.pool, episodes=config.episodes, queries=5, seed=config.seed
    )
    default = config.default or max(scores, key=lambda method: scores[method])

    work = config.out.with_name(config.out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    weights = {name: np.ascontiguousarray(value.half().numpy()) for name, value in extractor.state_dict().items()}
    save_file(weights, work / WEIGHTS)
    proto = graph(extractor, pretrained.size)
    onnx.save(share_weights(proto, work / WEIGHTS), work / GRAPH)
    save_file({f"{m}/{n}": v for m, fields in stored.items() for n, v in fields.items()}, work / ARRAYS)

    rng = np.random.default_rng(config.seed)
    some = images.pixels[rng.choice(len(images), min(len(images), 384), replace=False)]
    expected = _torch(extractor, some[:16])
    save_file({"images": some[:8], "features": expected[:8]}, work / PROBE)
    if config.int8:
        quantise(proto, some, work / INT8_GRAPH)
    manifest = {
        "format": FORMAT,
        "name": config.name,
        "description": config.description,
        "dim": extractor.backbone.shape.dim,
        "shape": dataclasses.asdict(extractor.backbone.shape),
        "input": {
            "kind": "image",
            "height": pretrained.size,
            "width": pretrained.size,
            "channels": extractor.backbone.shape.channels,
        },
        "methods": {
            method: {"temperature": temperatures[method], "rejection": rejections[method]} for method in stored
        },
        "default": default,
        "training": {
            "data": pretrained.data.name,
            "split": pretrained.split,
            "shape": pretrained.shape,
            "objectives": pretrained.objectives,
            "labels_used": "supervised" in pretrained.objectives or learned_from == "labels",  # calibration: see below
            "epochs": pretrained.epochs,
            "seed": pretrained.seed,
            "calibration": f"{config.tasks} of {config.calibration_split}",
        },
        "accuracy": [
            json.loads(line)
            for file in filter(None, config.metrics.split(","))
            for line in Path(file).read_text().splitlines()
        ],
        "int8": None,
    }
    artifact = _seal(work, manifest)
    difference = _parity(artifact, some[:16], expected)
    print(f"parity torch / onnxruntime: {difference:.1e} (limit {PARITY:.0e})", file=sys.stderr)
    if config.int8:
        manifest["int8"] = int8_loss(artifact, images, config)
        print(f"int8: {manifest['int8']}", file=sys.stderr)
        _seal(work, manifest)
    work.rename(config.out)
    for method, value in sorted(scores.items(), key=lambda item: -item[1]):
        print(
            f"{method:10} {100 * value:.2f} % on calibration tasks{' (default)' * (method == default)}", file=sys.stderr
        )
    size = sum(file.stat().st_size for file in config.out.iterdir()) / 1e6
    print(f"{config.out}: {size:.1f} MB, {Artifact.load(config.out).digest}", file=sys.stderr)
    return config.out


def _stored(value: np.ndarray) -> np.ndarray:
    """Matrices in half precision, numbers and vectors as they are."""
    return np.ascontiguousarray(value.astype(np.float16 if value.ndim > 1 else np.float32))


def _torch(extractor: ImageExtractor, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(extractor(torch.from_numpy(pixels)).numpy())


def _seal(folder: Path, manifest: dict[str, Any]) -> Artifact:
    """Writes the manifest with the digest of every other file, and loads the result as the service would."""
    files = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
    for name in files:  # whoever serves it may be another user than whoever trained it
        (folder / name).chmod(0o644)
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return Artifact.load(folder)


def _parity(artifact: Artifact, pixels: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference between the features expected and what the runtimes give from the files; must be small."""
    found = (OnnxExtractor(artifact)(pixels), TorchExtractor(artifact, device="cpu")(pixels))
    difference = max(float(np.abs(features - expected).max()) for features in found)
    if not difference <= PARITY:
        sys.exit(f"The runtimes disagree by {difference:.1e}; nothing was exported.")
    return difference


def int8_loss(artifact: Artifact, images: data.Images, config: ExportConfig) -> dict[str, float]:
    """Accuracy of float32 and int8 features on the same 5-way tasks of the calibration classes, in per cent."""
    pool = Pool.of(images.labels)
    learner = Prototype(np.array(np.log(10.0), np.float32))
    features = {
        precision: evaluate.embed(OnnxExtractor(artifact, precision=precision), images.pixels)
        for precision in ("float32", "int8")
    }
    found: dict[str, float] = {}
    way = min(5, len(images.classes))
    fewest = int(np.bincount(images.labels).min())
    for shot in (1, min(5, fewest - 1)):
        episodes = frozen(pool, way=way, shot=shot, queries=15, count=config.episodes, seed=config.seed)
        values = {precision: evaluate.run(learner, features[precision], episodes) for precision in features}
        paired = values["int8"] - values["float32"]
        found[f"loss_{way}w{shot}s"] = round(-100 * float(paired.mean()), 3)
        found[f"interval_{way}w{shot}s"] = round(100 * evaluate.interval(paired), 3)
    return found
