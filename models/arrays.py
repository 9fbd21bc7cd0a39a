"""Maths that runs unchanged on numpy arrays and torch tensors, by the array API.

Rules that keep it so: no in-place writes, no fancy indexing, dtype and device taken from the inputs. Knows nothing of
tasks. Needs neither torch nor a device; `place` imports torch only when asked for one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

Array = Any  # a numpy array or a torch tensor


def one_hot(labels: Array, way: int, like: Array) -> Array:
    """[n] integers -> [n, way] of the dtype and on the device of `like`."""
    xp = array_namespace(like)
    classes = xp.arange(way, dtype=labels.dtype, device=device(labels))
    return xp.astype(labels[:, None] == classes[None, :], like.dtype)


def softmax(logits: Array) -> Array:
    """Along the last axis."""
    xp = array_namespace(logits)
    shifted = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return shifted / xp.sum(shifted, axis=-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    xp = array_namespace(x)
    return 0.5 + 0.5 * xp.tanh(0.5 * x)  # unlike exp, tanh overflows nowhere


def normalise(x: Array) -> Array:
    """To unit length along the last axis; a row of zeros stays one."""
    xp = array_namespace(x)
    # The constant stands inside the root, which has no gradient at zero.
    return x / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def square_sum(x: Array) -> Array:
    """Squared length along the last axis."""
    xp = array_namespace(x)
    return xp.sum(x * x, axis=-1)


def each_own(belongs: Array, values: Array) -> Array:
    """[n]: of values [way], that of the class of each row [n, way], or their sum by how much it belongs to each."""
    # A sum and not `belongs @ values`: on some CPUs OpenBLAS warns of an invalid value there where there is none.
    xp = array_namespace(belongs)
    return xp.sum(belongs * values[None, :], axis=1)


def class_means(features: Array, weights: Array) -> Array:
    """Weighted mean of [n, dim] per column of weights [n, way] -> [way, dim]."""
    xp = array_namespace(features)
    return (weights.T @ features) / xp.sum(weights, axis=0)[:, None]


def inverse(positive: Array) -> Array:
    """Of a symmetric positive definite matrix [n, n], by its Cholesky factor: a fifth of the time of a general one."""
    factor = _inverse_of_factor(positive)
    return factor.T @ factor


def _inverse_of_factor(positive: Array) -> Array:
    """The inverse of the Cholesky factor, by those of two blocks: mostly products of matrices, which are quick."""
    xp = array_namespace(positive)
    n = positive.shape[0]
    if n <= 64:
        return xp.linalg.inv(xp.linalg.cholesky(positive))
    half = n // 2
    first = _inverse_of_factor(positive[:half, :half])
    below = positive[half:, :half] @ first.T  # of the factor itself
    last = _inverse_of_factor(positive[half:, half:] - below @ below.T)
    zeros = xp.zeros((half, n - half), dtype=positive.dtype, device=device(positive))
    lower = xp.concat([-(last @ (below @ first)), last], axis=1)
    return xp.concat([xp.concat([first, zeros], axis=1), lower], axis=0)


def place(value: np.ndarray, where: str) -> Array:
    """A numpy array as it is for "cpu", else a torch tensor on that device ("torch-cpu": torch on the CPU)."""
    if where == "cpu":
        return value
    import torch

    return torch.from_numpy(np.ascontiguousarray(value)).to(where.removeprefix("torch-"))


def fetch(value: Array) -> np.ndarray:
    """A numpy copy of an array of either kind."""
    if isinstance(value, np.ndarray):
        return value
    return np.asarray(value.detach().cpu().numpy())
