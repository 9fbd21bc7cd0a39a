"""Rows of a support set by what they show: those of one thing are held out together, and worked on together.

`things` [n] numbers them; rows of one number are of one class. Where every row shows something of its own, what is said
here is leave-one-out. Knows nothing of learners, nor of how things are told apart (models/twins.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from array_api_compat import array_namespace, device

from models.arrays import Array


def by_thing(things: np.ndarray, call: Callable[..., Array], *values: Array) -> Array:
    """`call` of each thing, [n, ...]: it gets of each of `values` [n, ...] the rows [m, size, ...] of m things of one
    size, and gives rows [m, size, ...] for them."""
    xp, where = array_namespace(*values), device(values[0])
    if _each_its_own(things):
        return call(*(xp.reshape(value, (len(things), 1, *value.shape[1:])) for value in values))[:, 0]
    _, number, sizes = np.unique(things, return_inverse=True, return_counts=True)
    order = np.lexsort((number, sizes[number]))  # small things first, the rows of each side by side

    def rows_of(value: Array, size: int) -> Array:
        rows = xp.take(value, xp.asarray(order[sizes[number[order]] == size], device=where), axis=0)
        return xp.reshape(rows, (-1, size, *rows.shape[1:]))

    found = [call(*(rows_of(value, int(size)) for value in values)) for size in np.unique(sizes)]
    flat = xp.concat([xp.reshape(rows, (-1, *rows.shape[2:])) for rows in found], axis=0)
    return xp.take(flat, xp.asarray(np.argsort(order), device=where), axis=0)


def sums(things: np.ndarray, values: Array) -> Array:
    """[n, dim] -> of each row the sum over the rows of its thing."""
    xp = array_namespace(values)

    def summed(rows: Array) -> Array:
        return xp.broadcast_to(xp.sum(rows, axis=1, keepdims=True), rows.shape)

    return values if _each_its_own(things) else by_thing(things, summed, values)


def _each_its_own(things: np.ndarray) -> bool:
    return bool(np.bincount(things).max() == 1)
