"""The extractor of an artifact on torch: for a GPU, and on a CPU to hold the two runtimes to each other.

On a GPU a network of this size is done sooner than its some hundred kernels are asked for one by one. So for each of a
few batch sizes they are recorded once, as a graph, and asked for together; a batch of another size is padded to the
next. Convolutions compute in bfloat16 there, unless float32 is asked for, and the features are made unit-length in
float32. Calls are made one at a time: a device has one queue, and whoever waits decodes meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models import bytenet, resnet
from models.artifact import WEIGHTS, Artifact
from models.errors import ArtifactInvalid

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # of batches that are recorded; a larger batch is cut
WARM_UP = 3  # runs before a recording, in which libraries choose their kernels


def has_cuda() -> bool:
    return torch.cuda.is_available()


def has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16 by its own instructions."""
    return has_cuda() and torch.cuda.get_device_capability() >= (8, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """A graph with the memory that it reads from and writes to: on the device, and pinned beside the host's."""

    graph: torch.cuda.CUDAGraph
    shown: Tensor
    features: Tensor
    host_shown: Tensor
    host_features: Tensor

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        n = len(batch)
        self.host_shown[:n].copy_(torch.from_numpy(batch))
        self.shown.copy_(self.host_shown, non_blocking=True)
        self.graph.replay()
        self.host_features.copy_(self.features, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return np.array(self.host_features[:n].numpy())


class TorchExtractor:
    """`precision`: float32, or bfloat16 for images on a GPU."""

    def __init__(self, artifact: Artifact, *, device: str = "cuda", precision: str = "float32"):
        if precision not in ("float32", "bfloat16"):
            raise ArtifactInvalid(f"{precision} is for a CPU: on a GPU FEWSHOT_PRECISION is float32 or bfloat16.")
        network = network_of(artifact)
        if precision == "bfloat16":
            halve(network)
        # torch's stub of Module.to leaves out memory_format.
        self._module = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self._recorded: dict[int, Recorded] = {}
        self.dim = artifact.manifest.dim
        self.precision = precision

    @torch.inference_mode()
    def __call__(self, batch: np.ndarray) -> np.ndarray:
        batch = np.ascontiguousarray(batch)
        with self._lock:
            if self._device.type != "cuda":
                return np.asarray(self._module(torch.from_numpy(batch)).float().numpy())
            with torch.cuda.device(self._device):
                parts = [features for part in _cut(batch) for features in self._features(part)]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _features(self, part: np.ndarray) -> list[np.ndarray]:
        """Of a part, in halves where the card has no memory for so many at once: others may use it as well."""
        try:
            return [self._graph(part)(part)]
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        torch.cuda.empty_cache()  # out of the block: the error holds what was made before it
        middle = len(part) // 2
        return [*self._features(part[:middle]), *self._features(part[middle:])]

    def _graph(self, part: np.ndarray) -> Recorded:
        """The recording of the smallest size that this batch fits in; made when it is first asked for."""
        size = next(size for size in SIZES if size >= len(part))
        if size not in self._recorded:
            self._recorded[size] = self._record((size, *part.shape[1:]), self._module)
        return self._recorded[size]

    def _record(self, shape: tuple[int, ...], network: Callable[[Tensor], Tensor]) -> Recorded:
        shown = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                network(shown)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, for learners: only this one's calls are recorded.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            features = network(shown).float()
        host_features = torch.empty(features.shape, pin_memory=True)
        return Recorded(graph, shown, features, torch.zeros(shape, dtype=torch.uint8, pin_memory=True), host_features)


def _cut(batch: np.ndarray) -> list[np.ndarray]:
    return [batch[at : at + SIZES[-1]] for at in range(0, len(batch), SIZES[-1])] or [batch]


def halve(network: nn.Module) -> None:
    """Its convolutions in bfloat16, in place, between an input that is scaled before and maps that are pooled after."""
    if not isinstance(network, resnet.ImageExtractor):
        return

    def lower(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (given[0].to(torch.bfloat16),)

    def lift(_: nn.Module, given: Any, maps: Tensor) -> Tensor:
        return maps.float()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(torch.bfloat16)
    network.backbone.conv.register_forward_pre_hook(lower)
    network.backbone.stages.register_forward_hook(lift)


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
