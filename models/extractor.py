"""What an extractor and a decoder are, and how to get the extractor of an artifact.

Knows nothing of batching or requests.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Protocol

import numpy as np

from models.errors import ArtifactInvalid

if TYPE_CHECKING:
    from models.artifact import Artifact


# Of NVIDIA's driver, its small boards, its Windows subsystem, and AMD's.
DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/nvhost-ctrl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")


class Decoder(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    def __call__(self, payload: bytes) -> np.ndarray:
        """One encoded example -> uint8 array of `shape`. Raises UndecodableExample or TooLarge."""
        ...


class Extractor(Protocol):
    """Safe to call from several threads at once."""

    @property
    def dim(self) -> int: ...

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [n, *shape] -> float32 features [n, dim]."""
        ...


def may_have_gpu() -> bool:
    """Whether there is a driver that torch could find a device by.

    Asked first, for to import torch only to hear that there is none takes a second and a hundred megabytes.
    """
    return sys.platform != "linux" or any(os.path.exists(driver) for driver in DRIVERS)


def best_device(artifact: Artifact | None = None) -> str:
    """ "cuda" where torch is installed and finds a device, and can run the artifact if one is given; else "cpu"."""
    if not may_have_gpu() or (artifact is not None and not artifact.manifest.portable):
        return "cpu"
    return "cuda" if cuda_works() else "cpu"


def cuda_works() -> bool:
    """Whether torch is installed and finds a device."""
    try:
        from models.extractor_torch import has_cuda
    except ImportError:
        return False
    return has_cuda()


def best_precision(artifact: Artifact) -> str:
    """What a GPU computes in where nothing else is asked for: bfloat16 for images, if it has instructions for it."""
    from models.extractor_torch import has_bfloat16

    return "bfloat16" if artifact.kind == "image" and has_bfloat16() else "float32"


def load_extractor(artifact: Artifact, *, device: str = "cpu", precision: str = "float32") -> Extractor:
    """onnxruntime on a CPU, torch on any other device ("torch-cpu" is torch on the CPU).

    Raises ArtifactInvalid when the artifact has no graph of that precision or cannot run on that device.
    """
    if device == "cpu":
        try:
            from models.extractor_onnx import OnnxExtractor
        except ImportError:
            raise ArtifactInvalid("On a CPU an artifact runs on onnxruntime, which is not installed here.") from None
        return OnnxExtractor(artifact, precision=precision)
    from models.extractor_torch import TorchExtractor

    return TorchExtractor(artifact, device=device.removeprefix("torch-"), precision=precision)
