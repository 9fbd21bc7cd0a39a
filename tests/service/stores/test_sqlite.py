"""The embedded store: its folder, its durability, and disks that fail."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import StoreUnavailable
from service.callers import CallerLeft, has_left
from service.stores import Pointer, Record, Scope, Sealer, StoreMisconfigured, sqlite
from service.stores.record import RecentRecords
from service.stores.sealed import Sealed
from service.stores.sqlite import SqliteStore
from tests.service.stores.values import commit, make_head, make_record, same

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[3]


async def test_what_was_acknowledged_is_there_after_a_restart(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await commit(store.scope("t"), "cats", 1)
    await store.close()
    again = SqliteStore(tmp_path)
    await again.open()
    found = await again.scope("t").record("cats")
    assert found is not None
    assert same(found[1], make_record(1))
    assert same(await again.scope("t").head("hd_1"), make_head(1))
    await again.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from service.stores.sqlite import SqliteStore
from tests.service.stores.values import commit

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    for seed in range(100_000):
        print(await commit(store.scope("t"), "cats", seed), flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = 0
    while acknowledged < 30:
        acknowledged = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    acknowledged = max([acknowledged, *(int(line) for line in writer.stdout.read().split("\n")[:-1])])
    writer.wait()
    writer.stdout.close()
    store = SqliteStore(tmp_path)
    await store.open()
    found = await store.scope("t").record("cats")
    assert found is not None
    assert found[0].version in (acknowledged, acknowledged + 1)  # the last one may have been on its way
    versions = await store.scope("t").versions("cats")
    assert [known.version for known in versions] == [found[0].version - k for k in range(10)]
    for known in versions:
        earlier = await store.scope("t").record("cats", version=known.version)
        assert earlier is not None
        assert same(earlier[1], make_record(known.version - 1))
    assert same(found[1], make_record(found[0].version - 1))  # whole, not mixed
    assert same(await store.scope("t").head(found[0].head), make_head(found[0].version - 1))
    await store.close()


async def test_writes_are_flushed_before_they_are_acknowledged(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    assert await store.run(lambda db: db.execute("PRAGMA synchronous").fetchone()) == (2,)  # FULL
    assert await store.run(lambda db: db.execute("PRAGMA journal_mode").fetchone()) == ("wal",)
    await store.close()


async def test_a_second_process_is_kept_out_until_the_first_has_gone(tmp_path: Path) -> None:
    first, second = SqliteStore(tmp_path), SqliteStore(tmp_path)
    await first.open()
    with pytest.raises(StoreMisconfigured, match="Another process uses the folder"):
        await second.open()
    await commit(first.scope("t"), "cats")  # the first one is none the worse
    await first.close()
    await second.open()
    assert await second.scope("t").pointer("cats") == Pointer(1, "hd_0")
    await second.close()


async def test_the_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    for _ in range(2):
        store = SqliteStore(tmp_path)
        await store.open()
        await store.close()
    path = tmp_path / "store.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(bytes.fromhex(path.read_text())) == 32
    other = SqliteStore(tmp_path / "other")
    await other.open()
    await other.close()
    assert (tmp_path / "other" / "store.key").read_text() != path.read_text()


async def test_data_without_its_key_is_not_served(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await commit(store.scope("t"), "cats")
    await store.close()
    with pytest.raises(StoreMisconfigured, match="sealed with another key"):
        await SqliteStore(tmp_path, key=b"another key").open()
    key = (tmp_path / "store.key").read_bytes()
    (tmp_path / "store.key").unlink()
    with pytest.raises(StoreMisconfigured, match="is missing"):
        await SqliteStore(tmp_path).open()
    assert not (tmp_path / "store.key").exists()
    (tmp_path / "store.key").write_bytes(b"")
    with pytest.raises(StoreMisconfigured, match="holds no key"):
        await SqliteStore(tmp_path).open()
    given = SqliteStore(tmp_path, key=key)  # the same key from elsewhere
    await given.open()
    assert await given.scope("t").pointer("cats") == Pointer(1, "hd_0")
    await given.close()


async def test_a_file_of_another_format_is_left_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await store.run(lambda db: db.execute("PRAGMA user_version = 9"))
    await store.close()
    with pytest.raises(StoreMisconfigured, match="format 9"):
        await SqliteStore(tmp_path).open()


async def test_a_folder_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreMisconfigured, match="cannot be used"):
        await SqliteStore(tmp_path / "file").open()
    (tmp_path / "fewshot.sqlite3").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreMisconfigured, match="cannot be used"):
        await SqliteStore(tmp_path, key=b"k").open()


async def test_heads_expire_and_are_cleared_away(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path, head_ttl_s=0.1)
    await store.open()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    await asyncio.sleep(0.15)
    assert await scope.head("hd_1") is None
    assert await scope.record("cats") is not None
    await commit(scope, "dogs", 2)
    assert await store.run(lambda db: db.execute("SELECT head FROM heads").fetchall()) == [("hd_2",)]
    await store.close()


def holding(folder: Path, needle: bytes) -> list[str]:
    return [path.name for path in folder.iterdir() if needle in path.read_bytes()]


async def test_a_deleted_task_leaves_no_bytes(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    for seed in range(20):
        await commit(scope, "cats", seed)
    assert holding(tmp_path, b"label 1")
    for seed in range(10):  # of versions that are no longer kept, the heads are still there; they end by their TTL
        await store.change(lambda db, seed=seed: db.execute("DELETE FROM heads WHERE head = ?", (f"hd_{seed}",)))
    await scope.delete("cats")
    assert holding(tmp_path, b"label 1") == []
    await store.close()


async def test_a_caller_who_leaves_does_not_cut_a_commit(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    gate = threading.Event()
    busy = asyncio.create_task(store.run(lambda _: gate.wait(5)))  # the commit has to queue
    await asyncio.sleep(0.01)
    leaving = asyncio.create_task(commit(scope, "cats", 1))
    await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gate.set()
    await busy
    await store.run(lambda _: None)  # queues behind the commit
    found = await scope.record("cats")
    assert found is not None
    assert same(found[1], make_record(1))
    await store.close()


async def test_reading_a_pointer_waits_for_no_writer(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    gate, begun = threading.Event(), threading.Event()

    def slow(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM tasks")
        begun.set()
        gate.wait(5)
        raise StoreUnavailable("and then fails")

    writing = asyncio.create_task(store.change(slow))
    await asyncio.to_thread(begun.wait, 5)
    assert await scope.pointer("cats") == Pointer(1, "hd_1")
    gate.set()
    with pytest.raises(StoreUnavailable):
        await writing
    assert await commit(scope, "cats", 2) == 2  # the failed change was taken back
    await store.close()


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_full_disk_refuses_changes_keeps_reading_and_is_forgiven(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    acknowledged = 1
    with no_file_grows_beyond((tmp_path / "fewshot.sqlite3-wal").stat().st_size + 30_000):
        with suppress(StoreUnavailable):
            while acknowledged < 50:
                acknowledged = await commit(scope, "cats", acknowledged + 1)
        assert acknowledged < 50
        with pytest.raises(StoreUnavailable):
            await scope.keep_head("cats", Pointer(acknowledged, f"hd_{acknowledged}"), make_head(99))
        assert await scope.pointer("cats") == Pointer(acknowledged, f"hd_{acknowledged}")
        assert same(await scope.head(f"hd_{acknowledged}"), make_head(acknowledged))
    found = await scope.record("cats")
    assert found is not None
    assert same(found[1], make_record(acknowledged))
    assert await commit(scope, "cats", 60) == acknowledged + 1
    await store.close()


async def test_a_store_that_refuses_changes_is_not_well_until_it_can_write_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "TRY_S", 0)
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    with no_file_grows_beyond((tmp_path / "fewshot.sqlite3-wal").stat().st_size):
        assert await store.ping()  # nobody was refused yet
        with pytest.raises(StoreUnavailable):
            await commit(scope, "cats", 2)
        await store.change(lambda db: db.execute("DELETE FROM tasks WHERE task = 'nobody'"))  # needs no room
        assert not await store.ping()
        monkeypatch.setattr(sqlite, "TRY_S", 1000)
        assert not await store.ping()
        assert await scope.pointer("cats") == Pointer(1, "hd_1")
    assert not await store.ping()  # it was tried a moment ago
    store._try_again = 0
    assert await store.ping()
    with no_file_grows_beyond((tmp_path / "fewshot.sqlite3-wal").stat().st_size):
        with pytest.raises(StoreUnavailable):
            await commit(scope, "cats", 2)
        assert not await store.ping()
    assert await commit(scope, "cats", 2) == 2
    assert await store.ping()
    await store.close()


@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_into_a_file_that_was_removed_or_replaced_nothing_is_written(tmp_path: Path, how: str) -> None:
    path, aside = tmp_path / "fewshot.sqlite3", tmp_path / "aside"
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    path.rename(aside)
    if how == "replaced":
        shutil.copyfile(aside, path)
    for change in (commit(scope, "cats", 2), scope.delete("cats"), scope.remember("cats", "key", b"", ttl_s=60)):
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            await change
    assert not await store.ping()
    assert await scope.pointer("cats") == Pointer(1, "hd_1")
    aside.rename(path)
    assert await store.ping()
    assert await commit(scope, "cats", 2) == 2
    await store.close()


async def test_a_new_store_beside_the_key_of_another_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        store = SqliteStore(tmp_path)
        await store.open()
        await store.close()
    assert caplog.text == ""
    (tmp_path / "fewshot.sqlite3").unlink()
    await store.open()
    await store.close()
    assert "a new one is begun" in caplog.text


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob("fewshot.sqlite3*")}


async def test_its_files_are_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("fewshot.sqlite3", "fewshot.sqlite3-wal", "fewshot.sqlite3-shm")
    before = os.umask(0o022)
    try:
        store = SqliteStore(tmp_path)
        await store.open()
        await commit(store.scope("t"), "cats", 1)
        assert modes(tmp_path) == dict.fromkeys(files, 0o600)
        older = tmp_path / "older"
        older.mkdir()
        for name in (*files, "store.key"):  # as a program that was killed left them
            shutil.copyfile(tmp_path / name, older / name)
        await store.close()
        assert modes(older) == dict.fromkeys(files, 0o644)
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 12345)
            store = SqliteStore(older)  # not ours
            await store.open()
            assert modes(older) == dict.fromkeys(files, 0o644)
        await store.close()
        (older / "fewshot.sqlite3-wal").touch()
        await store.open()
        assert modes(older) == dict.fromkeys(files, 0o600)
        assert await store.scope("t").pointer("cats") == Pointer(1, "hd_1")
        await store.close()
    finally:
        os.umask(before)


async def test_a_damaged_file_is_a_store_that_is_away(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await store.run(lambda db: db.execute("DROP TABLE tasks"))
    with pytest.raises(StoreUnavailable):
        await store.scope("t").pointer("cats")
    with pytest.raises(StoreUnavailable):
        await commit(store.scope("t"), "cats")
    await store.close()


async def test_what_is_remembered_is_there_after_a_restart(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await store.scope("t").remember("cats", "key", b"value", ttl_s=60)
    await store.close()
    await store.open()
    assert await store.scope("t").recall("cats", "key") == b"value"
    await store.close()


async def test_expired_versions_and_memories_are_cleared_away(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2, expires=time.time() + 0.05)
    await scope.remember("cats", "key", b"value", ttl_s=0.05)
    await asyncio.sleep(0.1)
    await commit(scope, "dogs", 3)
    await scope.remember("dogs", "key", b"value", ttl_s=60)
    for table in ("tasks", "records", "remembered"):
        rows = await store.run(lambda db, table=table: db.execute(f"SELECT task FROM {table}").fetchall())
        assert rows == [("dogs",)]
    await store.close()


@pytest.mark.slow
async def test_what_expired_leaves_the_disk_though_nobody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "CLEAR_S", 0.05)
    store = SqliteStore(tmp_path)
    await store.open()
    scope, record = store.scope("t"), make_record(1, expires=time.time() + 0.6, images=True)
    await commit(scope, "cats", 2)
    await scope.commit("lease", record, "hd_1", make_head(1), expect=None)
    await scope.remember("lease", "key", b"value", ttl_s=86400)
    assert holding(tmp_path, record.images[5])
    async with asyncio.timeout(5):
        while holding(tmp_path, record.images[5]):
            await asyncio.sleep(0.02)
    for table, left in (("tasks", 1), ("records", 1), ("heads", 1), ("remembered", 0)):
        count = f"SELECT count(*) FROM {table}"
        assert await store.run(lambda db, count=count: db.execute(count).fetchone()) == (left,)
    done: list[str] = []
    await store.run(lambda db: db.set_trace_callback(done.append))
    await asyncio.sleep(0.2)
    await store.run(lambda db: db.set_trace_callback(None))
    assert done
    assert {statement.split()[0] for statement in done} == {"SELECT"}  # nothing expired, nothing is written
    await store.close()


async def test_what_expired_while_the_service_was_down_leaves_the_disk_as_it_comes_up(tmp_path: Path) -> None:
    store, record = SqliteStore(tmp_path), make_record(1, expires=time.time() + 0.1, images=True)
    await store.open()
    await store.scope("t").commit("lease", record, "hd_1", make_head(1), expect=None)
    await store.close()
    assert holding(tmp_path, record.images[5])
    await asyncio.sleep(0.15)
    await store.open()
    assert holding(tmp_path, record.images[5]) == []
    await store.close()


async def test_what_expired_and_was_deleted_by_a_commit_leaves_the_log_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "CLEAR_S", 1000)
    store, record = SqliteStore(tmp_path), make_record(1, expires=time.time() + 0.05, images=True)
    await store.open()
    scope = store.scope("t")
    await scope.commit("lease", record, "hd_1", make_head(1), expect=None)
    await asyncio.sleep(0.1)
    await commit(scope, "cats", 2)
    assert holding(tmp_path, record.images[5])
    await store.run(store._clear)  # as it does now and then
    assert holding(tmp_path, record.images[5]) == []
    await store.close()


async def test_a_full_disk_is_no_reason_not_to_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await commit(store.scope("t"), "cats", 1)
    end = time.time() + 1000
    for number in range(20):
        await commit(store.scope("t"), f"lease{number}", 2, expires=end)
    await store.close()
    monkeypatch.setattr(time, "time", lambda: end)
    with no_file_grows_beyond(2**15):  # as much as what readers share in memory is
        await store.open()
        assert "SQLite failed" in caplog.text
        assert same((await store.scope("t").record("cats") or (None, None))[1], make_record(1))
    assert await commit(store.scope("t"), "cats", 3) == 2
    assert await store.ping()
    await store.close()


# Reads beside writes.


@contextmanager
def reading_held_up(monkeypatch: pytest.MonkeyPatch, tenant: str) -> Iterator[tuple[threading.Event, list[str]]]:
    """Records of a tenant are parsed when the event is set; and which were begun."""
    gate, begun, opened = threading.Event(), list[str](), Sealed.open_record

    def held(self: Sealed, task: str, *given: Any, **named: Any) -> Any:
        if self._tenant == tenant:
            begun.append(task)
            assert gate.wait(10)
        return opened(self, task, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Sealed, "open_record", held)
        try:
            yield gate, begun
        finally:
            gate.set()


async def test_who_reads_large_records_keeps_nobody_else_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    large, other = store.scope("large"), store.scope("other")
    await commit(large, "cats", 1)
    with reading_held_up(monkeypatch, "large") as (gate, begun):
        reading = [asyncio.create_task(large.record("cats")) for _ in range(12)]
        async with asyncio.timeout(5):
            while not begun:
                await asyncio.sleep(0.01)
            assert await commit(other, "dogs", 2) == 1
            assert same((await other.record("dogs") or (None, None))[1], make_record(2))
            assert same(await other.head("hd_2"), make_head(2))
            assert await other.versions("dogs") == [Pointer(1, "hd_2")]
            assert await other.tasks(limit=5) == [("dogs", Pointer(1, "hd_2"))]
            assert await large.full(1)
            assert await large.recall("cats", "key") is None
            assert await other.delete("dogs")
        assert begun == ["cats"]
        gate.set()
        for found in await asyncio.gather(*reading):
            assert same((found or (None, None))[1], make_record(1))
    await store.close()


async def test_what_is_read_for_who_has_left_is_not_read_and_what_they_changed_is_changed(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    token = has_left.set(lambda: True)
    try:
        assert await commit(scope, "cats", 1) == 1
        assert await scope.remember("cats", "key", b"value", ttl_s=60, new=True) is True
        for read in (scope.record("cats"), scope.head("hd_1"), scope.versions("cats"), scope.recall("cats", "key")):
            with pytest.raises(CallerLeft):
                await read
    finally:
        has_left.reset(token)
    assert await scope.recall("cats", "key") == b"value"
    await store.close()


def grown(seed: int, more: int) -> Record:
    """A record that is worth a difference to the one with fewer."""
    whole = make_record(seed, way=80)
    last = whole.ids[-1:]
    return dataclasses.replace(
        whole,
        ids=(*whole.ids[:-1], *(f"more_{seed}_{k}" for k in range(more)), *last),
        classes=np.concatenate([whole.classes, np.zeros(more, np.int32)]),
        features=np.concatenate([whole.features, np.full((more, 16), seed, np.float16)]),
    )


@pytest.mark.slow
async def test_reads_beside_writes_find_each_version_whole(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path, versions_kept=2)
    await store.open()

    async def used(scope: Scope) -> None:
        kept: dict[str, Record] = {}
        done = asyncio.Event()

        async def write() -> None:
            for number in range(60):
                if number % 20 == 19:
                    await scope.delete("cats")
                head_id = f"hd_{number}"
                kept[head_id] = grown(number // 20, number % 20)
                pointer = await scope.commit("cats", kept[head_id], head_id, None, expect=None)
                found = await scope.record("cats")
                assert found is not None
                assert found[0] == pointer  # what was acknowledged is seen
                assert same(found[1], kept[head_id])
            done.set()

        async def read(version: int | None) -> int:
            count = 0
            while not done.is_set():
                found = await scope.record("cats", version=version)
                if found is not None:
                    count += 1
                    assert same(found[1], kept[found[0].head])
                await asyncio.sleep(0)
            return count

        _, *counts = await asyncio.gather(write(), read(None), read(3), read(12))
        assert all(counts)

    async with asyncio.timeout(60):
        await asyncio.gather(used(store.scope("t")), used(store.scope("u")))
    await store.close()


async def test_of_a_task_that_is_deleted_while_it_is_read_nothing_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await store.scope("t").commit("cats", grown(1, 0), "hd_1", make_head(1), expect=None)
    await store.close()
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    with reading_held_up(monkeypatch, "t") as (gate, begun):
        reading = asyncio.create_task(scope.record("cats"))
        async with asyncio.timeout(5):
            while not begun:
                await asyncio.sleep(0.01)
        assert await scope.delete("cats")
        gate.set()
        found = await reading
    assert same((found or (None, None))[1], grown(1, 0))  # as it was when it was asked for
    assert not store.recent._records
    await store.close()


# Files of format 1.

FORMAT_1 = """
CREATE TABLE tasks (tenant TEXT, task TEXT, version INTEGER NOT NULL, expires REAL, pointer BLOB NOT NULL,
                    record BLOB NOT NULL, PRIMARY KEY (tenant, task));
