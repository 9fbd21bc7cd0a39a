"""A task as one ONNX file that needs nothing else: uint8 pixels in, probabilities and how well known they are out.

Where the artifact reads texts, their bytes go in. The head is appended to the artifact's own graph, whose weights move
into the file in half precision. No file is handed out on trust: it is run on the artifact's probe first and has to
answer like the service. Neither onnx nor onnxruntime is imported before the first export, and a service without them
refuses. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load

from models.arrays import softmax
from models.artifact import GRAPHS, PROBE, Artifact
from models.calibration import Rejection, energy
from models.errors import ExportRefused, FewshotError
from models.head import Head
from service.engine import Engine
from service.export_runners import KINDS
from service.stores import Pointer

log = logging.getLogger(__name__)

PARITY = 1e-4  # largest difference between the file and the service, of numbers from 0 to 1
NARROWEST = 1e-6  # between two quantiles that are equal: a step becomes a very steep slope


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    probabilities: np.ndarray  # [n, way] float32
    known: np.ndarray  # [n] float32


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A file that answered like the service, and the images or texts it was held against."""

    model: bytes
    facts: Mapping[str, str]  # what the file says of itself
    pixels: np.ndarray  # [n, height, width, channels] uint8, or the bytes of texts [n, length]
    expected: Answers
    kind: str = "image"


async def export(
    engine: Engine, task: str, pointer: Pointer, head: Head, *, precision: str, served: str, reject: float
) -> Exported:
    """The file of a task. Raises ExportRefused unless it answers like the service.

    `served` is the precision that the engine runs at: where another is asked for, the file is held against the
    artifact's own graph of that precision. `reject` is written into the file, for whoever runs it.
    """
    artifact = engine.artifact
    facts = facts_of(artifact, task, pointer, head, precision=precision, reject=reject)
    pixels = await asyncio.to_thread(_probe, artifact, precision)
    if precision == served:
        features = await _served(engine, pixels)
    else:
        features = await asyncio.to_thread(_features, artifact, pixels, precision)
    rejection = artifact.manifest.rejections.get(head.method)

    def work() -> Exported:
        expected = answers(head, features, rejection)
        model = build(artifact, head, facts, precision=precision)
        check(model, pixels, expected)
        return Exported(model, facts, pixels, expected, artifact.kind)

    return await asyncio.to_thread(work)


def facts_of(
    artifact: Artifact, task: str, pointer: Pointer, head: Head, *, precision: str, reject: float
) -> dict[str, str]:
    """What the file says of itself, as ONNX keeps it: text by name."""
    kind = KINDS[artifact.kind]
    return {
        "labels": json.dumps(head.labels),
        "task": task,
        "version": str(pointer.version),
        "head": pointer.head,
        "artifact": artifact.digest,
        "method": head.method,
        "precision": precision,
        "reject": f"{reject if _rejects(artifact, head) else 0:g}",  # below this `known`, an image is none of these
        "input": kind.size(artifact.manifest.input),
        kind.fact: kind.made,
    }


def answers(head: Head, features: np.ndarray, rejection: Rejection | None) -> Answers:
    """What the service says of features [n, dim]."""
    logits = head.logits(features)
    known = np.ones(len(features))
    if rejection is not None and head.gauge is not None:
        known = rejection.known(energy(logits), head.gauge)
    return Answers(softmax(logits).astype(np.float32), known.astype(np.float32))


def build(artifact: Artifact, head: Head, facts: Mapping[str, str], *, precision: str) -> bytes:
    """The bytes of the file. Raises ExportRefused without onnx."""
    onnx, _ = _tools()
    model = onnx.load(artifact.path / GRAPHS[precision])  # with the weights beside it, in half precision as they are
    (given,), (features,) = model.graph.input, model.graph.output
    tensor = KINDS[artifact.kind].tensor
    for node in model.graph.node:
        node.input[:] = [tensor if name == given.name else name for name in node.input]
    given.name = tensor
    rejection = artifact.manifest.rejections.get(head.method)
    _append(onnx, model.graph, features.name, head, rejection)
    del model.graph.output[:]
    for name, shape in (("probabilities", ["n", len(head.labels)]), ("known", ["n"])):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    used = {node.domain for node in model.graph.node} | {""}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    # What wrote the artifact's graph may have stamped it for newer runtimes than its operators need.
    least = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    model.ir_version = min(model.ir_version, least)
    model.producer_name, model.producer_version, model.graph.name = "fewshot", "", "task"
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(facts))
    written: bytes = model.SerializeToString(deterministic=True)
    return written


