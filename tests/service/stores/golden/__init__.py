"""Stores as programs of different times wrote them, kept for ever: whatever comes, they are read.

    python -m tests.service.stores.golden NAME REDIS    writes NAME.sqlite3 and, from an empty Redis, NAME.json

`1` is of commit 0dce4a2, before there were versions; `2` of 0400e8d, with versions, images and remembered values; `2b`
of 529dc47, with heads of a byte a weight and records that are differences to others; `3` of the first that has this
folder; `4` of the first whose histories tell what versions are. What a program lacked is not in its files. Uses nothing
but what all of them have.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from models.head import Affine, Head
from service.stores import Record

FOLDER = Path(__file__).parent
KEY = b"a key of golden files"
LONG = 3_000_000_000  # seconds: nothing ends
DIM = 16
TENANT = "golden"


def head(seed: int) -> Head:
    values = np.random.default_rng(seed)
    weight = values.normal(size=(3, DIM)).astype(np.float32)
    bias = values.normal(size=3).astype(np.float32)
    return Head(Affine(weight, bias), ("a", "b é✓", "c"), (2, 2, 2), "ridge", "sha256:a", (0.5, 1.5))


def record(seed: int, *, shots: int = 2, images: bool = False) -> Record:
    """Of three classes; of a seed, more shots begin with those of fewer in each class."""
    classes = np.repeat(np.arange(3), shots).astype(np.int32)
    rows = [np.random.default_rng([seed, label]).normal(size=(shots, DIM)) for label in range(3)]
    ids = [f"ex_{seed}_{label}_{shot:03}" for label in range(3) for shot in range(shots)]
    more: dict[str, Any] = {"images": tuple(b"\xff\xd8" + name.encode() for name in (*ids, "u"))} if images else {}
    return Record(
        artifact="sha256:a",
        method="ridge",
        labels=("a", "b é✓", "c"),
        ids=(*ids, f"ex_{seed}_u"),
        classes=classes,
        features=np.concatenate(rows).astype(np.float16),
        unlabelled=np.random.default_rng([seed, 9]).normal(size=(1, DIM)).astype(np.float16),
        created=1_700_000_000.25 + seed,
        **more,
    )


# What is written, in this order: task, record, id of the head. Of each the program keeps what it can.
CHANGES: list[tuple[str, Record, int]] = [
    ("plain", record(1), 1),
    ("changed", record(2), 2),
    ("changed", record(3), 3),
    ("changed", record(4), 4),
    ("grown", record(5, shots=50), 5),
    ("grown", record(5, shots=51), 6),
    ("grown", record(5, shots=52), 7),
]
RETAINED = ("retained", 8)
REMEMBERED = ("changed", "key", b"an answer")


async def filled(store: Any) -> None:
    scope = store.scope(TENANT)
    changes = list(CHANGES)
    if "images" in inspect.signature(Record).parameters:
        changes.append((RETAINED[0], record(RETAINED[1], images=True), RETAINED[1]))
    for task, given, seed in changes:
        await scope.commit(task, given, f"hd_{seed}", head(seed), expect=None)
    if hasattr(scope, "remember"):
        task, key, value = REMEMBERED
        await scope.remember(task, key, value, ttl_s=LONG)


async def write(name: str, redis_url: str) -> None:
    from service.stores.redis import RedisStore
    from service.stores.sqlite import SqliteStore

    with tempfile.TemporaryDirectory() as folder:
        own = SqliteStore(Path(folder), key=KEY, head_ttl_s=LONG)
        await own.open()
        await filled(own)
        await own.close()
        (FOLDER / f"{name}.sqlite3").unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(Path(folder) / "fewshot.sqlite3", isolation_level=None)) as db:
            db.execute("VACUUM INTO ?", (str(FOLDER / f"{name}.sqlite3"),))
    shared = RedisStore(redis_url, key=KEY, head_ttl_s=LONG, timeout_s=5)
    await shared.open()
    await filled(shared)
    await shared.close()
    import redis

    with contextlib.closing(redis.Redis.from_url(redis_url)) as client:
        values: dict[str, Any] = {}
        for key in sorted(client.keys("fs:*")):
            value: Any = client.zrange(key, 0, -1) if client.type(key) == b"zset" else client.get(key)
            values[key.decode()] = [m.decode() for m in value] if isinstance(value, list) else value.hex()
    (FOLDER / f"{name}.json").write_text(json.dumps(values, indent=0) + "\n")
