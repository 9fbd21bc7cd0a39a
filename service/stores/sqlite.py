"""The embedded store: one SQLite file for one process. What is acknowledged is on disk (WAL, synchronous=FULL).

Writes go through one connection in one thread of its own, so they queue and never meet. Reads go through a few others,
and wait for no writer; the pointer of a task is read on the event loop. Knows nothing of learners, nor of other
processes: its folder is locked against them, so a pointer that was read stays true until this process moves it, and is
read once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar
from weakref import WeakValueDictionary

from models.errors import StoreUnavailable
from models.head import Head
from service.callers import CallerLeft, has_left
from service.stores import (
    CLAIM_S,
    MOST_REMEMBERED,
    Expected,
    Pointer,
    Record,
    SealBroken,
    Sealer,
    StoreMisconfigured,
    folder,
    sql,
)
from service.stores.record import Base, RecentRecords
from service.stores.sealed import Sealed, ends, next_version

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_POINTERS = 100_000  # in memory; some 300 bytes each
READERS = 4
CLEAR_S = 60  # between two looks for what expired
TRY_S = 5  # between two tries to write of who asks for our health, while writes fail


def write_something(db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA user_version = {sql.FORMAT}")  # written though it is the same


def unavailable(error: sqlite3.Error) -> StoreUnavailable:
    log.warning("SQLite failed: %s", error)  # its messages name no values
    return StoreUnavailable("The store cannot read or write its file.")


@contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """What is read within is as it was at one moment."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


