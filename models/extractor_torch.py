"""The extractor of an artifact on torch: for a GPU, and on a CPU to hold the two runtimes to each other.

Calls are made one at a time: a device has one queue, and whoever waits decodes meanwhile.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from models import bytenet, resnet
from models.artifact import WEIGHTS, Artifact
from models.errors import ArtifactInvalid


def has_cuda() -> bool:
    return torch.cuda.is_available()


class TorchExtractor:
    def __init__(self, artifact: Artifact, *, device: str = "cuda"):
        # torch's stub of Module.to leaves out memory_format.
        self._module = network_of(artifact).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = device
        self._lock = threading.Lock()
        self.dim = artifact.manifest.dim
        self.precision = "float32"

    @torch.inference_mode()
    def __call__(self, batch: np.ndarray) -> np.ndarray:
        with self._lock:
            features = self._module(torch.from_numpy(np.ascontiguousarray(batch)).to(self._device))
            return np.asarray(features.float().cpu().numpy())


def network_of(artifact: Artifact) -> resnet.ImageExtractor | bytenet.TextExtractor:
    """The network that the manifest describes, in float32, as its weights were exported.

    Raises ArtifactInvalid where there is a graph only.
    """
    if not artifact.manifest.portable:
        raise ArtifactInvalid(
            f"The artifact {artifact.manifest.name!r} was imported: it is a graph that only onnxruntime runs, on "
            "a CPU (FEWSHOT_DEVICE=cpu)."
        )
    given = artifact.manifest.shape
    shape: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    module: resnet.ImageExtractor | bytenet.TextExtractor
    if artifact.kind == "text":
        module = bytenet.TextExtractor(bytenet.ByteNet(bytenet.Shape(**shape)))
    else:
        module = resnet.ImageExtractor(resnet.fold(resnet.ResNet(resnet.Shape(**shape))))
    weights = load_file(artifact.path / WEIGHTS)  # stored in half precision
    module.load_state_dict({name: value.float() for name, value in weights.items()})
    return module.eval()
