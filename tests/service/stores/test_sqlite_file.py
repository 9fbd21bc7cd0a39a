"""The file of the embedded store: its folder, its key, who may read it, and disks that fail."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from models.errors import StoreUnavailable
from service.callers import CallerLeft, has_left
from service.stores import Pointer, StoreMisconfigured, sqlite_file
from service.stores.sqlite import SqliteStore
from tests import flushed
from tests.service.stores.files import holding, no_file_grows_beyond, reading_held_up
from tests.service.stores.values import commit, make_head, make_record, same

pytestmark = pytest.mark.anyio


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


async def test_the_key_is_on_disk_before_anything_is_sealed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, store = flushed.noted(monkeypatch), SqliteStore(tmp_path)
    await store.open()
    await store.close()
    assert done == ["flush store.new", "name store.key", f"flush {tmp_path.name}"]


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
    for cut in (b"", key[:15], b" " * 64):
        (tmp_path / "store.key").write_bytes(cut)
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
    monkeypatch.setattr(sqlite_file, "TRY_S", 0)
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
        monkeypatch.setattr(sqlite_file, "TRY_S", 1000)
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


@pytest.mark.slow
async def test_what_expired_leaves_the_disk_though_nobody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "CLEAR_S", 0.05)
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
    monkeypatch.setattr(sqlite_file, "CLEAR_S", 1000)
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


async def test_a_disk_too_full_to_open_is_said_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await store.close()
    usage = namedtuple("usage", "total used free")
    for free, words in ((10_000, "the disk is full: free some space first"), (10**10, r"I/O error\)")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(10**11, 0, free))
        with no_file_grows_beyond(2**12), pytest.raises(StoreMisconfigured, match=words):
            await store.open()

    def full(_: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sqlite_file.folder, "lock", full)
    with pytest.raises(StoreMisconfigured, match="the disk is full"):
        await store.open()


async def test_photos_of_versions_that_are_not_kept_leave_the_log_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "CLEAR_S", 1000)
    store, record = SqliteStore(tmp_path, versions_kept=1), make_record(1, images=True)
    await store.open()
    scope = store.scope("t")
    await scope.commit("cats", record, "hd_1", make_head(1), expect=None)
    await store.run(store._clear)
    assert holding(tmp_path, record.images[5])
    await scope.commit("cats", make_record(2, images=True), "hd_2", make_head(2), expect=None)
    assert holding(tmp_path, record.images[5])
    await store.run(store._clear)  # as it does now and then
    assert holding(tmp_path, record.images[5]) == []
    await store.close()


async def test_what_is_forgotten_beside_a_task_leaves_the_log_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "CLEAR_S", 1000)
    monkeypatch.setattr("service.stores.sqlite.MOST_REMEMBERED", 1)
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    for key, value in (("old", b"an old answer"), ("key", b"the last answer")):
        await scope.remember("cats", key, value, ttl_s=60)
    await store.run(store._clear)
    assert holding(tmp_path, b"an old answer") == []
    await scope.forget_remembered("cats", "key")
    await store.run(store._clear)
    assert holding(tmp_path, b"the last answer") == []
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
