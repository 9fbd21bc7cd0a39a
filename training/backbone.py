"""A backbone that was trained elsewhere, as an ONNX graph of images to one vector each, and what it wants to be given.

Knows nothing of where the graph came from, of learners or of artifacts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from training.config import ImportConfig
from training.folders import DataError

MOST_BYTES = 1_500_000_000  # of weights: a graph with them inside must stay below the 2 GB that protobuf allows
MOST_TEXT = 1_000_000  # bytes of a configuration
MOST_PIXELS = 1024  # height or width
DIMS = (2, 4096)  # of the vector; the covariance that learners remember is its square
# Mean and deviation of ImageNet's colours, which most published backbones were trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Refused(DataError):
    """These weights cannot be made into an artifact; the message says why."""


def first_line(error: Exception) -> str:
    """What somebody else's library says, short enough to end a sentence."""
    return str(error).split("\n")[0][:200]


@dataclass(frozen=True, slots=True)
class Preparation:
    """What becomes of pixels: (pixel * factor - mean) / std, per channel, at some size."""

    factor: float = 1 / 255
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    size: tuple[int, int] | None = None  # height, width
    known: bool = False  # whether anybody said so, or this is an assumption

    def scale(self, channels: int) -> np.ndarray:
        return np.array([self.factor / value for value in _spread(self.std, channels)], np.float32)

    def shift(self, channels: int) -> np.ndarray:
        pairs = zip(_spread(self.mean, channels), _spread(self.std, channels), strict=True)
        return np.array([mean / std for mean, std in pairs], np.float32)


def _spread(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """As many as there are channels: one number is for all of them, and grey gets the mean of three."""
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


@dataclass(frozen=True, slots=True, eq=False)
class Backbone:
    name: str  # of the kind of network
    graph: onnx.ModelProto  # one image input, weights inside
    output: str
    # "vector" as it is, "cls" token of [n, t, dim], mean of "tokens" [n, t, dim], of "maps" [n, dim, h, w] or of
    # "maps.last" [n, h, w, dim]
    how: str
    height: int
    width: int
    channels: int
    first: bool  # channels first, [n, C, H, W]
    raw: bool  # wants uint8 pixels as they are
    preparation: Preparation
    reference: Callable[
        [np.ndarray], np.ndarray
    ]  # what `given` returns -> vectors [n, dim], as the source itself has it

    @property
    def pixels(self) -> tuple[int, int, int]:
        """Shape of one image."""
        return (self.height, self.width, self.channels)

    def given(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, C] -> what the source wants, worked out apart from the graph that it is checked by."""
        x = pixels
        if not self.raw:
            x = pixels.astype(np.float32) * self.preparation.scale(self.channels)
            x = x - self.preparation.shift(self.channels)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if self.first else x)


def text(file: Path) -> dict[str, Any]:
    """A configuration from a stranger: JSON of bounded length. Raises Refused."""
    try:
        if file.stat().st_size > MOST_TEXT:
            raise Refused(f"{file} has more than {MOST_TEXT} bytes; no configuration is that long.")
        found = json.loads(file.read_text("utf-8"))
    except OSError:
        raise Refused(f"{file} cannot be read.") from None
    except (ValueError, RecursionError):
        raise Refused(f"{file} is no JSON.") from None
    if not isinstance(found, dict):
        raise Refused(f"{file} is no JSON object.")
    return found


def preparation(folder: Path, config: ImportConfig) -> Preparation:
    """From the flags, else from preprocessor_config.json in the folder, else ImageNet's. Raises Refused."""
    file = folder / "preprocessor_config.json"
    said = text(file) if file.exists() else {}
    normalised = said.get("do_normalize", True) is not False  # the means stand there all the same
    wrong = f"{file} is not understood: "

    def numbers(name: str, flag: str, default: tuple[float, ...], least: float) -> tuple[float, ...]:
        values: Any = said.get(name, list(default)) if normalised else list(default)
        source, form = f"{wrong}{name}", "is no list of one or three numbers."
        if flag:
            source, form = f"--{name.removeprefix('image_')}", "is one number, or three with commas."
            try:
                values = [float(part) for part in flag.split(",")]
            except ValueError:
                raise Refused(f"{source} {form}") from None
        if not isinstance(values, list) or len(values) not in (1, 3) or not all(_finite(value) for value in values):
            raise Refused(f"{source} {form}")
        if min(values) < least:
            raise Refused(f"{source} holds {min(values):g}; at least {least:g} is needed.")
        return tuple(float(value) for value in values)

    factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) is not False else 1.0
    if not _finite(factor) or not 0 < factor <= 1:
        raise Refused(f"{wrong}rescale_factor is {factor!r:.40}.")
    size = _size(said)
    if size is not None and not all(8 <= edge <= MOST_PIXELS for edge in size):
        raise Refused(f"{wrong}its size {size[0]} x {size[1]} is not within 8 and {MOST_PIXELS}.")
    return Preparation(
        factor=float(factor),
        mean=numbers("image_mean", config.mean, IMAGENET[0] if normalised else (0.0,), -math.inf),
        std=numbers("image_std", config.std, IMAGENET[1] if normalised else (1.0,), 1e-6),
        size=(config.size, config.size) if config.size else size,
        known=bool(said or config.mean or config.std),
    )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _size(said: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width that the images end with: of the crop, where there is one."""
    cropped = said.get("crop_size") if said.get("do_center_crop", True) is not False else None
    size = cropped or said.get("size")
    if isinstance(size, dict):
        found = (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
    else:
        found = (size, size)
    if not all(isinstance(edge, int) and not isinstance(edge, bool) for edge in found):
        return None
    return found  # type: ignore[return-value]
