"""An ONNX file with one image input -> a Backbone. The file is a stranger's: what it refers to is looked at first.

It is never run with operators beyond those of ONNX and of onnxruntime itself, and reads no file outside its own folder.
That it comes to an end, and in how much memory, is not known before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from models.extractor_onnx import session
from training.backbone import DIMS, MOST_BYTES, MOST_PIXELS, Backbone, Preparation, Refused, first_line, preparation
from training.config import ImportConfig

OPSETS = (9, 26)  # of ONNX itself; scanning over images begins with the first
DOMAINS = {"", "ai.onnx", "com.microsoft"}
KINDS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16, onnx.TensorProto.UINT8: np.uint8}
AVERAGED: dict[str, tuple[int, ...]] = {"tokens": (1,), "maps": (2, 3), "maps.last": (1, 2)}  # axes, by Backbone.how


def read(file: Path, config: ImportConfig) -> Backbone:
    """Raises Refused, with one sentence, for a file that does not fit."""
    graph = load(file)
    stored = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in stored]
    if len(inputs) != 1:
        raise Refused(f"{file} has {len(inputs)} inputs ({_names(inputs)}); one image is all that can be given.")
    output = _output(file, graph, config.output)
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type not in KINDS:
        raise Refused(f"The input {inputs[0].name!r} of {file} takes neither float nor uint8.")
    dims: list[int | None] = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]
    if len(dims) != 4:
        raise Refused(f"The input {inputs[0].name!r} of {file} has {len(dims)} dimensions; images in a batch have 4.")
    if dims[1] not in (1, 3) and dims[3] not in (1, 3):
        raise Refused(f"The input of {file} does not say where its 1 or 3 channels are: its shape is {_shape(dims)}.")
    first = dims[1] in (1, 3)
    channels = (dims[1] if first else dims[3]) or 3  # which it is was just seen
    if dims[0] not in (None, 1):
        raise Refused(f"{file} takes batches of exactly {dims[0]} images; export it with any or with one.")
    prepared = preparation(file.parent, config)
    height, width = _edges(file, dims[2:] if first else dims[1:3], prepared, config)
    kind = KINDS[tensor.elem_type]
    edges = (channels, height, width) if first else (height, width, channels)
    run = _runner(file, graph, inputs[0].name, output, kind)
    how, dim = _pooled(file, run(np.zeros((1, *edges), kind)), config.pooling, (height, width))
    if not DIMS[0] <= dim <= DIMS[1]:
        raise Refused(f"{file} gives vectors of {dim} numbers; {DIMS[0]} to {DIMS[1]} can be learned from.")
    raw = tensor.elem_type == onnx.TensorProto.UINT8
    if raw and (config.mean or config.std):
        raise Refused(f"{file} takes uint8 pixels as they are; --mean and --std have no place there.")
    return Backbone(
        name="onnx",
        graph=graph,
        output=output,
        how=how,
        height=height,
        width=width,
        channels=channels,
        first=first,
        raw=raw,
        preparation=prepared,
        reference=lambda given: np.concatenate([pool(run(image[None]), how) for image in given]),
    )


def load(file: Path) -> onnx.ModelProto:
    """The graph with its weights inside. Raises Refused where it is no ONNX, too large, or leads elsewhere."""
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise Refused(f"{file} has {size} bytes; at most {MOST_BYTES} can be imported.")
        graph = onnx.load(file, load_external_data=False)
    except OSError:
        raise Refused(f"{file} cannot be read.") from None
    except (DecodeError, ValueError):
        raise Refused(f"{file} is no ONNX file, or a damaged one.") from None
    if not graph.graph.node:
        raise Refused(f"{file} is no ONNX file, or an empty one.")
    foreign = {opset.domain for opset in graph.opset_import} | {node.domain for node in _nodes(graph)}
    foreign -= DOMAINS | {function.domain for function in graph.functions}
    if foreign:
        raise Refused(f"{file} needs operators from {', '.join(sorted(foreign))!r}, which are code of their own.")
    version = max((opset.version for opset in graph.opset_import if opset.domain in ("", "ai.onnx")), default=0)
    if not OPSETS[0] <= version <= OPSETS[1]:
        raise Refused(f"{file} is of operator set {version}; {OPSETS[0]} to {OPSETS[1]} are understood.")
    _load_outside(file, graph)
    if graph.ByteSize() > MOST_BYTES:
        raise Refused(f"{file} has weights of {graph.ByteSize()} bytes; at most {MOST_BYTES} can be imported.")
    return graph


def _load_outside(file: Path, graph: onnx.ModelProto) -> None:
    """Takes in the weights that lie in files beside the graph, and in no others."""
    folder, total = file.parent.resolve(), 0
    outside = [tensor for tensor in _tensors(graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for name in {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}:
        beside = (folder / name).resolve()
        if Path(name).is_absolute() or folder not in beside.parents:
            raise Refused(f"{file} wants to read {name!r}, which lies outside its folder.")
        if not beside.is_file():
            raise Refused(f"{file} has weights in {name!r}, which is not there.")
        total += beside.stat().st_size
    if total > MOST_BYTES:
        raise Refused(f"{file} has weights of {total} bytes; at most {MOST_BYTES} can be imported.")
    for tensor in outside:
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except Exception:  # onnx has an error of its own for each way in which offsets and lengths can be wrong
            raise Refused(f"The weights {tensor.name!r} of {file} cannot be read.") from None
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.ClearField("external_data")


def _graphs(graph: onnx.ModelProto) -> Iterator[Any]:
    """The graph, its functions, and every graph that a node of theirs holds."""
    todo: list[Any] = [graph.graph, *graph.functions]
    while todo:
        yield (one := todo.pop())
        for node in one.node:
            for attribute in node.attribute:
                todo += [attribute.g] if attribute.HasField("g") else []
                todo += attribute.graphs


def _nodes(graph: onnx.ModelProto) -> Iterator[Any]:
    for one in _graphs(graph):
        yield from one.node


def _tensors(graph: onnx.ModelProto) -> Iterator[Any]:
    for one in _graphs(graph):
        if isinstance(one, onnx.GraphProto):
            yield from one.initializer
    for node in _nodes(graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _output(file: Path, graph: onnx.ModelProto, wanted: str) -> str:
    outputs = list(graph.graph.output)
    if wanted:
        if wanted not in {value.name for value in outputs}:
            raise Refused(f"{file} has no output {wanted!r}; it has {_names(outputs)}.")
        return wanted
    if len(outputs) != 1:
        raise Refused(f"{file} has {len(outputs)} outputs; --output names one of {_names(outputs)}.")
    return str(outputs[0].name)


def _edges(file: Path, dims: list[int | None], prepared: Preparation, config: ImportConfig) -> tuple[int, int]:
    """Height and width: those of the graph, else those that were said."""
    said = prepared.size or (None, None)
    if config.size and any(dim not in (None, config.size) for dim in dims):
        raise Refused(f"{file} takes images of {_shape(dims)}, so not of --size {config.size}.")
    height, width = dims[0] or said[0], dims[1] or said[1]
    if height is None or width is None:
        raise Refused(f"{file} takes images of any size; --size says which to give it.")
    if not all(8 <= edge <= MOST_PIXELS for edge in (height, width)):
        raise Refused(f"{file} takes images of {height} x {width}; 8 to {MOST_PIXELS} pixels can be served.")
    return height, width


def _runner(
    file: Path, graph: onnx.ModelProto, name: str, output: str, kind: Any
) -> Callable[[np.ndarray], np.ndarray]:
    """The file itself, on one image [1, ...]: whatever else it was made for, this it can do."""
    try:
        runtime = session(graph.SerializeToString())
    except Exception as error:  # whatever onnxruntime dislikes about a stranger's file
        raise Refused(f"onnxruntime does not load {file}: {first_line(error)}") from None

    def run(image: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(runtime.run([output], {name: image.astype(kind)})[0])
        except Exception as error:  # as above
            raise Refused(f"{file} does not run on an image of its size: {first_line(error)}") from None

    return run


def _pooled(file: Path, found: np.ndarray, pooling: str, edges: tuple[int, int]) -> tuple[str, int]:
    """How what is given for one image of these edges becomes a vector, and how long that is."""
    shape = found.shape
    if found.dtype not in (np.float32, np.float16):
        raise Refused(f"{file} gives {found.dtype}, no float vector.")
    if pooling == "auto" and len(shape) >= 2 and shape[0] == 1 and found.size == max(shape):
        return "vector", found.size
    if pooling != "auto" and len(shape) == 3 and shape[0] == 1:
        return ("cls" if pooling == "cls" else "tokens"), shape[2]
    if pooling == "mean" and len(shape) == 4 and shape[0] == 1:
        # The layout of the input says nothing certain: exporters turn the one and leave the other.
        first, last = _alike(shape[2:], edges), _alike(shape[1:3], edges)
        if first == last:
            raise Refused(
                f"{file} gives maps of {_shape(shape)} for one image of {_shape(edges)}; which of these edges are"
                " channels cannot be told, so export it with a vector as its output."
            )
        return ("maps", shape[1]) if first else ("maps.last", shape[3])
    more = "; --pooling mean or cls makes one of tokens, mean of maps" if pooling == "auto" else ""
    raise Refused(f"{file} gives {_shape(shape)} for one image, no vector that --pooling {pooling} can take{more}.")


def _alike(edges: tuple[int, ...], image: tuple[int, int]) -> bool:
    """Whether edges have the proportions of those of the image, each rounded to a whole number."""
    return abs(edges[0] * image[1] - edges[1] * image[0]) < max(image)


def pool(found: np.ndarray, how: str) -> np.ndarray:
    """What is given for one image -> [1, dim] float32."""
    x = found.astype(np.float32)
    if how == "cls":
        return x[:, 0]
    if how == "vector":
        return x.reshape(1, -1)
    return np.asarray(x.mean(axis=AVERAGED[how]))


def _names(values: Any) -> str:
    return ", ".join(str(value.name)[:60] for value in list(values)[:5]) or "none"


def _shape(dims: Any) -> str:
    return " x ".join("any" if dim is None else str(dim) for dim in dims)
