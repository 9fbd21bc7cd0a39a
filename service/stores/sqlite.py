"""The embedded store: one SQLite file for one process. What is acknowledged is on disk (WAL, synchronous=FULL).

Writes go through one connection in one thread of its own, so they queue and never meet; the pointer of a task is read
on the event loop. Knows nothing of learners, nor of other processes: its folder is locked against them, so a pointer
that was read stays true until this process moves it, and is read once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from models.errors import StoreUnavailable
from models.head import Head
from service.stores import MOST_REMEMBERED, Expected, Pointer, Record, SealBroken, Sealer, StoreMisconfigured, folder
from service.stores.record import Base, RecentRecords
from service.stores.sealed import Sealed, ends, next_version

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 3  # PRAGMA user_version; the tables are those of 2, but a record may be a difference to another
MOST_POINTERS = 100_000  # in memory; some 300 bytes each
TASKS_TABLES = """
-- Records lie apart, so reading a pointer never touches the pages of a large one. A task without a history was written
-- in format 1.
CREATE TABLE tasks (tenant TEXT, task TEXT, version INTEGER NOT NULL, expires REAL, pointer BLOB NOT NULL,
                    history BLOB, PRIMARY KEY (tenant, task));
CREATE INDEX tasks_by_expiry ON tasks (expires) WHERE expires IS NOT NULL;
CREATE TABLE records (tenant TEXT, task TEXT, version INTEGER, record BLOB NOT NULL,
                      PRIMARY KEY (tenant, task, version));
CREATE TABLE remembered (tenant TEXT, task TEXT, key TEXT, expires REAL NOT NULL, value BLOB NOT NULL,
                         PRIMARY KEY (tenant, task, key));
