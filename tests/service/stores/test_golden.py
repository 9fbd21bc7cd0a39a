"""Stores that programs of different times wrote are read, and gone on with, by this one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis

from service.stores import Pointer, Record, Store
from service.stores.redis import RedisStore
from service.stores.sqlite import SqliteStore
from tests.redis_server import RedisServer
from tests.service.stores import golden
from tests.service.stores.values import same

pytestmark = pytest.mark.anyio
PROGRAMS = sorted(file.stem for file in golden.FOLDER.glob("*.sqlite3"))
WITHOUT_VERSIONS = {"1"}
OTHER_HEADS = {"1", "2"}  # of four bytes a weight: they count as gone, and are made again


def expected(program: str) -> dict[str, list[tuple[Record, int]]]:
    """Of each task what its versions were, the newest last."""
    changes = list(golden.CHANGES)
    if program not in WITHOUT_VERSIONS:
        task, seed = golden.RETAINED
        changes.append((task, golden.record(seed, images=True), seed))
    found: dict[str, list[tuple[Record, int]]] = {}
    for task, record, seed in changes:
        found.setdefault(task, []).append((record, seed))
    return found


@pytest.fixture(params=[pytest.param(f"{p}-redis", marks=pytest.mark.redis) for p in PROGRAMS] + PROGRAMS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: Store
    if request.param.endswith("-redis"):
        server: RedisServer = request.getfixturevalue("shared_redis")
        values = json.loads((golden.FOLDER / f"{request.param.removesuffix('-redis')}.json").read_text())
        with contextlib.closing(redis.Redis(port=server.port)) as client:
            client.flushall()
            for key, value in values.items():
                if isinstance(value, list):
                    client.zadd(key, dict.fromkeys(value, 0))
                else:
                    client.set(key, bytes.fromhex(value))
        made = RedisStore(server.url, key=golden.KEY, timeout_s=5)
    else:
        shutil.copy(golden.FOLDER / f"{request.param}.sqlite3", tmp_path / "fewshot.sqlite3")
        made = SqliteStore(tmp_path, key=golden.KEY)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def program(request: pytest.FixtureRequest, store: Store) -> str:
    return str(request.node.callspec.params["store"]).removesuffix("-redis")


def test_there_is_a_file_of_every_program_that_is_told_of() -> None:
    assert golden.__doc__ is not None
    assert [name for name in ("1", "2", "2b", "3", "4") if f"`{name}`" in golden.__doc__] == PROGRAMS
    assert sorted(file.stem for file in golden.FOLDER.glob("*.json")) == PROGRAMS


async def test_all_that_was_written_is_there(store: Store, program: str) -> None:
    scope = store.scope(golden.TENANT)
    tasks = expected(program)
    newest = {task: Pointer(len(changes), f"hd_{changes[-1][1]}") for task, changes in tasks.items()}
    assert dict(await scope.tasks(limit=100)) == newest
    for task, changes in tasks.items():
        assert await scope.pointer(task) == newest[task]
        kept = changes[-1:] if program in WITHOUT_VERSIONS else changes
        versions = range(len(changes), len(changes) - len(kept), -1)
        assert [at.version for at in await scope.versions(task)] == list(versions)
        told = [at.told and at.told[1:] for at in await scope.versions(task)]
        assert told == [("ridge", 3, len(changes[n - 1][0].classes)) if program >= "4" else None for n in versions]
        for version in versions:
            record, seed = changes[version - 1]
            found = await scope.record(task, version=version)
            assert found is not None
            assert found[0] == Pointer(version, f"hd_{seed}")
            assert same(found[1], record)
            head = await scope.head(f"hd_{seed}")
            assert head is None if program in OTHER_HEADS else same(head, golden.head(seed))
    task, key, value = golden.REMEMBERED
    assert await scope.recall(task, key) == (None if program in WITHOUT_VERSIONS else value)


async def test_it_is_gone_on_with(store: Store, program: str) -> None:
    scope = store.scope(golden.TENANT)
    for task, changes in expected(program).items():
        more = golden.record(5, shots=53) if task == "grown" else golden.record(20)
        at = await scope.commit(task, more, "hd_new", golden.head(20), expect=len(changes))
        assert at == Pointer(len(changes) + 1, "hd_new")
        found = await scope.record(task)
        assert found is not None
        assert same(found[1], more)
        before = await scope.record(task, version=len(changes))
        assert before is not None
        assert same(before[1], changes[-1][0])
    assert await scope.delete("changed") is True
    assert await scope.pointer("changed") is None
