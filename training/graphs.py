"""The graph of an extractor, and its weights in one file that torch and onnxruntime both read.

Weights are rounded to half precision once, and everything that is measured is measured after that. The graph reads
them as ONNX external data that points into the safetensors file, with a Cast behind each, which onnxruntime folds away
when it loads. Knows nothing of learners, data or manifests.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from models.resnet import ImageExtractor, fold
from training.inputs import Network


def rounded(extractor: Network) -> Network:
    """Batch normalisation folded in where there is some, and every weight rounded to half precision."""
    if isinstance(extractor, ImageExtractor):
        fold(extractor.backbone)
    extractor.load_state_dict({name: value.half().float() for name, value in extractor.state_dict().items()})
    return extractor.eval()


def graph(extractor: Network, shape: tuple[int, ...], *, name: str = "images") -> onnx.ModelProto:
    """uint8 `name` [n, *shape] -> float32 "features" [n, dim], any n."""
    return exported(extractor, torch.zeros(2, *shape, dtype=torch.uint8), name, "features")


def exported(module: nn.Module, example: Tensor, given: str, found: str) -> onnx.ModelProto:
    """The graph of a module of one tensor to one tensor, for batches of any size."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            input_names=[given],
            output_names=[found],
            verbose=False,
        )
    proto: onnx.ModelProto = program.model_proto
    for node in proto.graph.node:  # where in the source a node came from is nobody's business
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return proto


def share_weights(proto: onnx.ModelProto, weights: Path) -> onnx.ModelProto:
    """The same graph with every weight that the safetensors file beside it holds read from there."""
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
        kind = {"F16": onnx.TensorProto.FLOAT16, "F32": onnx.TensorProto.FLOAT}[entry["dtype"]]
        read = onnx.TensorProto(name=tensor.name, data_type=kind, dims=tensor.dims)
        read.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", weights.name), ("offset", 8 + length + begin), ("length", end - begin)):
            read.external_data.add(key=key, value=str(value))
        if kind != tensor.data_type:
            read.name += ".half"
            casts.append(onnx.helper.make_node("Cast", [read.name], [tensor.name], to=tensor.data_type))
        kept.append(read)
    nodes = [*casts, *shared.graph.node]
    for field, values in (("initializer", kept), ("node", nodes)):
        shared.graph.ClearField(field)
        getattr(shared.graph, field).extend(values)
    return shared