CREATE INDEX tasks_by_expiry ON tasks (expires) WHERE expires IS NOT NULL;
CREATE TABLE heads (tenant TEXT, head TEXT, expires REAL NOT NULL, value BLOB NOT NULL, PRIMARY KEY (tenant, head));
CREATE INDEX heads_by_expiry ON heads (expires);
CREATE TABLE seal (value BLOB NOT NULL);
PRAGMA user_version = 1;
"""
OLD_READ = "SELECT version, expires, pointer, record FROM tasks WHERE tenant = ? AND task = ?"
OLD_TASKS = {"cats": (7, None), "dogs": (3, 4e9), "gone": (1, 1.0)}


def sealed(store_key: bytes = b"key") -> Sealed:
    return Sealed(Sealer(store_key), "t", RecentRecords())


def old_file(folder: Path) -> Path:
    """A store as the program of format 1 left it, with one task that has no end, one that has, and one past it."""
    path = folder / "fewshot.sqlite3"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(FORMAT_1)
        db.execute("INSERT INTO seal VALUES (?)", (Sealer(b"key").seal(b"", "store"),))
        for task, (version, end) in OLD_TASKS.items():
            pointer = sealed().seal_pointer(task, Pointer(version, f"hd_{version}"))
            record, _ = sealed().seal_record(
                task, version, record=make_record(version, expires=end), base=None, stored=None
            )
            db.execute("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?)", ("t", task, version, end, pointer, record))
            head = sealed().seal_head(f"hd_{version}", make_head(version))
            db.execute("INSERT INTO heads VALUES (?, ?, ?, ?)", ("t", f"hd_{version}", 4e9, head))
    return path


def old_program_reads(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        for task, (version, end) in OLD_TASKS.items():
            row = db.execute(OLD_READ, ("t", task)).fetchone()
            assert row[:2] == (version, end)
            assert sealed().open_pointer(task, row[2]) == Pointer(version, f"hd_{version}")
            assert same(sealed().open_record(task, version, data=row[3]), make_record(version, expires=end))
        assert db.execute("SELECT count(*) FROM heads").fetchone() == (3,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return True


async def migrated(folder: Path) -> None:
    """Opens a file of format 1 and looks at all that was in it."""
    store = SqliteStore(folder, key=b"key")
    await store.open()
    scope = store.scope("t")
    assert await scope.tasks(limit=9) == [("cats", Pointer(7, "hd_7")), ("dogs", Pointer(3, "hd_3"))]
    for task, (version, end) in list(OLD_TASKS.items())[:2]:
        assert await scope.versions(task) == [Pointer(version, f"hd_{version}")]
        for asked in (None, version):
            found = await scope.record(task, version=asked)
            assert found is not None
            assert same(found[1], make_record(version, expires=end))
        assert same(await scope.head(f"hd_{version}"), make_head(version))
    assert await store.run(lambda db: db.execute("PRAGMA user_version").fetchone()) == (3,)
    assert await store.run(lambda db: db.execute("PRAGMA integrity_check").fetchone()) == ("ok",)
    await store.close()


async def test_a_file_of_format_1_is_brought_to_this_one_with_all_that_is_in_it(tmp_path: Path) -> None:
    assert old_program_reads(old_file(tmp_path))
    for _ in range(2):  # the second time there is nothing left to do
        await migrated(tmp_path)
    store, new = SqliteStore(tmp_path, key=b"key"), SqliteStore(tmp_path / "new")
    await store.open()
    await new.open()
    schema = "SELECT type, name, replace(sql, '\"', '') FROM sqlite_schema ORDER BY name"
    assert await store.run(lambda db: db.execute(schema).fetchall()) == await new.run(
        lambda db: db.execute(schema).fetchall()
    )
    await new.close()
    scope = store.scope("t")
    assert await commit(scope, "cats", 8, expect=7) == 8
    assert await scope.versions("cats") == [Pointer(8, "hd_8"), Pointer(7, "hd_7")]
    found = await scope.record("cats", version=7)
    assert found is not None
    assert same(found[1], make_record(7))
    assert await commit(scope, "gone", 9) == 1
    assert await scope.delete("dogs") is True
    await store.close()


async def test_a_file_of_format_2_is_brought_to_this_one_which_an_older_program_then_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tables are the same; but what is written from now on an older program could not read."""
    caplog.set_level("INFO")
    store = SqliteStore(tmp_path, key=b"key")
    await store.open()
    assert await commit(store.scope("t"), "cats", 1) == 1
    await store.run(lambda db: db.execute("PRAGMA user_version = 2"))
    await store.close()
    again = SqliteStore(tmp_path, key=b"key")
    await again.open()
    assert "has format 2 and is brought to format 3" in caplog.text
    assert await again.run(lambda db: db.execute("PRAGMA user_version").fetchone()) == (3,)
    assert same((await again.scope("t").record("cats") or (None, None))[1], make_record(1))
    await again.close()


