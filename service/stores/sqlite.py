"""The embedded store: one SQLite file for one process. What is acknowledged is on disk (WAL, synchronous=FULL).

Knows nothing of the file itself and of threads (`sqlite_file.py`), of statements (`sql.py`) or of learners.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property

from models.errors import StoreUnavailable
from models.head import Head
from service.stores import CLAIM_S, MOST_REMEMBERED, MOST_REMEMBERED_BYTES, Expected, Pointer, Record, SealBroken, sql
from service.stores.record import Base
from service.stores.sealed import Sealed, ends, next_version
from service.stores.sqlite_file import Place, SqliteFile, unavailable


@contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """What is read within is as it was at one moment."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


class SqliteStore(SqliteFile):
    name = "sqlite"

    def scope(self, tenant: str) -> SqliteScope:
        return SqliteScope(self, tenant)


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
        place = self._store.places.get((self.tenant, task))
        if place is not None and place.expires > max(time.time(), self._store.ended):
            return place.pointer
        try:
            row = self._store.reader.execute(sql.POINTER, self._now(task)).fetchone()
        except sqlite3.Error as error:
            raise unavailable(error) from error
        if row is None:
            return None
        pointer = self._sealed.open_pointer(task, row[0])
        self._store.remember((self.tenant, task), Place.of(pointer, row[1]))
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
        def work(db: sqlite3.Connection) -> Place:
            tenant, _, now = self._now(task)
            self._store.expire(db, *sql.EXPIRED)
            # The version has a column of its own, so a damaged pointer does not lose the count.
            row = db.execute(sql.PLACE, (tenant, task, now)).fetchone()
            if row is None:
                self._store.drop(db, sql.EARLIER, tenant, task, now + CLAIM_S)
            current, at, known = row or (0, None, None)
            before = self._sealed.history(task, current, pointer=at, history=known)
            if before.versions and before.base is None:
                before = self._sealed.with_base(task, before, self._data(db, task, current))
            pointer = Pointer(next_version(current, before, expect), head_id)
            base = before.base
            stored = self._data(db, task, base.version) if base and self._sealed.wants(base) else None
            value, base = self._sealed.seal_record(task, pointer.version, record=record, base=base, stored=stored)
            most = self._store.versions_kept
            history = before.then(pointer, base, record, most=most, instead=instead)
            sealed = self._sealed.seal_pointer(task, pointer), self._sealed.seal_history(task, history)
            db.execute(sql.PUT_TASK, (tenant, task, pointer.version, record.expires, *sealed))
            self._store.drop(db, sql.UNNEEDED, tenant, task, json.dumps(sorted(history.records)))
            db.execute("REPLACE INTO records VALUES (?, ?, ?, ?)", (tenant, task, pointer.version, value))
            for dropped in before.dropped(history):  # should another task share it, it is made again
                self._store.drop(db, sql.DROP_HEAD, tenant, dropped)
            if head is not None:
                self._put_head(db, head_id, head=head, expires=record.expires)
            return Place.of(pointer, record.expires)

        return (await self._store.change(work, moves=(self.tenant, task))).pointer

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
            if len(sealed) > MOST_REMEMBERED_BYTES:
                return False
            db.execute("REPLACE INTO remembered VALUES (?, ?, ?, ?, ?)", (self.tenant, task, key, now + ttl_s, sealed))
            self._store.drop(db, sql.TOO_MANY, self.tenant, task, MOST_REMEMBERED, MOST_REMEMBERED_BYTES)
            return True

        return await self._store.change(work)

    async def recall(self, task: str, key: str) -> bytes | None:
        return await self._store.read(lambda db: self._recall(db, task, key))

    def _recall(self, db: sqlite3.Connection, task: str, key: str) -> bytes | None:
        row = db.execute(sql.REMEMBERED, (self.tenant, task, key, time.time())).fetchone()
        return self._sealed.open_remembered(task, key, data=row and row[0])

    async def forget_remembered(self, task: str, key: str) -> None:
        forget = "DELETE FROM remembered WHERE tenant = ? AND task = ? AND key = ?"
        await self._store.change(lambda db: self._store.drop(db, forget, self.tenant, task, key))
