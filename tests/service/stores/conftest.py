"""Every store, opened on the loop of its test; and what lies beneath it, to be damaged."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol

import pytest
import redis

from service.stores import Store
from service.stores.lru import Recent
from service.stores.memory import MemoryStore
from service.stores.redis import RedisStore
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


class Beneath(Protocol):
    """The bytes of a store, by kind (pointer, record, head), tenant and name."""

    def get(self, kind: str, tenant: str, *, name: str) -> bytes: ...

    def set(self, kind: str, tenant: str, *, name: str, data: bytes) -> None: ...


@pytest.fixture
def beneath(bare: Store, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Beneath]:
    if isinstance(bare, MemoryStore):
        yield BeneathMemory(bare)
    elif isinstance(bare, SqliteStore):
        with contextlib.closing(sqlite3.connect(tmp_path / "fewshot.sqlite3", isolation_level=None)) as db:
            yield BeneathSqlite(db)
    else:
        with contextlib.closing(redis.Redis(port=request.getfixturevalue("shared_redis").port)) as client:
            yield BeneathRedis(client)


class BeneathMemory:
    def __init__(self, store: MemoryStore):
        self._values = store.values

    def _place(self, kind: str, tenant: str, *, name: str) -> tuple[str, str, str | tuple[str, int]]:
        if kind != "record":
            return tenant, kind, name
        return next(key for key in self._values if key[:2] == (tenant, kind) and key[2][0] == name)

    def get(self, kind: str, tenant: str, *, name: str) -> bytes:
        return self._values[self._place(kind, tenant, name=name)][0]

    def set(self, kind: str, tenant: str, *, name: str, data: bytes) -> None:
        place = self._place(kind, tenant, name=name)
        self._values[place] = data, self._values[place][1]


class BeneathSqlite:
    WHERE: ClassVar = {
        "pointer": ("pointer", "tasks", "task"),
        "record": ("record", "tasks", "task"),
        "head": ("value", "heads", "head"),
    }

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def get(self, kind: str, tenant: str, *, name: str) -> bytes:
        column, table, of = self.WHERE[kind]
        row = self._db.execute(f"SELECT {column} FROM {table} WHERE tenant = ? AND {of} = ?", (tenant, name)).fetchone()
        return bytes(row[0])

    def set(self, kind: str, tenant: str, *, name: str, data: bytes) -> None:
        column, table, of = self.WHERE[kind]
        self._db.execute(f"UPDATE {table} SET {column} = ? WHERE tenant = ? AND {of} = ?", (data, tenant, name))


class BeneathRedis:
    def __init__(self, client: redis.Redis):
        self._client = client

    def _key(self, kind: str, tenant: str, *, name: str) -> bytes:
        (key,) = self._client.keys(f"fs:{tenant}:{kind[0]}:{name}" + (":*" if kind == "record" else ""))
        return key

    def get(self, kind: str, tenant: str, *, name: str) -> bytes:
        return self._client.get(self._key(kind, tenant, name=name))

    def set(self, kind: str, tenant: str, *, name: str, data: bytes) -> None:
        self._client.set(self._key(kind, tenant, name=name), data, keepttl=True)
