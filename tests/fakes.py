"""Stand-ins for the slow parts: an extractor of three numbers, broken ones, and images drawn on the spot."""

from __future__ import annotations

import dataclasses
import io
import threading
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from models.artifact import ARRAYS, Artifact, Manifest
from models.calibration import Rejection, Temperature
from models.head import Affine, Head

DIM = 3


class MeanColour:
    """Features are the mean colour, centred and of unit length."""

    dim = DIM

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.batches.append(len(batch))
        mean = batch.reshape(len(batch), -1, 3).mean(axis=1) / 255 - 0.5
        return (mean / (np.linalg.norm(mean, axis=1, keepdims=True) + 1e-6)).astype(np.float32)


class Failing(MeanColour):
    """Raises while `broken` is true."""

    def __init__(self, broken: bool = True) -> None:
        super().__init__()
        self.broken = broken

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        if self.broken:
            raise RuntimeError("secret: 0xdeadbeef")
        return super().__call__(batch)


class Gated(MeanColour):
    """Waits for `gate` before each batch, and says when it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.begun = threading.Event()

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.begun.set()
        assert self.gate.wait(10)
        return super().__call__(batch)


# Of MeanColour under the prototypes of `tiny_artifact`: an image that shows a class has an energy near 7.4, one that
# shows none of them 5.7 (indigo among red and blue) or less (black).
REJECTION = Rejection(
    location=(0.0, 0.0, 0.0, 1.0, 0.0),  # the mean energy of what was held out
    spread=(0.0, 0.0, 0.0, 0.0, 0.0),
    location_one_shot=(7.4, 0.0, 0.0, 0.0, 0.0),
    spread_one_shot=(0.0, 0.0, 0.0, 0.0, 0.0),
    quantiles=tuple(float(value) for value in np.linspace(-2, 1, 31)),
)


def tiny_artifact(folder: Path, *, name: str = "tiny", rejects: bool = False) -> Artifact:
    """An artifact for MeanColour: prototypes and ridge over three features. Its graph is never run.

    `rejects`: with prototypes, it can say that an image shows none of the classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"prototype/log_scale": 2.0, "ridge/log_scale": 2.0, "ridge/log_penalty": -1.0}
    save_file({key: np.array(value, np.float32) for key, value in numbers.items()}, folder / ARRAYS)
    manifest = Manifest(
        name=name,
        description="mean colour",
        dim=DIM,
        shape={},
        input={"kind": "image", "height": 16, "width": 16, "channels": 3},
        methods={"prototype": Temperature(), "ridge": Temperature()},
        default="prototype",
        training={},
        accuracy=(),
        int8=None,
        files={},
        rejections={"prototype": REJECTION} if rejects else {},
    )
    return Artifact(folder, manifest, f"sha256:{name}")


class Letters:
    """Features of a text: how often it has each letter, of unit length."""

    dim = 26

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        counts = np.stack([((batch | 0x20) == ord("a") + k).sum(axis=1) for k in range(self.dim)], axis=1) + 1e-3
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def tiny_text_artifact(folder: Path) -> Artifact:
    """An artifact for Letters, which reads the first 64 bytes of a text."""
    artifact = tiny_artifact(folder, name="letters")
    manifest = dataclasses.replace(artifact.manifest, dim=Letters.dim, input={"kind": "text", "length": 64})
    return dataclasses.replace(artifact, manifest=manifest)


def picture(colour: str, *, seed: int = 0, size: tuple[int, int] = (24, 24), format: str = "PNG") -> bytes:
    """An encoded image of one colour with a little noise; another seed gives other bytes."""
    base = np.asarray(Image.new("RGB", size, colour), np.int16)
    noise = np.random.default_rng(seed).integers(-20, 20, base.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(out, format)
    return out.getvalue()


def a_head(*, way: int = 2, artifact: str = "sha256:tiny", seed: int = 0) -> Head:
    rng = np.random.default_rng(seed)
    affine = Affine(rng.normal(size=(way, DIM)).astype(np.float32), rng.normal(size=way).astype(np.float32))
    return Head(affine, tuple(f"c{k}" for k in range(way)), (1,) * way, "prototype", artifact)
