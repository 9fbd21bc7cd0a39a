"""ONNX files as people have them: one small network, written down in many ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DIM = 8


def weight(name: str, *shape: int, seed: int = 0) -> Any:
    rng = np.random.default_rng([seed, len(name)])
    return numpy_helper.from_array(rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32), name)


def net(
    *,
    shape: tuple[Any, ...] = ("n", 3, 24, 24),
    kind: int = TensorProto.FLOAT,
    given: str = "images",
    opset: int = 18,
    ends: str = "vector",
    relu: bool = True,
    factor: float = 1.0,
) -> onnx.ModelProto:
    """Two convolutions that end in `ends`: vector, pooled (a vector [n, dim, 1, 1]), maps, tokens, fixed (one row), ...

    Where they end in `baked`, more than one image is an error. What ends in `.last` has its channels there.

    Names are those that the wrapping uses itself, so that none of them may be taken for another.
    """
    channels = next(dim for dim in (shape[1], shape[3]) if dim in (1, 3))
    nodes, x = [], given
    if kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [x], ["float"], to=TensorProto.FLOAT))
        x = "float"
        if kind == TensorProto.UINT8:
            nodes.append(helper.make_node("Mul", [x, "scale"], ["scaled"]))
            x = "scaled"
    if shape[1] != channels:
        nodes.append(helper.make_node("Transpose", [x], ["first"], perm=[0, 3, 1, 2]))
        x = "first"
    nodes += [
        helper.make_node("Conv", [x, "w1"], ["c1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu" if relu else "Tanh", ["c2"], ["maps"]),
        helper.make_node("Mul", ["maps", "factor"], ["scaled.maps"]),
        helper.make_node("GlobalAveragePool", ["scaled.maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["vectors"]),
        helper.make_node("Reshape", ["pooled", "row"], ["fixed"]),
        helper.make_node("Reshape", ["maps", "grid"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("Flatten", ["maps"], ["long"]),
        helper.make_node("Transpose", ["maps"], ["maps.last"], perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", ["pooled"], ["pooled.last"], perm=[0, 2, 3, 1]),
        helper.make_node("ArgMax", ["vectors"], ["label"], axis=1),
    ]
    if ends == "baked":  # nowhere else: what nobody asks for is still run
        nodes.append(helper.make_node("Reshape", ["pooled", "one"], ["baked"]))
    ranks = {
        "vectors": 2,
        "pooled": 4,
        "maps": 4,
        "maps.last": 4,
        "pooled.last": 4,
        "tokens": 3,
        "fixed": 2,
        "baked": 2,
        "long": 2,
        "label": 2,
    }
    names = {"vector": ["vectors"], "two": ["vectors", "tokens"]}.get(ends, [ends])
    graph = helper.make_graph(
        nodes,
        "somebody's",
        [helper.make_tensor_value_info(given, kind, shape)],
        [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if name == "label" else TensorProto.FLOAT, [None] * ranks[name]
            )
            for name in names
        ],
        [
            weight("w1", 6, int(channels), 3, 3),
            weight("w2", DIM, 6, 3, 3),
            numpy_helper.from_array(np.array(factor, np.float32), "factor"),
            numpy_helper.from_array(np.array(1 / 255, np.float32), "scale"),
            numpy_helper.from_array(np.array([1, -1]), "row"),
            numpy_helper.from_array(np.array([1, DIM]), "one"),
            numpy_helper.from_array(np.array([0, DIM, -1]), "grid"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def write(model: onnx.ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    onnx.save(model, folder / name)
    return folder / name