def _append(onnx: Any, graph: Any, features: str, head: Head, rejection: Rejection | None) -> None:
    """Features [n, dim] -> "probabilities" [n, way] and "known" [n], as Head and Rejection define them."""

    def value(name: str, array: Any, kind: Any = np.float32) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, kind), f"head.{name}"))
        return f"head.{name}"

    def node(kind: str, *inputs: str, to: str, **attributes: Any) -> str:
        graph.node.append(onnx.helper.make_node(kind, inputs, [to], **attributes))
        return to

    across = value("across", [1], np.int64)
    weight, bias = value("weight", head.affine.weight), value("bias", head.affine.bias)
    logits = node("Gemm", features, weight, bias, to="head.logits", transB=1)
    # Spelled out, as the sum serves twice and not every runtime takes the largest away before it exponentiates.
    most = node("ReduceMax", logits, across, to="head.most")
    shares = node("Exp", node("Sub", logits, most, to="head.shifted"), to="head.shares")
    total = node("ReduceSum", shares, across, to="head.total")
    node("Div", shares, total, to="probabilities")
    if rejection is None or head.gauge is None:
        rows = node("Shape", features, to="head.rows", start=0, end=1)
        one = onnx.numpy_helper.from_array(np.ones(1, np.float32))
        node("ConstantOfShape", rows, to="known", value=one)
        return
    # The quantiles rise in equal steps of the share, so interpolating between them is the mean, over the intervals
    # between two, of how much of each lies below the energy.
    location, spread = head.gauge
    low, high = np.array(rejection.quantiles[:-1]), np.array(rejection.quantiles[1:])
    found = node("Add", node("Log", total, to="head.log"), most, to="head.energy")
    centred = node("Sub", found, value("location", location), to="head.centred")
    scaled = node("Div", centred, value("spread", spread), to="head.scaled")
    above = node("Sub", scaled, value("quantiles", low), to="head.above")  # [n, intervals]
    widths = value("widths", np.maximum(high - low, NARROWEST))
    part = node("Div", above, widths, to="head.part")
    below = node("Clip", part, value("none", 0), value("all", 1), to="head.below")
    node("ReduceMean", below, across, to="known", keepdims=0)


def check(model: bytes, pixels: np.ndarray, expected: Answers) -> float:
    """Runs the file and returns the largest difference from what is expected. Raises ExportRefused if too large."""
    runtime = _tools()[1].onnxruntime
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = session.run(["probabilities", "known"], {session.get_inputs()[0].name: pixels})
    except Exception:  # whatever a runtime dislikes about the file, it is not to be handed out
        log.exception("The exported file does not run.")
        raise ExportRefused("The file that was made does not run, so it is not handed out; the log says why.") from None
    wanted = (expected.probabilities, expected.known)
    if any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        raise ExportRefused("The file that was made answers in another shape than the service.")
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
    if not difference <= PARITY:  # also when it is no number
        raise ExportRefused(
            f"The file that was made answers otherwise than the service, by {difference:.1e} where {PARITY:.0e} is "
            "allowed, so it is not handed out."
        )
    return difference


def bundle(exported: Exported) -> bytes:
    """A zip with the file, a program that runs it, and images with the answers that they must get."""
    golden, kind, facts = io.BytesIO(), KINDS[exported.kind], exported.facts
    tensors: dict[str, Any] = {
        kind.tensor: exported.pixels,
        "probabilities": exported.expected.probabilities,
        "known": exported.expected.known,
    }
    np.savez(golden, **tensors)
    readme = (
        f"The task {facts['task']!r}, version {facts['version']}, as one ONNX file.\n\n"
        f"  pip install {kind.needs}\n"
        f"  python run.py {kind.example}\n\n"
        f"model.onnx   {kind.tensor} uint8 [n, {kind.shape}] -> probabilities [n, way], known [n]\n"
        f"             The input is {facts['input']}. The labels, in the order of the probabilities, and more\n"
        "             are in the metadata of the file.\n"
        f"golden.npz   {kind.tensor}, and the probabilities and known that any runtime should give for them "
        "(within 1e-4)\n"
        f"run.py       from files; how one becomes {kind.tensor} matters, and stands there\n\n"
        + (f"One whose `known` is below {facts['reject']} is none of these.\n" if facts["reject"] != "0" else "")
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.onnx", exported.model, compress_type=zipfile.ZIP_STORED)  # weights do not shrink
        file.writestr("golden.npz", golden.getvalue())
        file.writestr("run.py", kind.program)
        file.writestr("README.txt", readme)
    return out.getvalue()


def _rejects(artifact: Artifact, head: Head) -> bool:
    return head.gauge is not None and head.method in artifact.manifest.rejections


def _probe(artifact: Artifact, precision: str) -> np.ndarray:
    """The images to hold the file against. Raises ExportRefused when there is nothing to export."""
    if not {GRAPHS[precision], PROBE} <= set(artifact.manifest.files):
        raise ExportRefused(f"The artifact {artifact.manifest.name!r} has no {precision} graph.")
    _tools()
    return np.asarray(load((artifact.path / PROBE).read_bytes())[artifact.input_name])


async def _served(engine: Engine, pixels: np.ndarray) -> np.ndarray:
    embedded = await engine.batcher.embed(list(pixels))
    rows = []
    for item in embedded.items:
        if isinstance(item, FewshotError):
            raise item
        rows.append(item)
    return np.stack(rows)


def _features(artifact: Artifact, pixels: np.ndarray, precision: str) -> np.ndarray:
    _, runtime = _tools()
    features: np.ndarray = runtime.OnnxExtractor(artifact, precision=precision)(pixels)
    return features


def _tools() -> tuple[Any, Any]:
    """onnx, and the module that sets up onnxruntime: late, for whoever exports nothing or has a GPU and neither."""
    try:
        import onnx

        from models import extractor_onnx
    except ImportError:
        raise ExportRefused(
            "This service runs without onnxruntime or onnx, as on a GPU, and can make no file; export from one that "
            "serves the same artifact on a CPU."
        ) from None
    return onnx, extractor_onnx