async def test_a_file_of_format_1_is_left_alone_when_the_key_is_another(tmp_path: Path) -> None:
    path = old_file(tmp_path)
    with pytest.raises(StoreMisconfigured, match="another key"):
        await SqliteStore(tmp_path, key=b"another key").open()
    assert old_program_reads(path)


KILLED = """
import os, signal, sqlite3, sys
from service.stores.sql import MIGRATION

db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")  # so that much of it is in the log by then
db.create_function("killed", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
done, found, rest = MIGRATION.partition(sys.argv[2])
assert found
db.executescript(done + "SELECT killed();" + found + rest)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["INSERT INTO records", "DROP TABLE old", "COMMIT"])
async def test_a_migration_cut_by_kill_9_has_done_nothing(tmp_path: Path, before: str) -> None:
    path = old_file(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), before], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert old_program_reads(path)
    await migrated(tmp_path)


async def test_a_migration_for_which_the_disk_is_too_full_has_done_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = old_file(tmp_path)
    with no_file_grows_beyond(40_000), pytest.raises(StoreMisconfigured, match="cannot be used as a store"):
        await SqliteStore(tmp_path, key=b"key").open()
    assert "is brought to format 3" in caplog.text  # so far it came
    assert old_program_reads(path)
    await migrated(tmp_path)
