"""Every store, opened on the loop of its test; and what lies beneath it, to be damaged."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol

import pytest
import redis

from service.stores import Store
from service.stores.lru import Recent
from service.stores.memory import MemoryStore, Name
from service.stores.redis import MARK, RedisStore
from service.stores.sqlite import SqliteStore
from tests.redis_server import RedisServer

KEY = b"a key for tests only"
STORES = ["memory", "sqlite", pytest.param("redis", marks=pytest.mark.redis)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """For tests that harm nobody: one server for all of them."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """For tests that kill or stop it."""
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Store]:
    """Makes the store of a name, not yet opened; the same one each time."""

    def of(name: str) -> Store:
        if name.startswith("recent-"):
            return Recent(of(name.removeprefix("recent-")), most=100, stale_ok_s=60)
        if name == "sqlite":
            return SqliteStore(tmp_path, key=KEY)
        if name == "redis":
            server = request.getfixturevalue("shared_redis")
            with contextlib.closing(redis.Redis(port=server.port)) as client:
                client.flushall()
            return RedisStore(
                server.url, key=KEY, timeout_s=5
            )  # the machine may be busy; faults have tests of their own
        return MemoryStore(key=KEY)

    return of


@pytest.fixture(params=[*STORES, "recent-memory", "recent-sqlite"])
async def store(request: pytest.FixtureRequest, make: Callable[[str], Store]) -> AsyncIterator[Store]:
    """Each store in turn."""
    made = make(request.param)
    await made.open()
    yield made
    await made.close()


@pytest.fixture(params=STORES)
async def bare(request: pytest.FixtureRequest, make: Callable[[str], Store]) -> AsyncIterator[Store]:
    """Each store that keeps bytes."""
    made = make(request.param)
    await made.open()
    yield made
    await made.close()


Until = Callable[[Store, float], Awaitable[None]]


@pytest.fixture
def until(monkeypatch: pytest.MonkeyPatch) -> Until:
    """Lets a moment pass: Redis has a clock of its own, so there by waiting; elsewhere by setting the clock."""

    async def passed(store: Store, moment: float) -> None:
        if store.name != "redis":
            monkeypatch.setattr(time, "time", lambda: moment + 0.001)
            return
        # What is to end then is told to Redis as a time from now, and by when Redis hears it, it is later.
        while time.time() <= moment + 0.1:
            await asyncio.sleep(0.02)

    return passed


class Beneath(Protocol):
    """The bytes of a store, by kind (pointer, history, record, head, remembered), tenant and name.

    The name is that of the task, or of the head. Of records it is the newest one, unless a version is named; of
    remembered values there may be only one beside the task.
    """

    def get(self, kind: str, tenant: str, *, name: str, version: int | None = None) -> bytes: ...

    def set(self, kind: str, tenant: str, *, name: str, data: bytes, version: int | None = None) -> None: ...

    def left(self) -> int:
        """How many values there are of all kinds and tenants."""
        ...


@pytest.fixture
def beneath(bare: Store, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Beneath]:
    if isinstance(bare, MemoryStore):
        yield BeneathMemory(bare)
    elif isinstance(bare, SqliteStore):
        with contextlib.closing(sqlite3.connect(tmp_path / "fewshot.sqlite3", isolation_level=None)) as db:
            yield BeneathSqlite(db, bare)
    else:
        with contextlib.closing(redis.Redis(port=request.getfixturevalue("shared_redis").port)) as client:
            yield BeneathRedis(client)


class BeneathMemory:
    def __init__(self, store: MemoryStore):
        self._values = store.values

    def _place(self, kind: str, tenant: str, name: str, version: int | None) -> tuple[str, str, Name]:
        if kind not in ("record", "remembered"):
            return tenant, kind, name
        keys = [key for key in self._values if key[:2] == (tenant, kind) and key[2][0] == name]
        return max(key for key in keys if version in (None, key[2][1]))

    def get(self, kind: str, tenant: str, *, name: str, version: int | None = None) -> bytes:
        return self._values[self._place(kind, tenant, name, version)][0]

    def set(self, kind: str, tenant: str, *, name: str, data: bytes, version: int | None = None) -> None:
        place = self._place(kind, tenant, name, version)
        self._values[place] = data, self._values[place][1]

    def left(self) -> int:
        return len(self._values)


class BeneathSqlite:
    WHERE: ClassVar = {
        "pointer": ("pointer", "tasks", "task"),
        "history": ("history", "tasks", "task"),
        "record": ("record", "records", "task"),
        "head": ("value", "heads", "head"),
        "remembered": ("value", "remembered", "task"),
    }

    def __init__(self, db: sqlite3.Connection, store: SqliteStore):
        self._db = db
        self._store = store

    def _row(self, kind: str, tenant: str, name: str, version: int | None) -> tuple[int, bytes]:
        column, table, of = self.WHERE[kind]
        query = f"SELECT rowid, {column} FROM {table} WHERE tenant = ? AND {of} = ?"
        if version is not None:
            query += f" AND version = {version}"
        if kind == "record":
            query += " ORDER BY version DESC"
        return self._db.execute(query, (tenant, name)).fetchone()

    def get(self, kind: str, tenant: str, *, name: str, version: int | None = None) -> bytes:
        return bytes(self._row(kind, tenant, name, version)[1])

    def set(self, kind: str, tenant: str, *, name: str, data: bytes, version: int | None = None) -> None:
        column, table, _ = self.WHERE[kind]
        row = self._row(kind, tenant, name, version)[0]
        self._db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (data, row))
        self._store.places.clear()  # of a file that is its own a store reads this once, and writes it

    def left(self) -> int:
        tables = {table for _, table, _ in self.WHERE.values()}
        return sum(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)


class BeneathRedis:
    LETTERS: ClassVar = {"pointer": "p", "history": "v", "record": "r", "head": "h", "remembered": "m"}

    def __init__(self, client: redis.Redis):
        self._client = client

    def _key(self, kind: str, tenant: str, name: str, version: int | None) -> bytes:
        key = f"fs:{tenant}:{self.LETTERS[kind]}:{name}"
        if kind not in ("record", "remembered"):
            return key.encode()
        keys = self._client.keys(f"{key}:{'*' if version is None else version}")
        return max(keys, key=lambda key: int(key.split(b":")[-1], 16))

    def get(self, kind: str, tenant: str, *, name: str, version: int | None = None) -> bytes:
        return self._client.get(self._key(kind, tenant, name, version))

    def set(self, kind: str, tenant: str, *, name: str, data: bytes, version: int | None = None) -> None:
        self._client.set(self._key(kind, tenant, name, version), data, keepttl=True)

    def left(self) -> int:
        return self._client.dbsize() - self._client.exists(MARK)
