"""The file of the embedded store, with the threads that write and read it, and its lock, key and health.

Writes go through one connection in one thread of its own, so they queue and never meet. Reads go through a few others,
and wait for no writer; one more reads on the event loop. Knows nothing of what the tables hold (`sqlite.py`), nor of
other processes: its folder is locked against them, so a pointer that was read stays true until this process moves it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from models.errors import StoreUnavailable
from service.callers import CallerLeft, has_left
from service.stores import CLAIM_S, Pointer, SealBroken, Sealer, StoreMisconfigured, folder, sql
from service.stores.record import RecentRecords

log = logging.getLogger(__name__)
T = TypeVar("T")

READERS = 4
MOST_PLACES = 100_000  # in memory; some 300 bytes each
CLEAR_S = 60  # between two looks for what expired
LEAST_FREE = 1_000_000  # bytes of the disk; with less it counts as full
TRY_S = 5  # between two tries to write of who asks for our health, while writes fail


def write_something(db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA user_version = {sql.FORMAT}")  # written though it is the same


def unavailable(error: sqlite3.Error) -> StoreUnavailable:
    log.warning("SQLite failed: %s", error)  # its messages name no values
    return StoreUnavailable("The store cannot read or write its file.")


class Place(NamedTuple):
    """Where a task is, and when it ends."""

    pointer: Pointer
    expires: float  # inf: never

    @classmethod
    def of(cls, pointer: Pointer, expires: float | None) -> Place:
        return cls(pointer, math.inf if expires is None else expires)


class SqliteFile:
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
        # By tenant and task. Used on the event loop only.
        self.places: dict[tuple[str, str], Place] = {}
        # By the clock at which what has an end was cleared away last: the clock may have gone back since.
        self.ended = -math.inf
        self._moving: Counter[tuple[str, str]] = Counter()  # changes under way, likewise

    async def open(self) -> None:
        """Raises StoreMisconfigured when the folder cannot be used."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        try:
            await asyncio.get_running_loop().run_in_executor(self._worker, self._prepare)
        except BaseException as error:
            await self.close()
            if isinstance(error, OSError | sqlite3.Error):
                why = f"{error}; the disk is full: free some space first" if self._is_full(error) else str(error)
                raise StoreMisconfigured(f"The folder {self._dir} cannot be used as a store ({why}).") from error
            raise
        self._clearing = asyncio.create_task(self._clear_now_and_then())

    def _is_full(self, error: Exception) -> bool:
        """Whether that is why: SQLite calls it an I/O error when there is no room for the memory that readers share."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        with suppress(OSError):
            return shutil.disk_usage(self._dir).free < LEAST_FREE
        return False

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
        elif not 1 <= version <= sql.FORMAT:
            raise StoreMisconfigured(f"{path} has format {version}; this program reads format {sql.FORMAT}.")
        try:
            self.sealer.open(*db.execute("SELECT value FROM seal").fetchone(), "store")
        except SealBroken:
            # With another key every task would look damaged, and its owner would be asked to replace it.
            raise StoreMisconfigured(f"{path} was sealed with another key.") from None
        if 1 <= version < sql.FORMAT:
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
        self.ended = max(self.ended, now)
        for statement in statements:
            db.execute(statement, {"now": now, "claims": now + CLAIM_S})
        if db.total_changes > before:
            self._unclean = True

    def drop(self, db: sqlite3.Connection, statement: str, *values: str | float) -> None:
        """Deletes rows in a transaction; their bytes leave the log as well before long."""
        if db.execute(statement, values).rowcount > 0:
            self._unclean = True

    def checkpoint(self, db: sqlite3.Connection) -> None:
        """Clears the bytes of what was deleted from the log; where somebody still reads there, another time."""
        self._unclean = True
        busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._unclean = bool(busy)

    async def run(self, work: Callable[[sqlite3.Connection], T], *, moves: tuple[str, str] | None = None) -> T:
        """Does work in the writer's thread; to its end, even when the caller leaves.

        `moves`: tenant and task that are elsewhere after it, at the Place that the work gives, if it gives one.
        """

        def safely() -> T:
            try:
                return work(self._writer)
            except sqlite3.Error as error:
                raise unavailable(error) from error

        done = asyncio.get_running_loop().run_in_executor(self._worker, safely)
        if moves is not None:
            self._moving[moves] += 1
            done.add_done_callback(lambda done: self._moved(moves, done))
        return await asyncio.shield(done)

    def _moved(self, at: tuple[str, str], done: asyncio.Future[Any]) -> None:
        """Before anybody can be told, and whether or not it went well, in the order in which it was done.

        A reader may find the earlier place while the work goes on, and remember it: that is forgotten here, too. Of
        changes that come at once only the last tells where the task is: it may be there by now, and be read there.
        """
        self.places.pop(at, None)
        self._moving[at] -= 1
        if self._moving[at]:
            return
        del self._moving[at]
        if not done.cancelled() and done.exception() is None and isinstance(done.result(), Place):
            self.remember(at, done.result())

    def remember(self, at: tuple[str, str], place: Place) -> None:
        if len(self.places) >= MOST_PLACES:
            self.places.clear()
        self.places[at] = place

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