class SqliteStore:
    name = "sqlite"
    sealer: Sealer
    reader: sqlite3.Connection  # of the event loop
    _writer: sqlite3.Connection
    _worker: ThreadPoolExecutor
    _readers: ThreadPoolExecutor
    _free: SimpleQueue[sqlite3.Connection]  # of the readers, one for each
    _file: tuple[int, int]  # device and inode
    _clearing: asyncio.Task[None] | None = None

    def __init__(
        self,
        data_dir: Path,
        *,
        key: bytes | None = None,
        head_ttl_s: float = 7 * 24 * 3600,
        versions_kept: int = 10,
    ):
        self.head_ttl_s = head_ttl_s
        self.versions_kept = versions_kept
        self._dir = data_dir
        self._path = (data_dir / "fewshot.sqlite3").absolute()
        self._key = key
        self._held = ExitStack()
        self._unclean = True  # the log may hold bytes of what was deleted
        self._refused = False  # the last write failed
        self._try_again = -math.inf
        self.recent = RecentRecords()
        # By tenant: of one only one record is read at a time, so that large ones leave readers to the others.
        self.turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # By tenant and task, with its end. Used on the event loop only.
        self.pointers: dict[tuple[str, str], tuple[Pointer, float]] = {}

    async def open(self) -> None:
        """Raises StoreMisconfigured when the folder cannot be used."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        try:
            await asyncio.get_running_loop().run_in_executor(self._worker, self._prepare)
        except BaseException as error:
            await self.close()
            if isinstance(error, OSError | sqlite3.Error):
                raise StoreMisconfigured(f"The folder {self._dir} cannot be used as a store ({error}).") from error
            raise
        self._clearing = asyncio.create_task(self._clear_now_and_then())

    def _prepare(self) -> None:
        self._held.enter_context(folder.lock(self._dir))
        path, had_key = self._path, folder.has_key(self._dir)
        self.sealer = Sealer(self._key or folder.own_key(self._dir, new=not path.exists()))
        folder.make_private(path)
        db = self._writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._held.callback(db.close)
        if db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise StoreMisconfigured(f"The file system of {self._dir} does not let SQLite keep a write-ahead log.")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")  # what is deleted leaves no bytes behind
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            if had_key:
                log.warning("%s holds no store, though the key of one is there: a new one is begun.", path)
            db.executescript(sql.SCHEMA)
            db.execute("INSERT INTO seal VALUES (?)", (self.sealer.seal(b"", "store"),))
            db.execute(f"PRAGMA user_version = {sql.FORMAT}")
            db.execute("COMMIT")
        elif version not in (1, 2, sql.FORMAT):
            raise StoreMisconfigured(f"{path} has format {version}; this program reads format {sql.FORMAT}.")
        try:
            self.sealer.open(*db.execute("SELECT value FROM seal").fetchone(), "store")
        except SealBroken:
            # With another key every task would look damaged, and its owner would be asked to replace it.
            raise StoreMisconfigured(f"{path} was sealed with another key.") from None
        if version in (1, 2):
            log.info("%s has format %d and is brought to format %d.", path, version, sql.FORMAT)
            db.executescript(sql.MIGRATION if version == 1 else f"PRAGMA user_version = {sql.FORMAT}")
        for suffix in ("", "-wal", "-shm"):
            folder.keep_private(path.with_name(path.name + suffix))
        at = path.stat()
        self._file = at.st_dev, at.st_ino
        try:
            self._clear(db)
        except sqlite3.Error as error:  # a full disk is no reason not to answer
            unavailable(error)
        self.reader = self._connect_reader()
        self._free = SimpleQueue()
        for _ in range(READERS):
            self._free.put(self._connect_reader())

    def _connect_reader(self) -> sqlite3.Connection:
        uri = f"{self._path.as_uri()}?mode=ro"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        self._held.callback(db.close)
        db.execute("SELECT 1 FROM seal").fetchone()  # it has all files in hand from now on
        return db

    async def close(self) -> None:
        if self._clearing is not None and not self._clearing.done():
            self._clearing.cancel()
            await asyncio.wait((self._clearing,))
        await asyncio.to_thread(self._readers.shutdown)
        await asyncio.to_thread(self._worker.shutdown)  # what waits in its queue is written first
        self._held.close()

    async def ping(self) -> bool:
        with suppress(sqlite3.Error, StoreUnavailable):
            if not self._is_same_file() or self.reader.execute("SELECT 1 FROM seal").fetchone() is None:
                return False
            if self._refused and time.monotonic() >= self._try_again:
                self._try_again = time.monotonic() + TRY_S
                await self.run(lambda db: self._changed(db, write_something, always=True))
            return not self._refused
        return False

    def _is_same_file(self) -> bool:
        """Whether the file lies where it was opened: what is written to another one nobody finds again."""
        try:
            at = os.stat(self._path)
        except OSError:
            return False
        return (at.st_dev, at.st_ino) == self._file

    async def _clear_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(CLEAR_S)
            with suppress(StoreUnavailable):  # another time
                await self.run(self._clear)

    def _clear(self, db: sqlite3.Connection) -> None:
        """Deletes what expired. Where nothing did, nothing is written."""
        if db.execute(sql.ANY_EXPIRED, {"now": time.time()}).fetchone() == (1,):
            self._changed(db, lambda db: self.expire(db, *sql.EXPIRED))
        if self._unclean:
            self.checkpoint(db)

    def expire(self, db: sqlite3.Connection, *statements: str) -> None:
        """In a transaction; its bytes leave the log as well before long."""
        now, before = time.time(), db.total_changes
        for statement in statements:
            db.execute(statement, {"now": now, "claims": now + CLAIM_S})
        if db.total_changes > before:
            self._unclean = True

    def checkpoint(self, db: sqlite3.Connection) -> None:
        """Clears the bytes of what was deleted from the log; where somebody still reads there, another time."""
        self._unclean = True
        busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._unclean = bool(busy)

    def scope(self, tenant: str) -> SqliteScope:
        return SqliteScope(self, tenant)

    async def run(self, work: Callable[[sqlite3.Connection], T], *, moves: tuple[str, str] | None = None) -> T:
        """Does work in the writer's thread; to its end, even when the caller leaves. `moves`: tenant and task."""

        def safely() -> T:
            try:
                return work(self._writer)
            except sqlite3.Error as error:
                raise unavailable(error) from error

        done = asyncio.get_running_loop().run_in_executor(self._worker, safely)
        if moves is not None:
            # Before anybody can be told, and whether or not it went well. A reader may still find the earlier pointer
            # while the work goes on, and remember it: that is forgotten here, too.
            done.add_done_callback(lambda _: self.pointers.pop(moves, None))
        return await asyncio.shield(done)

    async def change(self, work: Callable[[sqlite3.Connection], T], *, moves: tuple[str, str] | None = None) -> T:
        """Does work as one transaction."""
        return await self.run(lambda db: self._changed(db, work), moves=moves)

    def _changed(self, db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T], *, always: bool = False) -> T:
        """The same in the writer's thread. `always`: the work writes, whether or not it changes rows."""
        if not self._is_same_file():
            log.warning("%s was removed or replaced: nothing is written any more.", self._path)
            raise StoreUnavailable(
                "The file of the store was removed or replaced; bring it back, or restart the service."
            )
        before = db.total_changes
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                result = work(db)
                db.execute("COMMIT")
            finally:
                # After some errors SQLite has rolled back by itself; where it has not, nothing could begin again.
                if db.in_transaction:
                    db.execute("ROLLBACK")
        except sqlite3.Error:
            self._refused = True
            raise
        if always or db.total_changes > before:  # to write nothing succeeds on a full disk, too
            self._refused = False
        return result

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Does work that only reads, in some thread. It sees all that was acknowledged before.

        Raises CallerLeft when its turn comes and nobody waits for it any more.
        """
        left = has_left.get()

        def safely() -> T:
            if left():
                raise CallerLeft
            db = self._free.get()
            try:
                return work(db)
            except sqlite3.Error as error:
                raise unavailable(error) from error
            finally:
                self._free.put(db)

        return await asyncio.get_running_loop().run_in_executor(self._readers, safely)


class SqliteScope:
    def __init__(self, store: SqliteStore, tenant: str):
        self._store = store
        self.tenant = tenant

    @cached_property
    def _sealed(self) -> Sealed:
        # A scope may be made before the store, and its key, are opened.
        return Sealed(self._store.sealer, self.tenant, self._store.recent)

    def _now(self, name: str) -> tuple[str, str, float]:
        return self.tenant, name, time.time()

    async def pointer(self, task: str) -> Pointer | None:
        # On the event loop on purpose: every classify comes here. In WAL mode a reader waits for nobody, and one row
        # by its primary key takes a few microseconds, much less than the way to another thread and back. But it lets
        # go of the interpreter, and under load it is a while until the loop gets it back: so it is read once.
        pointers = self._store.pointers
        pointer, expires = pointers.get((self.tenant, task), (None, 0.0))
        if pointer is not None and expires > time.time():
            return pointer
        try:
            row = self._store.reader.execute(sql.POINTER, self._now(task)).fetchone()
        except sqlite3.Error as error:
            raise unavailable(error) from error
        if row is None:
            return None
        pointer = self._sealed.open_pointer(task, row[0])
        if len(pointers) >= MOST_POINTERS:
            pointers.clear()
        pointers[self.tenant, task] = pointer, math.inf if row[1] is None else row[1]
        return pointer

    async def record(self, task: str, *, version: int | None = None) -> tuple[Pointer, Record] | None:
        def work(db: sqlite3.Connection) -> tuple[Pointer, Record] | None:
            before = None
            while True:
                with snapshot(db):  # no longer than it takes: it holds up who clears the log
                    row = db.execute(sql.PLACE, self._now(task)).fetchone()
                    if row is None:
                        return None
                    at = self._sealed.at(task, version, pointer=row[1], history=row[2])
                    data = None if at is None else self._data(db, task, at.version)
                if at is None or data is None:
                    if version is None:
                        raise SealBroken("The task has no record.")
                    return None
                record = self._sealed.open_record(task, at.version, data=data)
                if isinstance(record, Base):
                    base = self._data(db, task, record.version)
                    record = self._sealed.open_record(task, at.version, data=data, base=base)
                if isinstance(record, Record):
                    if not self._is_kept(db, task, at):  # by now; then it stays in memory no longer, either
                        self._sealed.forget(task)
                    return at, record
                if row == before:
                    raise SealBroken("The base of the record is gone.")
                before = row  # the task may have moved meanwhile, and taken the base with it

        async with self._store.turns.setdefault(self.tenant, asyncio.Lock()):
            return await self._store.read(work)

    def _is_kept(self, db: sqlite3.Connection, task: str, at: Pointer) -> bool:
        row = db.execute(sql.PLACE, self._now(task)).fetchone()
        return row is not None and self._sealed.at(task, at.version, pointer=row[1], history=row[2]) == at

    def _data(self, db: sqlite3.Connection, task: str, version: int) -> bytes | None:
        row = db.execute(sql.RECORD, (self.tenant, task, version)).fetchone()
        return None if row is None else row[0]

    async def versions(self, task: str) -> list[Pointer]:
        row = await self._store.read(lambda db: db.execute(sql.PLACE, self._now(task)).fetchone())
        return [] if row is None else self._sealed.versions(task, pointer=row[1], history=row[2])

    def head_in_memory(self, head_id: str) -> Head | None:
        return None

    async def head(self, head_id: str) -> Head | None:
        row = await self._store.read(lambda db: db.execute(sql.HEAD, self._now(head_id)).fetchone())
        return None if row is None else self._sealed.open_head(head_id, row[0])

    async def keep_head(self, task: str, pointer: Pointer, head: Head) -> None:
        def work(db: sqlite3.Connection) -> None:
            row = db.execute(sql.POINTER, self._now(task)).fetchone()
            if row is not None and self._sealed.open_pointer(task, row[0]) == pointer:
                self._put_head(db, pointer.head, head=head, expires=row[1])

        with suppress(SealBroken):
            await self._store.change(work)

    def _put_head(self, db: sqlite3.Connection, head_id: str, *, head: Head, expires: float | None) -> None:
        tenant, _, now = self._now(head_id)
        value = self._sealed.seal_head(head_id, head)
        until = ends(self._store.head_ttl_s, expires, now=now)
        db.execute("REPLACE INTO heads VALUES (?, ?, ?, ?)", (tenant, head_id, until, value))

    async def commit(
        self, task: str, record: Record, head_id: str, head: Head | None, *, expect: Expected, instead: bool = False
    ) -> Pointer:
        def work(db: sqlite3.Connection) -> Pointer:
            tenant, _, now = self._now(task)
            self._store.expire(db, *sql.EXPIRED)
            # The version has a column of its own, so a damaged pointer does not lose the count.
            row = db.execute(sql.PLACE, (tenant, task, now)).fetchone()
            if row is None:
                db.execute(sql.EARLIER, (tenant, task, now + CLAIM_S))
            current, at, known = row or (0, None, None)
            before = self._sealed.history(task, current, pointer=at, history=known)
            if before.versions and before.base is None:
                before = self._sealed.with_base(task, before, self._data(db, task, current))
            pointer = Pointer(next_version(current, before, expect), head_id)
            base = before.base
            stored = self._data(db, task, base.version) if base and self._sealed.wants(base) else None
            value, base = self._sealed.seal_record(task, pointer.version, record=record, base=base, stored=stored)
            most = self._store.versions_kept
            history = before.then(pointer, base, expires=record.expires, most=most, instead=instead)
            sealed = self._sealed.seal_pointer(task, pointer), self._sealed.seal_history(task, history)
            db.execute(sql.PUT_TASK, (tenant, task, pointer.version, record.expires, *sealed))
            db.execute(sql.UNNEEDED, (tenant, task, json.dumps(sorted(history.records))))
            db.execute("REPLACE INTO records VALUES (?, ?, ?, ?)", (tenant, task, pointer.version, value))
            for dropped in before.dropped(history):  # should another task share it, it is made again
                db.execute(sql.DROP_HEAD, (tenant, dropped))
            if head is not None:
                self._put_head(db, head_id, head=head, expires=record.expires)
            return pointer

        return await self._store.change(work, moves=(self.tenant, task))

    async def delete(self, task: str, *, expect: Expected = None) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            row = db.execute(sql.PLACE, self._now(task)).fetchone()
            current, at, known = row or (0, None, None)
            history = self._sealed.history(task, current, pointer=at, history=known)
            if row is not None:
                next_version(current, history, expect)
            for version in history.versions:
                # Should another task share this head, it is made again.
                db.execute(sql.DROP_HEAD, (self.tenant, version.head))
            self._sealed.forget(task)
            for table in ("tasks", "records", "remembered"):
                db.execute(f"DELETE FROM {table} WHERE tenant = ? AND task = ?", (self.tenant, task))  # noqa: S608
            return row is not None

        found = await self._store.change(work, moves=(self.tenant, task))
        self._sealed.forget(task)  # once more: a reader may have read it just before
        with suppress(StoreUnavailable):  # deleted it is; this only clears its bytes from the log as well
            await self._store.run(self._store.checkpoint)
        return found

    async def full(self, most: int) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            (count,) = db.execute(sql.COUNT, (self.tenant, time.time(), most)).fetchone()
            return bool(count >= most)

        return await self._store.read(work)

    async def tasks(self, *, limit: int, after: str = "") -> list[tuple[str, Pointer]]:
        def work(db: sqlite3.Connection) -> list[tuple[str, Pointer]]:
            found: list[tuple[str, Pointer]] = []
            for task, data in db.execute(sql.TASKS, self._now(after)):
                if len(found) == limit:
                    break
                pointer = self._sealed.list_pointer(task, data)
                if pointer is not None:
                    found.append((task, pointer))
            return found

        return await self._store.read(work)

    async def remember(self, task: str, key: str, value: bytes, *, ttl_s: float, new: bool = False) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            now = time.time()
            self._store.expire(db, sql.FORGOTTEN)
            if new and self._recall(db, task, key) is not None:
                return False
            sealed = self._sealed.seal_remembered(task, key, value=value)
            db.execute("REPLACE INTO remembered VALUES (?, ?, ?, ?, ?)", (self.tenant, task, key, now + ttl_s, sealed))
            db.execute(sql.TOO_MANY, (self.tenant, task, MOST_REMEMBERED))
            return True

        return await self._store.change(work)

    async def recall(self, task: str, key: str) -> bytes | None:
        return await self._store.read(lambda db: self._recall(db, task, key))

    def _recall(self, db: sqlite3.Connection, task: str, key: str) -> bytes | None:
        row = db.execute(sql.REMEMBERED, (self.tenant, task, key, time.time())).fetchone()
        return self._sealed.open_remembered(task, key, data=row and row[0])

    async def forget_remembered(self, task: str, key: str) -> None:
        forget = "DELETE FROM remembered WHERE tenant = ? AND task = ? AND key = ?"
        await self._store.change(lambda db: db.execute(forget, (self.tenant, task, key)))
