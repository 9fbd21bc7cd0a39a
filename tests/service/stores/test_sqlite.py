"""The embedded store: what a restart, a kill and a reader beside a writer find."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import StoreUnavailable, VersionConflict
from service.stores import Pointer, Record, Scope
from service.stores.sqlite import SqliteStore
from tests.service.stores.files import holding, reading_held_up
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


async def test_where_a_task_is_after_a_change_is_not_read_again(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope, reader = store.scope("t"), store.reader
    assert await commit(scope, "cats", 1) == 1
    ends = time.time() + 0.6
    await scope.commit("dogs", make_record(2, expires=ends), "hd_2", make_head(2), expect=None)
    store.reader = sqlite3.connect(":memory:")  # whoever asks it for a task fails
    assert await scope.pointer("cats") == Pointer(1, "hd_1")
    assert await scope.pointer("dogs") == Pointer(1, "hd_2")
    with pytest.raises(VersionConflict):
        await commit(scope, "cats", 3, expect=0)
    with pytest.raises(StoreUnavailable):  # of a change that failed nothing is known
        await scope.pointer("cats")
    store.reader.close()
    store.reader = reader
    assert await scope.pointer("cats") == Pointer(1, "hd_1")
    await asyncio.sleep(max(0.0, ends - time.time()))
    assert await scope.pointer("dogs") is None
    await store.close()


async def test_what_ended_by_a_clock_that_went_back_since_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope, clock, ahead = store.scope("t"), time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])
    await scope.commit("cats", make_record(1, expires=clock() + 3600), "hd_1", make_head(1), expect=None)
    assert await scope.pointer("cats") == Pointer(1, "hd_1")
    ahead[0] = 86_400.0
    await commit(scope, "dogs", 2)  # which clears away what ended
    ahead[0] = 0.0
    assert await scope.pointer("cats") is None
    await scope.commit("birds", make_record(3, expires=clock() + 3600), "hd_3", make_head(3), expect=None)
    assert await scope.pointer("birds") == Pointer(1, "hd_3")
    await store.close()


async def test_of_changes_that_come_at_once_the_last_one_tells_where_a_task_is(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope = store.scope("t")
    for seed in range(20):
        changes = [commit(scope, "cats", seed), commit(scope, "cats", 100 + seed), scope.delete("cats")]
        await asyncio.gather(*(changes if seed % 2 else reversed(changes)))
        known = await scope.pointer("cats")
        store.places.clear()
        assert known == await scope.pointer("cats")
    assert not store._moving
    await store.close()


async def test_where_a_task_is_never_goes_back_while_it_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    scope, seen, moved = store.scope("t"), list[int](), store._moved

    def looked_at(*given: Any) -> None:
        """Each time that a change is noted, when all of them are written: what is in the file then, and in memory."""
        give_up = time.monotonic() + 10
        while store._worker._work_queue.qsize() or store.reader.execute("SELECT version FROM tasks").fetchone()[0] < 5:
            assert time.monotonic() < give_up
            time.sleep(0.001)
        moved(*given)
        place = store.places.get(("t", "cats"))
        seen.append(5 if place is None else place.pointer.version)  # 5: it is read there

    monkeypatch.setattr(store, "_moved", looked_at)
    await asyncio.gather(*(commit(scope, "cats", seed) for seed in range(5)))
    assert seen == [5] * 5
    assert await scope.pointer("cats") == Pointer(5, "hd_4")
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


# Reads beside writes.


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