CREATE INDEX remembered_by_expiry ON remembered (expires);
"""
SCHEMA = f"""
BEGIN;
{TASKS_TABLES}
CREATE TABLE heads (tenant TEXT, head TEXT, expires REAL NOT NULL, value BLOB NOT NULL, PRIMARY KEY (tenant, head));
CREATE INDEX heads_by_expiry ON heads (expires);
CREATE TABLE seal (value BLOB NOT NULL);
"""
# From format 1, which kept one record for each task, beside its pointer. Cut short anywhere, it has done nothing.
MIGRATION = f"""
BEGIN IMMEDIATE;
ALTER TABLE tasks RENAME TO old;
DROP INDEX tasks_by_expiry;
{TASKS_TABLES}
INSERT INTO tasks SELECT tenant, task, version, expires, pointer, NULL FROM old;
INSERT INTO records SELECT tenant, task, version, record FROM old;
DROP TABLE old;
PRAGMA user_version = 3;
COMMIT;
"""  # noqa: S608
# Sealed values are read as bytes whatever they are: text that is none would be an error of the whole statement.
POINTER = (
    "SELECT CAST(pointer AS BLOB), expires FROM tasks"
    " WHERE tenant = ? AND task = ? AND (expires IS NULL OR expires > ?)"
)
PLACE = (
    "SELECT version, CAST(pointer AS BLOB), CAST(history AS BLOB) FROM tasks"
    " WHERE tenant = ? AND task = ? AND (expires IS NULL OR expires > ?)"
)
RECORD = "SELECT CAST(record AS BLOB) FROM records WHERE tenant = ? AND task = ? AND version = ?"
UNNEEDED = "DELETE FROM records WHERE tenant = ? AND task = ? AND version NOT IN (SELECT value FROM json_each(?))"
TASKS = (
    "SELECT task, CAST(pointer AS BLOB) FROM tasks"
    " WHERE tenant = ? AND task > ? AND (expires IS NULL OR expires > ?) ORDER BY task"
)
COUNT = "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE tenant = ? AND (expires IS NULL OR expires > ?) LIMIT ?)"
PUT_TASK = "REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?)"
# An expired task leaves with its records; the statements go together, in this order.
EXPIRED = (
    "DELETE FROM records WHERE (tenant, task) IN (SELECT tenant, task FROM tasks WHERE expires <= ?)",
    "DELETE FROM tasks WHERE expires <= ?",
)
DROP_HEAD = "DELETE FROM heads WHERE tenant = ? AND head = ?"
HEAD = "SELECT CAST(value AS BLOB) FROM heads WHERE tenant = ? AND head = ? AND expires > ?"
REMEMBERED = "SELECT CAST(value AS BLOB) FROM remembered WHERE tenant = ? AND task = ? AND key = ? AND expires > ?"
# A row that is written anew gets a new rowid, so these go by age.
TOO_MANY = (
    "DELETE FROM remembered WHERE rowid IN"
    " (SELECT rowid FROM remembered WHERE tenant = ? AND task = ? ORDER BY rowid DESC LIMIT -1 OFFSET ?)"
)


def unavailable(error: sqlite3.Error) -> StoreUnavailable:
    log.warning("SQLite failed: %s", error)  # its messages name no values
    return StoreUnavailable("The store cannot read or write its file.")


class SqliteStore:
    name = "sqlite"
    sealer: Sealer
    reader: sqlite3.Connection
    _writer: sqlite3.Connection
    _worker: ThreadPoolExecutor

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
        self._key = key
        self._held = ExitStack()
        self.recent = RecentRecords()  # used in the writer's thread only
        # By tenant and task, with its end. Used on the event loop only.
        self.pointers: dict[tuple[str, str], tuple[Pointer, float]] = {}

    async def open(self) -> None:
        """Raises StoreMisconfigured when the folder cannot be used."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            await asyncio.get_running_loop().run_in_executor(self._worker, self._prepare)
        except BaseException as error:
            await self.close()
            if isinstance(error, OSError | sqlite3.Error):
                raise StoreMisconfigured(f"The folder {self._dir} cannot be used as a store ({error}).") from error
            raise

    def _prepare(self) -> None:
        self._held.enter_context(folder.lock(self._dir))
        path = (self._dir / "fewshot.sqlite3").absolute()
        self.sealer = Sealer(self._key or folder.own_key(self._dir, new=not path.exists()))
        db = self._writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._held.callback(db.close)
        if db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise StoreMisconfigured(f"The file system of {self._dir} does not let SQLite keep a write-ahead log.")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")  # what is deleted leaves no bytes behind
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.executescript(SCHEMA)
            db.execute("INSERT INTO seal VALUES (?)", (self.sealer.seal(b"", "store"),))
            db.execute(f"PRAGMA user_version = {FORMAT}")
            db.execute("COMMIT")
        elif version not in (1, 2, FORMAT):
            raise StoreMisconfigured(f"{path} has format {version}; this program reads format {FORMAT}.")
        try:
            self.sealer.open(*db.execute("SELECT value FROM seal").fetchone(), "store")
        except SealBroken:
            # With another key every task would look damaged, and its owner would be asked to replace it.
            raise StoreMisconfigured(f"{path} was sealed with another key.") from None
        if version in (1, 2):
            log.info("%s has format %d and is brought to format %d.", path, version, FORMAT)
            db.executescript(MIGRATION if version == 1 else f"PRAGMA user_version = {FORMAT}")
        uri = f"{path.as_uri()}?mode=ro"
        self.reader = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        self._held.callback(self.reader.close)

    async def close(self) -> None:
        await asyncio.to_thread(self._worker.shutdown)  # what waits in its queue is written first
        self._held.close()

    async def ping(self) -> bool:
        with suppress(sqlite3.Error):
            return self.reader.execute("SELECT 1 FROM seal").fetchone() is not None
        return False

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

        def whole(db: sqlite3.Connection) -> T:
            db.execute("BEGIN IMMEDIATE")
            try:
                result = work(db)
                db.execute("COMMIT")
                return result
            finally:
                # After some errors SQLite has rolled back by itself; where it has not, nothing could begin again.
                if db.in_transaction:
                    db.execute("ROLLBACK")

        return await self.run(whole, moves=moves)


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
            row = self._store.reader.execute(POINTER, self._now(task)).fetchone()
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
            row = db.execute(PLACE, self._now(task)).fetchone()
            if row is None:
                return None
            at = self._sealed.at(task, version, pointer=row[1], history=row[2])
            data = None if at is None else self._data(db, task, at.version)
            if at is not None and data is not None:
                record = self._sealed.open_record(task, at.version, data=data)
                if isinstance(record, Base):
                    base = self._data(db, task, record.version)
                    record = self._sealed.open_record(task, at.version, data=data, base=base)
                if isinstance(record, Base):
                    raise SealBroken("The base of the record is gone.")
                return at, record
            if version is None:
                raise SealBroken("The task has no record.")
            return None

        return await self._store.run(work)

    def _data(self, db: sqlite3.Connection, task: str, version: int) -> bytes | None:
        row = db.execute(RECORD, (self.tenant, task, version)).fetchone()
        return None if row is None else row[0]

    async def versions(self, task: str) -> list[Pointer]:
        row = await self._store.run(lambda db: db.execute(PLACE, self._now(task)).fetchone())
        return [] if row is None else self._sealed.versions(task, pointer=row[1], history=row[2])

    def head_in_memory(self, head_id: str) -> Head | None:
        return None

    async def head(self, head_id: str) -> Head | None:
        row = await self._store.run(lambda db: db.execute(HEAD, self._now(head_id)).fetchone())
        return None if row is None else self._sealed.open_head(head_id, row[0])

    async def keep_head(self, task: str, pointer: Pointer, head: Head) -> None:
        def work(db: sqlite3.Connection) -> None:
            row = db.execute(POINTER, self._now(task)).fetchone()
            if row is not None and self._sealed.open_pointer(task, row[0]) == pointer:
                self._put_head(db, pointer.head, head=head, expires=row[1])

        with suppress(SealBroken):
            await self._store.change(work)

    def _put_head(self, db: sqlite3.Connection, head_id: str, *, head: Head, expires: float | None) -> None:
        tenant, _, now = self._now(head_id)
        value = self._sealed.seal_head(head_id, head)
        until = ends(self._store.head_ttl_s, expires, now=now)
        db.execute("DELETE FROM heads WHERE expires <= ?", (now,))
        db.execute("REPLACE INTO heads VALUES (?, ?, ?, ?)", (tenant, head_id, until, value))

    async def commit(
        self, task: str, record: Record, head_id: str, head: Head | None, *, expect: Expected, instead: bool = False
    ) -> Pointer:
        def work(db: sqlite3.Connection) -> Pointer:
            tenant, _, now = self._now(task)
            for statement in EXPIRED:
                db.execute(statement, (now,))
            # The version has a column of its own, so a damaged pointer does not lose the count.
            current, at, known = db.execute(PLACE, (tenant, task, now)).fetchone() or (0, None, None)
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
            db.execute(PUT_TASK, (tenant, task, pointer.version, record.expires, *sealed))
            db.execute(UNNEEDED, (tenant, task, json.dumps(sorted(history.records))))
            db.execute("REPLACE INTO records VALUES (?, ?, ?, ?)", (tenant, task, pointer.version, value))
            for dropped in before.dropped(history):  # should another task share it, it is made again
                db.execute(DROP_HEAD, (tenant, dropped))
            if head is not None:
                self._put_head(db, head_id, head=head, expires=record.expires)
            return pointer

        return await self._store.change(work, moves=(self.tenant, task))

    async def delete(self, task: str, *, expect: Expected = None) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            row = db.execute(PLACE, self._now(task)).fetchone()
            current, at, known = row or (0, None, None)
            history = self._sealed.history(task, current, pointer=at, history=known)
            if row is not None:
                next_version(current, history, expect)
            for version in history.versions:
                # Should another task share this head, it is made again.
                db.execute(DROP_HEAD, (self.tenant, version.head))
            self._sealed.forget(task)
            for table in ("tasks", "records", "remembered"):
                db.execute(f"DELETE FROM {table} WHERE tenant = ? AND task = ?", (self.tenant, task))  # noqa: S608
            return row is not None

        found = await self._store.change(work, moves=(self.tenant, task))
        with suppress(StoreUnavailable):  # deleted it is; this only clears its bytes from the log as well
            await self._store.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())
        return found

    async def full(self, most: int) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            (count,) = db.execute(COUNT, (self.tenant, time.time(), most)).fetchone()
            return bool(count >= most)

        return await self._store.run(work)

    async def tasks(self, *, limit: int, after: str = "") -> list[tuple[str, Pointer]]:
        def work(db: sqlite3.Connection) -> list[tuple[str, Pointer]]:
            found: list[tuple[str, Pointer]] = []
            for task, data in db.execute(TASKS, self._now(after)):
                if len(found) == limit:
                    break
                pointer = self._sealed.list_pointer(task, data)
                if pointer is not None:
                    found.append((task, pointer))
            return found

        return await self._store.run(work)

    async def remember(self, task: str, key: str, value: bytes, *, ttl_s: float, new: bool = False) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            now = time.time()
            db.execute("DELETE FROM remembered WHERE expires <= ?", (now,))
            if new and self._recall(db, task, key) is not None:
                return False
            sealed = self._sealed.seal_remembered(task, key, value=value)
            db.execute("REPLACE INTO remembered VALUES (?, ?, ?, ?, ?)", (self.tenant, task, key, now + ttl_s, sealed))
            db.execute(TOO_MANY, (self.tenant, task, MOST_REMEMBERED))
            return True

        return await self._store.change(work)

    async def recall(self, task: str, key: str) -> bytes | None:
        return await self._store.run(lambda db: self._recall(db, task, key))

    def _recall(self, db: sqlite3.Connection, task: str, key: str) -> bytes | None:
        row = db.execute(REMEMBERED, (self.tenant, task, key, time.time())).fetchone()
        return self._sealed.open_remembered(task, key, data=row and row[0])

    async def forget_remembered(self, task: str, key: str) -> None:
        forget = "DELETE FROM remembered WHERE tenant = ? AND task = ? AND key = ?"
        await self._store.change(lambda db: db.execute(forget, (self.tenant, task, key)))
