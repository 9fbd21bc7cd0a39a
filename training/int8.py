"""The int8 graph of an extractor, and what it loses. Knows nothing of how the float graph was made."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from models.artifact import Artifact
from models.extractor_onnx import OnnxExtractor
from models.learners.prototype import Prototype
from training import data, evaluate
from training.episodes import Pool, frozen
from training.intervals import interval


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: np.ndarray):
        self.parts: Iterator[np.ndarray] = iter(np.array_split(pixels, max(1, len(pixels) // 32)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self.parts, None)
        return None if part is None else {"images": part}


KINDS = ("Conv", "Add", "MaxPool")


def after_pool(proto: onnx.ModelProto) -> list[str]:
    """Nodes of our own networks that stay in float: pooling and normalisation of features."""
    pools = [index for index, node in enumerate(proto.graph.node) if node.op_type == "ReduceMean"]
    return [node.name for node in proto.graph.node][pools[0] :]


def quantise(
    proto: onnx.ModelProto, pixels: np.ndarray, out: Path, *, keep: Sequence[str], kinds: Sequence[str] = KINDS
) -> None:
    """Writes the int8 graph: unsigned activations and signed weights per channel, which fast CPU kernels want.

    Nodes of these kinds become int8, but for those named in `keep`. Ranges of activations are measured on the images
    and fixed: if they were read from each batch, the answer about an image would hang on those asked beside it.
    """
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
            op_types_to_quantize=list(kinds),
            nodes_to_exclude=list(keep),
        )


def int8_loss(artifact: Artifact, images: data.Images, *, episodes: int, seed: int) -> dict[str, float]:
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
        tasks = frozen(pool, way=way, shot=shot, queries=15, count=episodes, seed=seed)
        values = {precision: evaluate.run(learner, features[precision], tasks) for precision in features}
        paired = values["int8"] - values["float32"]
        found[f"loss_{way}w{shot}s"] = round(-100 * float(paired.mean()), 3)
        found[f"interval_{way}w{shot}s"] = round(100 * interval(paired), 3)
    return found
