"""What was used recently, in front of any store: decoded heads, and where each task was when it was last read.

A head never changes under its id, so it is answered from memory. A pointer does change, so the store is asked each
time; while it is away, the last known one is answered, marked stale, until it is too old to be trusted. Knows nothing
of what lies beneath.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from models.errors import StoreUnavailable
from models.head import Head
from service.stores import Expected, Pointer, Record, Scope, Store

log = logging.getLogger(__name__)
MOST_BYTES = 128 * 2**20  # of the heads in memory: those of many classes have half a megabyte each
Key = tuple[str, str]  # tenant, and task or head id
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Compared by identity: whoever finds another one in its place than before has been overtaken."""

    pointer: Pointer | None  # None: there is no such task, or nobody can say where it is
    asked: float  # when the store was asked


def size(head: Head) -> int:
    """Bytes in memory, about."""
    return sum(int(array.nbytes) for array in head.affine) + sum(100 + len(label) for label in head.labels)


class Recent:
    def __init__(
        self, store: Store, *, most: int, stale_ok_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Keeps up to `most` heads, of MOST_BYTES in all, and as many pointers.

        Trusts a pointer for `stale_ok_s` seconds.
        """
        self.name = store.name
        self.beneath = store
        self.stale_ok_s = stale_ok_s
        self.clock = clock
        self.heads: OrderedDict[Key, Head] = OrderedDict()
        self.known: OrderedDict[Key, Known] = OrderedDict()
        self._most = most
        self._bytes = 0  # of the heads
        self._writing: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        await self.beneath.open()

    async def ping(self) -> bool:
        return await self.beneath.ping()

    async def close(self) -> None:
        while self._writing:
            await asyncio.wait(self._writing)
        await self.beneath.close()

    def scope(self, tenant: str) -> RecentScope:
        return RecentScope(self, tenant)

    def note(self, key: Key, known: Known) -> Known:
        self.known[key] = known
        self.known.move_to_end(key)
        if len(self.known) > self._most:
            self.known.popitem(last=False)
        return known

    def put_head(self, key: Key, head: Head) -> Head:
        self.drop_head(key)
        self.heads[key] = head
        self._bytes += size(head)
        while len(self.heads) > self._most or self._bytes > MOST_BYTES:
            self.drop_head(next(iter(self.heads)))
        return head

    def drop_head(self, key: Key) -> None:
        head = self.heads.pop(key, None)
        self._bytes -= 0 if head is None else size(head)

    async def whole(self, write: Coroutine[Any, Any, T]) -> T:
        """Lets a write end and be noted here even when its caller leaves."""
        return await asyncio.shield(self.behind(write))

    def behind(self, write: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begins a write, which `close` waits for."""
        task = asyncio.create_task(write)
        self._writing.add(task)
        task.add_done_callback(self._written)
        return task

    def _written(self, task: asyncio.Task[Any]) -> None:
        self._writing.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if its caller has left


class RecentScope:
    def __init__(self, recent: Recent, tenant: str):
        self._recent = recent
        self.tenant = tenant
        self._beneath: Scope = recent.beneath.scope(tenant)

    async def pointer(self, task: str) -> Pointer | None:
        recent, key = self._recent, (self.tenant, task)
        before, asked = recent.known.get(key), recent.clock()
        try:
            pointer = await self._beneath.pointer(task)
        except StoreUnavailable:
            known = recent.known.get(key)
            if known is None or known.pointer is None or recent.clock() - known.asked >= recent.stale_ok_s:
                raise
            return replace(known.pointer, stale=True)
        self._note(key, before, pointer, asked=asked)
        return pointer

    def _note(self, key: Key, before: Known | None, pointer: Pointer | None, *, asked: float) -> None:
        """Where the task is, unless another one is noted than `before` the store was asked.

        Then a write ended meanwhile, and this answer may be older. A name that never was a task is not noted: it would
        take the room of one that is.
        """
        recent = self._recent
        if recent.known.get(key) is before and (pointer is not None or before is not None):
            recent.note(key, Known(pointer, asked))

    async def record(self, task: str, *, version: int | None = None) -> tuple[Pointer, Record] | None:
        key = (self.tenant, task)
        before, asked = self._recent.known.get(key), self._recent.clock()
        found = await self._beneath.record(task, version=version)
        if version is None and found is not None:  # whoever was told of it is told of nothing earlier
            self._note(key, before, found[0], asked=asked)
        return found

    async def versions(self, task: str) -> list[Pointer]:
        return await self._beneath.versions(task)

    def head_in_memory(self, head_id: str) -> Head | None:
        recent, key = self._recent, (self.tenant, head_id)
        head = recent.heads.get(key)
        if head is not None:
            recent.heads.move_to_end(key)
        return head

    async def head(self, head_id: str) -> Head | None:
        recent, key = self._recent, (self.tenant, head_id)
        # Looked for once more in memory: it may have been made again while the store was asked.
        head = recent.heads.get(key) or await self._beneath.head(head_id) or recent.heads.get(key)
        return None if head is None else recent.put_head(key, head)

    async def keep_head(self, task: str, pointer: Pointer, head: Head) -> None:
        """Into memory now, into the store behind: nobody waits for a write that keeps no promise."""
        self._recent.put_head((self.tenant, pointer.head), head)
        self._recent.behind(self._keep_beneath(task, pointer, head))

    async def _keep_beneath(self, task: str, pointer: Pointer, head: Head) -> None:
        try:
            await self._beneath.keep_head(task, pointer, head)
        except StoreUnavailable:  # it can be made again: no reason to fail
            log.warning("The head %s is kept in memory only.", pointer.head)

    async def commit(
        self, task: str, record: Record, head_id: str, head: Head | None, *, expect: Expected, instead: bool = False
    ) -> Pointer:
        change = self._beneath.commit(task, record, head_id, head, expect=expect, instead=instead)
        pointer = await self._recent.whole(self._write(task, change, lambda pointer: pointer))
        if head is not None:
            self._recent.put_head((self.tenant, head_id), head)
        return pointer

    async def delete(self, task: str, *, expect: Expected = None) -> bool:
        return await self._recent.whole(self._write(task, self._beneath.delete(task, expect=expect), lambda _: None))

    async def full(self, most: int) -> bool:
        return await self._beneath.full(most)

    async def tasks(self, *, limit: int, after: str = "") -> list[tuple[str, Pointer]]:
        return await self._beneath.tasks(limit=limit, after=after)

    async def remember(self, task: str, key: str, value: bytes, *, ttl_s: float, new: bool = False) -> bool:
        return await self._beneath.remember(task, key, value, ttl_s=ttl_s, new=new)

    async def recall(self, task: str, key: str) -> bytes | None:
        return await self._beneath.recall(task, key)

    async def forget_remembered(self, task: str, key: str) -> None:
        await self._beneath.forget_remembered(task, key)

    async def _write(self, task: str, change: Coroutine[Any, Any, T], after: Callable[[T], Pointer | None]) -> T:
        """Does a change and notes where the task is `after` it, unless another change may have come later.

        A change that fails leaves what was known: it was not acknowledged, and while the store is away that is what
        the task is classified with.
        """
        recent, key = self._recent, (self.tenant, task)
        known, asked = recent.known.get(key), recent.clock()
        mine = recent.note(key, replace(known) if known else Known(None, asked))
        result = await change
        pointer, seen = after(result), recent.known.get(key)
        # Who looked at the task meanwhile found it as it is now or as it was; else somebody else changed it, too, and
        # nobody knows who was last.
        if seen is not mine and (seen is None or seen.pointer is None or seen.pointer not in (pointer, mine.pointer)):
            pointer = None
        if pointer is None and mine.pointer is not None:
            recent.drop_head((self.tenant, mine.pointer.head))
        recent.note(key, Known(pointer, asked))
        return result
