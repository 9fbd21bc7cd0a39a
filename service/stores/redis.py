"""The shared store: Redis, for any number of replicas. Compare-and-set by WATCH, MULTI and EXEC; no Lua.

    fs:{tenant}:p:{task}             pointer
    fs:{tenant}:v:{task}             history: the kept versions, the current one first
    fs:{tenant}:r:{task}:{version}   record, without TTL unless its task expires
    fs:{tenant}:h:{head id}          head, with TTL
    fs:{tenant}:m:{task}             index of what is remembered and its sizes, with the TTL of what lasts longest
    fs:{tenant}:m:{task}:{digest}    a remembered value, with TTL; what the index does not name is not there
    fs:{tenant}:tasks                sorted set of the names, all with score 0
    fs:mark                          what tells this store from an empty or another one, made by the first who comes

The mark is read with everything that would be as it is in an empty Redis, too: a task that is not there, a change.

Commands in use: GET SET DEL MGET ZADD ZREM ZRANGEBYLEX WATCH UNWATCH MULTI EXEC PING, SCAN where a pointer or a history
is damaged, INFO and CONFIG GET where they are allowed. An end that moves is written with its value, for a command that
moves it alone would be one more right to ask for. What has a TTL makes room when memory is short. Knows nothing of
connections (`redis_link.py`) or learners.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from models.errors import StoreUnavailable, VersionConflict
from models.head import Head
from service.stores import (
    CLAIM_S,
    MOST_REMEMBERED,
    MOST_REMEMBERED_BYTES,
    Expected,
    Pointer,
    Record,
    SealBroken,
    Sealer,
    StoreMisconfigured,
)
from service.stores.record import Base, RecentRecords
from service.stores.redis_link import Link
from service.stores.sealed import History, Noted, Sealed, ends, next_version, too_many

log = logging.getLogger(__name__)
T = TypeVar("T")

PAGE = 1000  # tasks that are looked at together
WEED_S = 10  # in which an index is not looked through again for who is refused
WEED_BEHIND_S = 600  # and for who is not
TRIES = 8  # of a change that others keep overtaking
MARK = "fs:mark"


def _ms(end: float) -> int:
    """Milliseconds until then, of what is kept so long: by our own clock, for that of Redis may be another."""
    return max(1, int(1000 * (end - time.time())))


async def fetch(client: Redis, key: str) -> Any:
    """The bytes at `key`, None where there are none."""
    try:
        return await client.get(key)
    except redis_errors.ResponseError as error:
        if str(error).startswith("WRONGTYPE"):
            return b""  # not written by us: it passes no seal
        raise


@dataclass(frozen=True, slots=True)
class Found:
    """Where a change finds a task."""

    version: int  # 0: nowhere
    history: History
    records: list[str]  # the keys of all its records, in the history or not


class RedisStore:
    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        key: bytes,
        head_ttl_s: int = 7 * 24 * 3600,
        versions_kept: int = 10,
        timeout_s: float = 0.5,
        user: str = "",
        password: str = "",
        connections: int = 16,
    ):
        self.sealer = Sealer(key)
        self.head_ttl_s = head_ttl_s
        self.versions_kept = versions_kept
        self.recent = RecentRecords()
        # By tenant and task: who remembers here takes turns, so that only other replicas are ever faster.
        self.turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._weeded: dict[tuple[str, float], float] = {}  # by tenant and pause: see may_weed
        self._weeding: set[asyncio.Task[None]] = set()
        self._mark: bytes | None = None  # of the store as it was first met
        self.link = Link(
            url,
            timeout_s=timeout_s,
            user=user,
            password=password,
            connections=connections,
            recognise=self._recognise,
        )

    async def open(self) -> None:
        """Raises StoreMisconfigured when Redis may throw records away, or was sealed with another key."""
        await self.link.open()

    async def close(self) -> None:
        for weeding in self._weeding:
            weeding.cancel()
        await self.link.close()

    def may_weed(self, tenant: str, pause_s: float) -> bool:
        """Whether the index of a tenant was not looked through for so long, with this pause; then it counts as is."""
        now, last = time.monotonic(), self._weeded.get((tenant, pause_s), -math.inf)
        if now - last < pause_s:
            return False
        self._weeded[tenant, pause_s] = now
        return True

    def weed_behind(self, scope: RedisScope) -> None:
        """Where tasks have an end, their names would fill the index in time if nobody ever listed them."""
        if self.may_weed(scope.tenant, WEED_BEHIND_S):
            weeding = asyncio.create_task(self._weed(scope))
            self._weeding.add(weeding)
            weeding.add_done_callback(self._weeding.discard)

    async def _weed(self, scope: RedisScope) -> None:
        with suppress(StoreUnavailable):  # another time
            await scope.weed()

    async def ping(self) -> bool:
        async def is_it_there(client: Redis) -> None:
            self.recognise(await fetch(client, MARK))

        with suppress(StoreUnavailable):
            await self.link.call(is_it_there)
            return self.link.well
        return False

    async def _recognise(self, client: Redis) -> None:
        found = await fetch(client, MARK)
        if found is None and self._mark is None:
            with suppress(redis_errors.ResponseError):  # full, or not to be written: what is there can be read
                if await client.set(MARK, self.sealer.seal(secrets.token_bytes(16), "mark"), nx=True):
                    log.warning("Redis had no mark of ours: what it holds, if anything, is the store from now on.")
                found = await fetch(client, MARK)
        self.recognise(found)

    def recognise(self, mark: bytes | None) -> None:
        """Raises StoreMisconfigured unless this is the mark of the store that was there from the first."""
        if mark is not None and mark != self._mark:
            try:
                self.sealer.open(mark, "mark")
            except SealBroken:
                # Every task would look damaged, and its owner would be asked to replace it.
                raise StoreMisconfigured(
                    "What Redis holds was sealed with another key, or with none (STORE_KEY_FILE); nothing was changed."
                ) from None
        self._mark = self._mark or mark
        if mark != self._mark:
            raise StoreMisconfigured(
                "Redis was emptied, or is another one than before. Bring back what it held; "
                "or, if this is as it should be, restart the service."
            )

    def scope(self, tenant: str) -> RedisScope:
        return RedisScope(self, tenant)


class RedisScope:
    def __init__(self, store: RedisStore, tenant: str):
        self._store = store
        self.tenant = tenant
        self._sealed = Sealed(store.sealer, tenant, store.recent)

    def _key(self, *parts: str | int) -> str:
        return ":".join(("fs", self.tenant, *map(str, parts)))

    async def _pointer(self, client: Redis, task: str) -> Pointer | None:
        data = await fetch(client, self._key("p", task))
        if data is None:
            self._store.recognise(await fetch(client, MARK))
            return None
        return self._sealed.open_pointer(task, data)

    async def pointer(self, task: str) -> Pointer | None:
        return await self._store.link.call(lambda client: self._pointer(client, task), answers=2)

    async def record(self, task: str, *, version: int | None = None) -> tuple[Pointer, Record] | None:
        async def operation(client: Redis) -> tuple[Pointer, Record] | None:
            for _ in range(TRIES):  # the task may move between the two answers, and take the record with it
                pointer, history = await self._place(client, task)
                if pointer is None:
                    return None
                at = self._sealed.at(task, version, pointer=pointer, history=history)
                if at is None:
                    return None
                data = await fetch(client, self._key("r", task, at.version))
                record = None if data is None else self._sealed.open_record(task, at.version, data=data)
                if isinstance(record, Base):
                    base = await fetch(client, self._key("r", task, record.version))
                    record = self._sealed.open_record(task, at.version, data=data, base=base)
                if isinstance(record, Record):
                    return at, record
            if version is None:
                raise SealBroken("The task has no record.")
            return None

        return await self._store.link.call(operation, answers=3)

    async def versions(self, task: str) -> list[Pointer]:
        pointer, history = await self._store.link.call(lambda client: self._place(client, task), answers=3)
        return [] if pointer is None else self._sealed.versions(task, pointer=pointer, history=history)

    async def _place(self, client: Redis, task: str) -> tuple[bytes | None, bytes | None]:
        """Pointer and history, as they are at one moment."""
        found: list[Any] = await client.mget([self._key("p", task), self._key("v", task), MARK])
        pointer, history, mark = found
        self._store.recognise(mark)
        if pointer is None:  # or of another type, which counts as damage
            pointer = await fetch(client, self._key("p", task))
        if history is None and pointer is not None:  # likewise
            history = await fetch(client, self._key("v", task))
        return pointer, history

    def head_in_memory(self, head_id: str) -> Head | None:
        return None

    async def head(self, head_id: str) -> Head | None:
        data = await self._store.link.call(lambda client: fetch(client, self._key("h", head_id)))
        return self._sealed.open_head(head_id, data)

    async def keep_head(self, task: str, pointer: Pointer, head: Head) -> None:
        value, watched = self._sealed.seal_head(pointer.head, head), self._key("p", task)

        async def change(pipe: Pipeline) -> None:
            at, history = await self._place(pipe, task)
            there = at is not None and self._sealed.open_pointer(task, at) == pointer
            expires = self._sealed.open_history(task, history).expires
            pipe.multi()  # type: ignore[no-untyped-call]
            if there:
                pipe.set(self._key("h", pointer.head), value, px=self._head_ms(expires))

        with suppress(SealBroken, VersionConflict):
            await self._store.link.call(lambda client: self._change(client, watched, change), answers=4)

    def _head_ms(self, expires: float | None) -> int:
        """How long a head of a task that ends then is kept, in milliseconds."""
        return _ms(ends(self._store.head_ttl_s, expires, now=time.time()))

    async def commit(
        self, task: str, record: Record, head_id: str, head: Head | None, *, expect: Expected, instead: bool = False
    ) -> Pointer:
        sealed_head = None if head is None else self._sealed.seal_head(head_id, head)
        left = None if record.expires is None else _ms(record.expires)

        async def change(pipe: Pipeline) -> Pointer:
            found = await self._found(pipe, task)
            pointer = Pointer(next_version(found.version, found.history, expect), head_id)
            index, listed = self._key("m", task), None
            if not found.version:
                await pipe.watch(index)
                listed = await fetch(pipe, index)
            base, stored = found.history.base, None
            if base is not None and self._sealed.wants(base):
                stored = await fetch(pipe, self._key("r", task, base.version))
            sealed_record, base = self._sealed.seal_record(
                task, pointer.version, record=record, base=base, stored=stored
            )
            most = self._store.versions_kept
            history = found.history.then(pointer, base, record, most=most, instead=instead)
            earlier = [self._key("r", task, known) for known in sorted(history.records - {pointer.version})]
            moved = await pipe.mget(earlier) if earlier and found.history.expires != record.expires else []
            pipe.multi()  # type: ignore[no-untyped-call]
            gone = set(found.records).difference(earlier)
            # Should another task share a head, it is made again.
            gone |= {self._key("h", dropped) for dropped in found.history.dropped(history)}
            if gone:
                pipe.delete(*gone)
            for key, data in zip(earlier, moved, strict=False):
                if data is not None:
                    pipe.set(key, data, px=left)
            pipe.set(self._key("r", task, pointer.version), sealed_record, px=left)
            pipe.set(self._key("v", task), self._sealed.seal_history(task, history), px=left)
            pipe.set(self._key("p", task), self._sealed.seal_pointer(task, pointer), px=left)
            if sealed_head is not None:
                pipe.set(self._key("h", head_id), sealed_head, px=self._head_ms(record.expires))
            pipe.zadd(self._key("tasks"), {task: 0})
            if listed is not None:
                self._forget_earlier(pipe, task, listed)
            return pointer

        watched = self._key("p", task)
        pointer = await self._store.link.call(lambda client: self._change(client, watched, change), answers=6)
        if record.expires is not None:
            self._store.weed_behind(self)
        return pointer

    def _forget_earlier(self, pipe: Pipeline, task: str, listed: bytes) -> None:
        """What is remembered beside a name that is no task was asked of an earlier one, but for claims."""
        index, live, until = self._key("m", task), self._live(task, listed), time.time() + CLAIM_S
        claims = {name: noted for name, noted in live.items() if noted.end <= until}
        self._set_index(pipe, task, claims)
        for name in live.keys() - claims.keys():
            pipe.delete(f"{index}:{name}")

    def _set_index(self, pipe: Pipeline, task: str, names: dict[str, Noted]) -> None:
        index = self._key("m", task)
        if names:
            pipe.set(index, self._sealed.seal_index(task, names), px=_ms(max(noted.end for noted in names.values())))
        else:
            pipe.delete(index)

    async def delete(self, task: str, *, expect: Expected = None) -> bool:
        async def look(client: Redis) -> tuple[bool, list[str]]:
            found = await self._found(client, task)
            if found.version:
                next_version(found.version, found.history, expect)
            index = self._key("m", task)
            # Should another task share a head, it is made again. What comes to be remembered from here on is no longer
            # in an index, so it is gone as well.
            heads = [self._key("h", known.head) for known in found.history.versions]
            values = [f"{index}:{name}" for name in self._live(task, await fetch(client, index))]
            return found.version > 0, [
                self._key("p", task),
                self._key("v", task),
                index,
                *found.records,
                *heads,
                *values,
            ]

        def forget(pipe: Pipeline, keys: list[str]) -> None:
            self._sealed.forget(task)
            pipe.delete(*keys)
            pipe.zrem(self._key("tasks"), task)

        async def change(pipe: Pipeline) -> bool:
            there, keys = await look(pipe)
            pipe.multi()  # type: ignore[no-untyped-call]
            forget(pipe, keys)
            return there

        async def operation(client: Redis) -> bool:
            try:
                return await self._change(client, self._key("p", task), change)
            except redis_errors.OutOfMemoryError:
                # A full Redis refuses even what frees memory inside MULTI. Outside it does not, and while it is full
                # nobody moves the task in between.
                async with client.pipeline(transaction=False) as pipe:
                    there, keys = await look(client)
                    forget(pipe, keys)
                    await pipe.execute()
                return there

        return await self._store.link.call(operation, answers=4)

    async def _change(self, client: Redis, watched: str, change: Callable[[Pipeline], Awaitable[T]]) -> T:
        """Lets `change` read and then queue its commands, and does them if nobody wrote `watched` meanwhile.

        Raises what `change` raises, and VersionConflict when others were faster each time.
        """
        for attempt in range(TRIES):
            await asyncio.sleep(random.uniform(0, 0.004 * attempt))
            async with client.pipeline() as pipe:
                with suppress(redis_errors.WatchError):
                    await pipe.watch(watched, MARK)
                    result = await change(pipe)
                    await pipe.execute()
                    return result
        raise VersionConflict("The task moved while it was being changed.")

    async def _found(self, client: Redis, task: str) -> Found:
        pointer, history = await self._place(client, task)
        prefix = self._key("r", task, "")
        try:
            version = 0 if pointer is None else self._sealed.open_pointer(task, pointer).version
            listed = self._sealed.open_history(task, history).records
            records = [f"{prefix}{known}" for known in {version, *listed} if known > 0]
        except SealBroken:
            # The names of records tell their versions, so damage loses neither the count nor a record.
            records = [key.decode() async for key in client.scan_iter(match=f"{prefix}*", count=1000)]
            version = max((int(key.removeprefix(prefix)) for key in records), default=0)
        known = self._sealed.history(task, version, pointer=pointer, history=history)
        if known.versions and known.base is None:
            known = self._sealed.with_base(task, known, await fetch(client, f"{prefix}{version}"))
        records = list({*records, *(f"{prefix}{needed}" for needed in known.records)})
        return Found(version, known, records)

    async def full(self, most: int) -> bool:
        async def operation(client: Redis) -> bool:
            return bool(await client.zrangebylex(self._key("tasks"), "-", "+", start=most - 1, num=1))

        if not await self._store.link.call(operation):
            return False
        # Tasks that ended stay in the index until somebody looks: not for each who is refused.
        if not self._store.may_weed(self.tenant, WEED_S):
            return True
        await self.weed()
        return await self._store.link.call(operation)

    async def weed(self) -> None:
        """Looks the index of tasks through, which takes those off it that ended."""
        last = ""
        while page := await self._store.link.call(partial(self._page, after=last, most=PAGE), answers=3):
            last = page[-1][0]

    async def _page(self, client: Redis, *, after: str, most: int) -> list[tuple[str, bytes | None]]:
        """Names behind `after` in the index, with their pointers; those that ended (None) are taken off it."""
        lower = f"({after}" if after else "-"
        page: list[Any] = await client.zrangebylex(self._key("tasks"), lower, "+", start=0, num=most)
        if not page:
            return []
        names = [name.decode() for name in page]
        values: list[Any] = await client.mget([self._key("p", name) for name in names])
        if ended := [name for name, data in zip(names, values, strict=True) if data is None]:
            await self._unlist(client, ended)
        return list(zip(names, values, strict=True))

    async def tasks(self, *, limit: int, after: str = "") -> list[tuple[str, Pointer]]:
        async def operation(client: Redis) -> list[tuple[str, Pointer]]:
            found: list[tuple[str, Pointer]] = []
            last = after
            while len(found) < limit:
                page = await self._page(client, after=last, most=limit)
                if not page:
                    self._store.recognise(await fetch(client, MARK))
                    break
                for name, data in page:
                    pointer = None if data is None else self._sealed.list_pointer(name, data)
                    if pointer is not None:
                        found.append((name, pointer))
                last = page[-1][0]
            return found[:limit]

        return await self._store.link.call(operation, answers=3)

    async def _unlist(self, client: Redis, names: list[str]) -> None:
        """Takes tasks that expired off the index, unless one of them came back meanwhile."""
        keys = [self._key("p", name) for name in names]
        async with client.pipeline() as pipe:
            with suppress(redis_errors.WatchError):
                await pipe.watch(*keys)
                if not any(await pipe.mget(keys)):
                    pipe.multi()  # type: ignore[no-untyped-call]
                    pipe.zrem(self._key("tasks"), *names)
                    await pipe.execute()

    async def remember(self, task: str, key: str, value: bytes, *, ttl_s: float, new: bool = False) -> bool:
        sealed = self._sealed.seal_remembered(task, key, value=value)
        if len(sealed) > MOST_REMEMBERED_BYTES:
            return False
        return await self._note(task, key, sealed, expires=time.time() + ttl_s, new=new)

    async def forget_remembered(self, task: str, key: str) -> None:
        await self._note(task, key, None)

    async def recall(self, task: str, key: str) -> bytes | None:
        index, name = self._key("m", task), self._digest(key)
        found: list[Any] = await self._store.link.call(lambda client: client.mget([index, f"{index}:{name}"]))
        listed, data = found
        return self._sealed.open_remembered(task, key, data=data) if name in self._live(task, listed) else None

    async def _note(self, task: str, key: str, sealed: bytes | None, *, expires: float = 0, new: bool = False) -> bool:
        """Writes one remembered value (None: takes it away) and the index that names it."""
        index, name = self._key("m", task), self._digest(key)

        async def change(pipe: Pipeline) -> bool:
            found: list[Any] = await pipe.mget([index, f"{index}:{name}", MARK])
            listed, data, mark = found
            self._store.recognise(mark)
            live = self._live(task, listed)
            there = name in live and self._sealed.open_remembered(task, key, data=data) is not None
            pipe.multi()  # type: ignore[no-untyped-call]
            if new and there:
                return False
            live.pop(name, None)
            if sealed is None:
                pipe.delete(f"{index}:{name}")
            else:
                live[name] = Noted(expires, len(sealed))
                pipe.set(f"{index}:{name}", sealed, px=_ms(expires))
            sizes = [noted.size for noted in live.values()]
            for oldest in list(live)[: too_many(sizes, MOST_REMEMBERED, MOST_REMEMBERED_BYTES)]:
                del live[oldest]
                pipe.delete(f"{index}:{oldest}")
            self._set_index(pipe, task, live)
            return True

        turn = self._store.turns.setdefault((self.tenant, task), asyncio.Lock())
        try:
            async with turn:
                return await self._store.link.call(lambda client: self._change(client, index, change), answers=3)
        except VersionConflict:
            raise StoreUnavailable("The store has too much to do for this task.") from None

    def _live(self, task: str, data: bytes | None) -> dict[str, Noted]:
        """What an index names and has not ended, by age; of a damaged one, nothing."""
        now = time.time()
        return {name: noted for name, noted in self._sealed.open_index(task, data).items() if noted.end > now}

    @staticmethod
    def _digest(key: str) -> str:
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
