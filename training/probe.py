"""What an artifact is tried on at every start: drawn, not of anyone's images, for an artifact is passed on."""

from __future__ import annotations

import numpy as np

COUNT = 8
CELLS = (3, 12, 48)  # of the patterns that a picture is the mean of, coarse and fine
LETTERS = b"abcdefghijklmnopqrstuvwxyz     .,"


def drawn(shape: tuple[int, ...], *, seed: int = 0) -> np.ndarray:
    """uint8 [8, H, W, C]: patterns with structure at several scales; or texts [8, length], zeros behind their ends."""
    rng = np.random.default_rng(seed)
    if len(shape) == 1:
        texts = rng.choice(np.frombuffer(LETTERS, np.uint8), (COUNT, *shape))
        ends = rng.integers(max(1, shape[0] // 4), shape[0] + 1, COUNT)
        return np.where(np.arange(shape[0]) < ends[:, None], texts, 0).astype(np.uint8)
    height, width, channels = shape
    pictures = np.zeros((COUNT, *shape))
    for cells in CELLS:
        coarse = rng.integers(0, 256, (COUNT, cells, cells, channels))
        rows, columns = (np.arange(side) * cells // side for side in (height, width))
        pictures += coarse[:, rows][:, :, columns] / len(CELLS)
    return pictures.astype(np.uint8)
