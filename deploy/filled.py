"""A store filled by its own `commit` with tasks of random features, for deploy/many.py: how, and what it takes.

While it is filled it need not sync; what it writes is the same. Knows nothing of the service that is asked afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from models.artifact import Artifact  # noqa: E402
from models.head import Head  # noqa: E402
from service.settings import Settings  # noqa: E402
from service.stores import Record, Store  # noqa: E402
from service.stores.opening import open_store  # noqa: E402
from service.support import Limits, Row, Rows, learn, record_id, record_of  # noqa: E402
from service.web.access import TENANT  # noqa: E402

GIB = 2**30
TEMPLATES = 200  # tasks that are learned; the others have their numbers under other names
DURABLE = 200  # commits that are timed with every sync
AT_ONCE = 32  # commits on their way while a store is filled


def templates(artifact: Artifact, *, way: int, shots: int) -> list[tuple[Record, Head]]:
    """Records as a support set gives them, and the heads that are learned from them."""
    manifest, rng = artifact.manifest, np.random.default_rng(1)
    method = manifest.default
    learner = artifact.learners()[method]
    found = []
    for _ in range(TEMPLATES):
        rows = Rows()
        for label in range(way):
            features = rng.normal(size=manifest.dim) + rng.normal(size=(shots, manifest.dim))
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            for feature in features.astype(np.float16):
                rows.labelled[f"class {label}", f"ex_{rng.bytes(16).hex()}"] = Row(feature)
        record = record_of(rows, artifact=artifact.digest, method=method, dim=manifest.dim, limits=Limits(10_000))
        head = learn(record, learner, manifest.methods[method], manifest.rejections.get(method), device="cpu").head
        found.append((record, head))
    return found


def name_of(number: int) -> str:
    return f"task-{number:07}"


class Filled:
    """Fills a store and keeps what was measured meanwhile."""

    def __init__(self, store: Store, made: list[tuple[Record, Head]], tasks: int):
        self.store = store
        self.scope = store.scope(TENANT)
        self.made = made
        self.tasks = tasks
        self.rng = np.random.default_rng(2)
        self.heads: list[str] = []

    async def commit(self, number: int) -> None:
        record, head = self.made[number % len(self.made)]
        ids = sorted(f"ex_{self.rng.bytes(16).hex()}" for _ in record.ids)
        record = dataclasses.replace(record, ids=tuple(ids))
        self.heads.append(record_id(record))
        await self.scope.commit(name_of(number), record, self.heads[-1], head, expect=0)

    async def durably(self) -> float:
        """Milliseconds of a commit, one after the other, as the service does it."""
        start = time.perf_counter()
        for number in range(DURABLE):
            await self.commit(number)
        return 1e3 * (time.perf_counter() - start) / DURABLE

    async def fill(self, until: int) -> float:
        """Seconds to write all tasks up to that number, without syncs."""
        numbers = iter(range(len(self.heads), until))

        async def writer() -> None:
            for number in numbers:
                await self.commit(number)

        start = time.perf_counter()
        await asyncio.gather(*(writer() for _ in range(AT_ONCE)))
        return time.perf_counter() - start


class RedisBeneath:
    name = "redis"

    def __init__(self, folder: Path):
        program = shutil.which("redis-server")
        if program is None:
            raise SystemExit("redis-server is not installed.")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.folder = folder
        # The log is not written anew meanwhile: that costs a core and as much disk again whenever it has doubled.
        self.command = [
            program,
            *("--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--logfile", str(folder / "redis.log")),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"),
        ]
        self.address = port
        self.settings: dict[str, Any] = {"redis_url": f"redis://127.0.0.1:{port}/0"}
        self.start()

    def start(self) -> float:
        """Seconds until it answers, with all it holds."""
        start = time.perf_counter()
        self.process = subprocess.Popen(self.command)
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.address), timeout=5) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(100).startswith(b"+PONG"):
                        return time.perf_counter() - start
            except OSError:
                pass
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    async def sync(self, store: Any, on: bool) -> None:
        await store.link.call(lambda client: client.config_set("appendfsync", "always" if on else "no"))

    async def sizes(self, store: Any) -> dict[str, float]:
        found = await store.link.call(lambda client: client.info("memory"))
        return {"memory": found["used_memory"], "disk": _below(self.folder)}

    async def parts(self, store: Any, head: str) -> dict[str, float]:
        """Bytes of each kind of value of one task, keys included."""
        names = {"pointer": "p:{}", "history": "v:{}", "record": "r:{}:1", "head": f"h:{head}"}
        keys = {kind: f"fs:{TENANT}:{form.format(name_of(0))}" for kind, form in names.items()}
        return {
            kind: await store.link.call(lambda client, key=key: client.memory_usage(key)) for kind, key in keys.items()
        }

    async def wipe(self, store: Any, heads: list[str]) -> None:
        for head in heads:
            await store.link.call(lambda client, head=head: client.delete(f"fs:{TENANT}:h:{head}"))


class SqliteBeneath:
    name = "sqlite"

    def __init__(self, folder: Path):
        self.folder = folder / "data"
        self.settings: dict[str, Any] = {"data_dir": self.folder}

    def stop(self) -> None:
        pass

    async def sync(self, store: Any, on: bool) -> None:
        await store.run(lambda db: db.execute(f"PRAGMA synchronous = {'FULL' if on else 'OFF'}"))

    async def sizes(self, store: Any) -> dict[str, float]:
        await store.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())
        return {"disk": _below(self.folder)}

    async def parts(self, store: Any, head: str) -> dict[str, float]:
        """Bytes of each kind of value of one task, without what SQLite needs around them."""
        columns = {"pointer": ("tasks", "pointer"), "history": ("tasks", "history"), "record": ("records", "record")}
        asked = {kind: (table, column, "task", name_of(0)) for kind, (table, column) in columns.items()}
        asked["head"] = ("heads", "value", "head", head)
        found = {}
        for kind, (table, column, key, value) in asked.items():
            query = f"SELECT length({column}) FROM {table} WHERE tenant = ? AND {key} = ?"  # noqa: S608
            row = await store.run(lambda db, query=query, value=value: db.execute(query, (TENANT, value)).fetchone())
            found[kind] = row[0]
        return found

    async def wipe(self, store: Any, heads: list[str]) -> None:
        forget = "DELETE FROM heads WHERE tenant = ? AND head = ?"
        await store.change(lambda db: db.executemany(forget, [(TENANT, head) for head in heads]).rowcount)


def _below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


async def fill(beneath: Any, artifact: Artifact, given: argparse.Namespace) -> dict[str, Any]:
    """Writes the tasks, and throws the heads of the last ones away. What was measured, and how many those are."""
    # Nobody waits for an answer here, and a machine may be busy.
    store = open_store(Settings(**beneath.settings, store_timeout_s=30)).beneath  # type: ignore[attr-defined]
    await store.open()
    filled = Filled(store, templates(artifact, way=given.way, shots=given.shots), given.tasks)
    commit_ms = await filled.durably()
    await beneath.sync(store, False)
    seconds, counts, sizes = 0.0, [], []
    for until in np.linspace(DURABLE, given.tasks, 6)[1:].astype(int):
        seconds += await filled.fill(int(until))
        counts.append(len(filled.heads))
        sizes.append(await beneath.sizes(store))
    await beneath.sync(store, True)
    slopes = {kind: float(np.polyfit(counts, [size[kind] for size in sizes], 1)[0]) for kind in sizes[0]}
    parts = await beneath.parts(store, filled.heads[0])
    wiped = min(3000, given.tasks // 4)
    await beneath.wipe(store, filled.heads[-wiped:])
    await store.close()
    return {
        "commit_ms": round(commit_ms, 2),
        "fill_s": round(seconds, 1),
        "fill_per_s": round((given.tasks - DURABLE) / seconds),
        "bytes": {kind: round(slope) for kind, slope in slopes.items()},
        "whole_gib": {kind: round(size / GIB, 3) for kind, size in sizes[-1].items()},
        "parts": parts,
        "wiped": wiped,
    }
