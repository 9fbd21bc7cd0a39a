"""Puts a foreign graph between pixels and features: uint8 [n, H, W, C] in, unit-length float32 [n, dim] out.

Only operators that mean the same in every operator set from 9 on are put around it, for it may be of any. Where it
takes one image at a time, or turns out to mix the images of a batch, it becomes the body of a scan over them. Each way
is tried and held against the source. Knows nothing of learners or manifests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from models.extractor_onnx import session
from training.backbone import Backbone, Refused, first_line
from training.graphs import share_weights

PARITY = 1e-4  # largest difference between source and graph, of vectors of unit length
ROUNDING = 2e-2  # longest way that rounding the weights to half precision may move a feature of unit length
TASKS = 18  # the operator set that a task exported as a file needs; older graphs are converted where that works
OURS = "fewshot."  # names of the nodes and values that are put around
THEIRS = "backbone."
EPSILON = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Normalisation:
    """Vectors -> features of unit length, as models/resnet.py:ImageExtractor does it and for its reasons.

    The square root has a meaning only where nothing is negative, as after a ReLU.
    """

    root: bool
    centre: np.ndarray  # [dim]

    @classmethod
    def of(cls, vectors: np.ndarray) -> Normalisation:
        """From the vectors [n, dim] of the images that learners are trained on."""
        root = bool((vectors >= 0).all())
        return cls(root, _rooted(vectors, root).mean(axis=0, dtype=np.float64).astype(np.float32))

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        return unit(_rooted(vectors, self.root) - self.centre)


def _rooted(vectors: np.ndarray, root: bool) -> np.ndarray:
    return np.sqrt(np.maximum(vectors, 0) + np.float32(EPSILON)) if root else vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + np.float32(EPSILON)))


class _Pieces:
    """Nodes and constants that are put around, in order."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any, kind: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), OURS + name))
        return OURS + name

    def node(self, kind: str, *inputs: str, to: str, attributes: Mapping[str, Any] = MappingProxyType({})) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [OURS + to], name=OURS + to, **attributes))
        return OURS + to


def vectors_of(backbone: Backbone, pixels: np.ndarray) -> onnx.ModelProto:
    """The graph "images" -> "vectors" [n, dim] that agrees with the source on these pixels. Raises Refused.

    Tried for all images at once and for one after the other, in a newer operator set if the graph is of an old one.
    """
    expected = unit(backbone.reference(backbone.given(pixels)))
    if not np.isfinite(expected).all():
        raise Refused("The backbone gives numbers that are not finite.")
    nearest = np.inf
    why = ""
    for graph in _versions(backbone.graph):
        for scanned in (False, True):
            candidate = _surround(backbone, graph, expected.shape[1], scanned)
            try:
                runtime = session(candidate.SerializeToString(), quiet=True)
                found = runtime.run(["vectors"], {"images": pixels})[0]
                alone = runtime.run(["vectors"], {"images": pixels[:1]})[0]
            except Exception as error:  # onnxruntime has no one error for a graph that is not meant for this
                why = f": {first_line(error)}"
                continue
            if found.shape == expected.shape and alone.shape == expected[:1].shape:
                difference = float(
                    np.abs(unit(np.concatenate([found, alone])) - expected[[*range(len(pixels)), 0]]).max()
                )
                if difference <= PARITY:
                    return candidate
                nearest = min(nearest, difference)
    if nearest < np.inf:
        raise Refused(f"The graph that was made differs from the backbone by {nearest:.1e}; {PARITY:.0e} is allowed.")
    raise Refused(f"The backbone could not be made to take uint8 images in batches of any size{why or '.'}")


