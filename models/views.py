"""Each image seen in several views, whose features are averaged: less of an answer hangs on how a picture was cut.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012, average over
crops and mirror images of a question in the same way. Here examples are seen so as well, so that both are compared in
the same manner. A mirror image is none of the same thing where left and right tell things apart: characters, arrows.
Knows nothing of tasks, files or decoding.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from models.extractor import Extractor

MOST = 3  # the whole image, its middle, the whole mirrored
MIDDLE = 0.7  # of each edge


def seen(extractor: Extractor, views: int) -> Extractor:
    """The extractor itself for one view, else one that looks at so many."""
    return extractor if views == 1 else Views(extractor, views)


class Views:
    """An extractor that looks at `views` views of each image, and takes so many times as long."""

    def __init__(self, extractor: Extractor, views: int):
        if not 1 <= views <= MOST:
            raise ValueError(f"views: {views} is not from 1 to {MOST}")
        self._extractor = extractor
        self._views = (_whole, _middle, _mirrored)[:views]

    @property
    def dim(self) -> int:
        return self._extractor.dim

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [n, height, width, channels] -> float32 features of unit length [n, dim]."""
        features = np.sum([self._extractor(view(batch)) for view in self._views], axis=0)
        unit: np.ndarray = features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-12)
        return unit.astype(np.float32)


def _whole(batch: np.ndarray) -> np.ndarray:
    return batch


def _middle(batch: np.ndarray) -> np.ndarray:
    """The middle of each image at the size of the whole."""
    height, width = batch.shape[1:3]
    x, y = width * (1 - MIDDLE) / 2, height * (1 - MIDDLE) / 2
    box = (x, y, width - x, height - y)
    found = np.empty_like(batch)
    for number, pixels in enumerate(batch):
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        resized = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        found[number] = np.asarray(resized).reshape(pixels.shape)
    return found


def _mirrored(batch: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(batch[:, :, ::-1])
