"""Heads and records to store, and how to tell that they came back as they were."""

from __future__ import annotations

import dataclasses

import numpy as np

from models.head import Affine, Head
from service.stores import Expected, Record, Scope

DIM = 16


def make_head(seed: int = 0, *, way: int = 3) -> Head:
    values = np.random.default_rng(seed)
    weight = values.normal(size=(way, DIM)).astype(np.float32)
    labels = tuple(f"label {k} é✓" for k in range(way))
    return Head(Affine(weight, values.normal(size=way).astype(np.float32)), labels, (2,) * way, "ridge", "sha256:a")


def make_record(seed: int = 0, *, way: int = 3, expires: float | None = None, images: bool = False) -> Record:
    values = np.random.default_rng(seed)
    return Record(
        artifact="sha256:a",
        method="ridge",
        labels=tuple(f"label {k} é✓" for k in range(way)),
        ids=tuple(f"ex_{seed}_{i}" for i in range(2 * way + 1)),
        classes=np.repeat(np.arange(way), 2).astype(np.int32),
        features=values.normal(size=(2 * way, DIM)).astype(np.float16),
        unlabelled=values.normal(size=(1, DIM)).astype(np.float16),
        created=1_700_000_000.25 + seed,
        expires=expires,
        images=tuple(values.bytes(100 * i) for i in range(2 * way + 1)) if images else (),
    )


def same(left: Record | Head | None, right: Record | Head | None) -> bool:
    """Equal to the last bit, types and shapes included."""
    if left is None or right is None or type(left) is not type(right):
        return False
    return all(_same(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left))


def _same(left: object, right: object) -> bool:
    if isinstance(left, Affine) and isinstance(right, Affine):
        return all(_same(one, other) for one, other in zip(left, right, strict=True))
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return left == right


async def commit(
    scope: Scope,
    task: str,
    seed: int = 0,
    *,
    expect: Expected = None,
    expires: float | None = None,
    instead: bool = False,
) -> int:
    """Puts the record and head of a seed there, the head under the id "hd_{seed}"; returns the version."""
    record = make_record(seed, expires=expires)
    pointer = await scope.commit(task, record, f"hd_{seed}", make_head(seed), expect=expect, instead=instead)
    assert pointer.head == f"hd_{seed}"
    return pointer.version