def _versions(graph: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    if max(opset.version for opset in graph.opset_import if opset.domain in ("", "ai.onnx")) < TASKS:
        with suppress(Exception):  # it knows not every operator, and then the graph stays as it is
            yield onnx.version_converter.convert_version(graph, TASKS)
    yield graph


def _surround(backbone: Backbone, source: onnx.ModelProto, dim: int, scanned: bool) -> onnx.ModelProto:
    """The graph of the source with what is put around; `scanned`: it is given one image after the other."""
    model = onnx.compose.add_prefix(source, THEIRS, rename_functions=False)
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    (given,) = (value for value in graph.input if value.name not in stored)
    kind = given.type.tensor_type.elem_type
    output = next(value for value in graph.output if value.name == THEIRS + backbone.output)
    around, inside = _Pieces(), _Pieces()

    x = "images"
    if not backbone.raw:
        x = around.node("Cast", x, to="float", attributes={"to": TensorProto.FLOAT})
        scale = around.constant("scale", backbone.preparation.scale(backbone.channels))
        shift = around.constant("shift", backbone.preparation.shift(backbone.channels))
        x = around.node("Sub", around.node("Mul", x, scale, to="scaled"), shift, to="prepared")
        x = around.node("Cast", x, to="given", attributes={"to": kind})
    if backbone.first:
        x = around.node("Transpose", x, to="first", attributes={"perm": [0, 3, 1, 2]})

    body = [*graph.node]
    vectors = _pool(inside, output.name, backbone.how)
    if scanned:
        height, width, channels = backbone.pixels
        edges = [channels, height, width] if backbone.first else [height, width, channels]
        inside.nodes.insert(0, helper.make_node("Reshape", [OURS + "image", OURS + "batch"], [given.name]))
        inside.constant("batch", [1, *edges], np.int64)
        row = inside.node("Reshape", vectors, inside.constant("dim", [dim], np.int64), to="row")
        scan = helper.make_graph(
            [inside.nodes[0], *body, *inside.nodes[1:]],
            "image",
            [helper.make_tensor_value_info(OURS + "image", kind, edges)],
            [helper.make_tensor_value_info(row, output.type.tensor_type.elem_type, [dim])],
        )
        vectors = around.node("Scan", x, to="rows", attributes={"body": scan, "num_scan_inputs": 1})
    else:
        around.nodes += [helper.make_node("Identity", [x], [given.name], name=OURS + "identity"), *body, *inside.nodes]
    around.nodes.append(helper.make_node("Cast", [vectors], ["vectors"], name=OURS + "vectors", to=TensorProto.FLOAT))

    graph.ClearField("node")
    graph.node.extend(around.nodes)
    graph.initializer.extend([*around.constants, *inside.constants])
    graph.ClearField("value_info")  # shapes of the batches that the source was written down for
    graph.ClearField("input")  # initializers among them
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *backbone.pixels]))
    graph.ClearField("output")
    graph.output.append(helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", dim]))
    _say_nothing(model)
    return model


def _pool(pieces: _Pieces, x: str, how: str) -> str:
    """The output of the source -> [n, dim]."""
    if how == "cls":
        return pieces.node("Gather", x, pieces.constant("cls", 0, np.int64), to="pooled", attributes={"axis": 1})
    if how == "tokens":
        x = pieces.node("Transpose", x, to="channels", attributes={"perm": [0, 2, 1]})
    if how == "maps.last":
        x = pieces.node("Transpose", x, to="channels", attributes={"perm": [0, 3, 1, 2]})
    if how in ("tokens", "maps", "maps.last"):
        x = pieces.node("GlobalAveragePool", x, to="averaged")
    return pieces.node("Flatten", x, to="pooled", attributes={"axis": 1})


def _say_nothing(model: onnx.ModelProto) -> None:
    """Where in somebody's source a node came from is nobody's business."""
    model.ir_version = max(model.ir_version, 8)  # from 4 on, initializers need be no inputs
    model.producer_name, model.producer_version, model.doc_string = "fewshot", "", ""
    model.graph.name, model.graph.doc_string = "extractor", ""
    model.ClearField("metadata_props")
    for number, node in enumerate(model.graph.node):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        node.name = node.name or f"{THEIRS}node.{number}"


def normalised(model: onnx.ModelProto, normalisation: Normalisation) -> onnx.ModelProto:
    """The graph of `vectors_of` -> "images" -> "features" of unit length."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    pieces, x = _Pieces(), "vectors"
    epsilon = pieces.constant("epsilon", EPSILON)
    if normalisation.root:
        x = pieces.node("Add", pieces.node("Relu", x, to="positive"), epsilon, to="shifted")
        x = pieces.node("Sqrt", x, to="rooted")
    x = pieces.node("Sub", x, pieces.constant("centre", normalisation.centre), to="centred")
    # The sum of squares as a product with ones: how a reduction is told its axis depends on the operator set.
    ones = pieces.constant("ones", np.ones((len(normalisation.centre), 1)))
    squares = pieces.node("MatMul", pieces.node("Mul", x, x, to="squared"), ones, to="squares")
    length = pieces.node("Add", pieces.node("Sqrt", squares, to="length"), epsilon, to="divisor")
    pieces.nodes.append(helper.make_node("Div", [x, length], ["features"], name=OURS + "features"))
    made.graph.node.extend(pieces.nodes)
    made.graph.initializer.extend(pieces.constants)
    made.graph.output[0].name = "features"
    return made


def save(model: onnx.ModelProto, weights: Path, graphs: Path, *, half: bool) -> None:
    """Writes the matrices of a graph into one file, in half precision where it holds them, and the graph beside it."""
    save_file(dict(_matrices(model, half=half)), weights)
    onnx.save(share_weights(model, weights), graphs)


def _matrices(model: onnx.ModelProto, *, half: bool) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in model.graph.initializer:
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16) or len(tensor.dims) < 2:
            continue
        value = numpy_helper.to_array(tensor)
        if half and value.size and np.abs(value).max() < np.finfo(np.float16).max:
            value = value.astype(np.float16)
        yield tensor.name, np.ascontiguousarray(value)


def in_float(model: onnx.ModelProto) -> list[str]:
    """Nodes that an int8 graph leaves in float: what was put around, and products of two activations."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.name.startswith(OURS) or (node.op_type in ("MatMul", "Gemm") and node.input[1] not in stored)
    ]
