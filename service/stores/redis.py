"""The shared store: Redis, for any number of replicas. Compare-and-set by WATCH, MULTI and EXEC; no Lua.

    fs:{tenant}:p:{task}             pointer
    fs:{tenant}:r:{task}:{version}   record, without TTL unless its task expires
    fs:{tenant}:h:{head id}          head, with TTL
    fs:{tenant}:tasks                sorted set of the names, all with score 0

Commands in use: GET SET DEL MGET ZADD ZREM ZRANGEBYLEX WATCH UNWATCH MULTI EXEC PING, SCAN where a pointer is damaged,
INFO and CONFIG GET where they are allowed. Knows nothing of connections (`redis_link.py`) or learners.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import Redis

from models.errors import StoreUnavailable, VersionConflict
from models.head import Head
from service.stores import Pointer, Record, SealBroken, Sealer
from service.stores.redis_link import Link
from service.stores.sealed import Sealed, next_version

T = TypeVar("T")

TRIES = 8  # of a change that others keep overtaking


async def fetch(client: Redis, key: str) -> Any:
    """The bytes at `key`, None where there are none."""
    try:
        return await client.get(key)
    except redis_errors.ResponseError as error:
        if str(error).startswith("WRONGTYPE"):
            return b""  # not written by us: it passes no seal
        raise


class RedisStore:
    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        key: bytes,
        head_ttl_s: int = 7 * 24 * 3600,
        timeout_s: float = 0.5,
        user: str = "",
        password: str = "",
        connections: int = 16,
    ):
        self.sealer = Sealer(key)
        self.head_ttl_s = head_ttl_s
        self.link = Link(url, timeout_s=timeout_s, user=user, password=password, connections=connections)

    async def open(self) -> None:
        """Raises StoreMisconfigured when Redis may throw records away."""
        await self.link.open()

    async def close(self) -> None:
        await self.link.close()

    async def ping(self) -> bool:
        with suppress(StoreUnavailable):
            return await self.link.call(lambda client: client.ping())
        return False

    def scope(self, tenant: str) -> RedisScope:
        return RedisScope(self, tenant)


class RedisScope:
    def __init__(self, store: RedisStore, tenant: str):
        self._store = store
        self.tenant = tenant
        self._sealed = Sealed(store.sealer, tenant)

    def _key(self, *parts: str | int) -> str:
        return ":".join(("fs", self.tenant, *map(str, parts)))

    async def _pointer(self, client: Redis, task: str) -> Pointer | None:
        data = await fetch(client, self._key("p", task))
        return None if data is None else self._sealed.open_pointer(task, data)

    async def pointer(self, task: str) -> Pointer | None:
        return await self._store.link.call(lambda client: self._pointer(client, task))

    async def record(self, task: str) -> tuple[Pointer, Record] | None:
        async def operation(client: Redis) -> tuple[Pointer, Record] | None:
            for _ in range(TRIES):  # the task may move between the two answers, and take the old record with it
                pointer = await self._pointer(client, task)
                if pointer is None:
                    return None
                data = await fetch(client, self._key("r", task, pointer.version))
                if data is not None:
                    return pointer, self._sealed.open_record(task, pointer.version, data=data)
            raise SealBroken("The task has no record.")

        return await self._store.link.call(operation, answers=2)

    async def head(self, head_id: str) -> Head | None:
        data = await self._store.link.call(lambda client: fetch(client, self._key("h", head_id)))
        return self._sealed.open_head(head_id, data)

    async def keep_head(self, head_id: str, head: Head) -> None:
        value = self._sealed.seal_head(head_id, head)
        await self._store.link.call(
            lambda client: client.set(self._key("h", head_id), value, ex=self._store.head_ttl_s)
        )

    async def commit(self, task: str, record: Record, head_id: str, head: Head, *, expect: int | None) -> Pointer:
        sealed_head = self._sealed.seal_head(head_id, head)
        expires = None if record.expires is None else int(record.expires * 1000)

        def write(pipe: Redis, at: Pointer, records: list[str]) -> Pointer:
            pointer = Pointer(next_version(at.version, expect), head_id)
            sealed_record = self._sealed.seal_record(task, pointer.version, record=record)
            if records:
                pipe.delete(*records)
            pipe.set(self._key("r", task, pointer.version), sealed_record, pxat=expires)
            pipe.set(self._key("p", task), self._sealed.seal_pointer(task, pointer), pxat=expires)
            pipe.set(self._key("h", head_id), sealed_head, ex=self._store.head_ttl_s)
            pipe.zadd(self._key("tasks"), {task: 0})
            return pointer

        return await self._store.link.call(lambda client: self._change(client, task, write), answers=3)

    async def delete(self, task: str) -> bool:
        def write(pipe: Redis, at: Pointer, records: list[str]) -> bool:
            # Should another task share the head, it is made again.
            pipe.delete(self._key("p", task), self._key("h", at.head), *records)
            pipe.zrem(self._key("tasks"), task)
            return at.version > 0

        async def operation(client: Redis) -> bool:
            try:
                return await self._change(client, task, write)
            except redis_errors.OutOfMemoryError:
                # A full Redis refuses even what frees memory inside MULTI. Outside it does not, and while it is full
                # nobody moves the task in between.
                async with client.pipeline(transaction=False) as pipe:
                    found = write(pipe, *await self._current(client, task))
                    await pipe.execute()
                return found

        return await self._store.link.call(operation, answers=3)

    async def _change(self, client: Redis, task: str, write: Callable[[Redis, Pointer, list[str]], T]) -> T:
        """Reads where the task is, lets `write` queue its commands, and does them if nobody was faster.

        Raises what `write` raises, and VersionConflict when others were faster each time.
        """
        for attempt in range(TRIES):
            await asyncio.sleep(random.uniform(0, 0.004 * attempt))
            async with client.pipeline() as pipe:
                with suppress(redis_errors.WatchError):
                    await pipe.watch(self._key("p", task))
                    at, records = await self._current(pipe, task)
                    pipe.multi()  # type: ignore[no-untyped-call]
                    result = write(pipe, at, records)
                    await pipe.execute()
                    return result
        raise VersionConflict("The task moved while it was being changed.")

    async def _current(self, client: Redis, task: str) -> tuple[Pointer, list[str]]:
        """Where a task is (version 0: nowhere) and the keys of its records."""
        try:
            pointer = await self._pointer(client, task) or Pointer(0, "")
        except SealBroken:
            # The names of records tell their versions, so a damaged pointer loses neither the count nor a record.
            prefix = self._key("r", task, "")
            keys = [key.decode() async for key in client.scan_iter(match=f"{prefix}*", count=1000)]
            return Pointer(max((int(key.removeprefix(prefix)) for key in keys), default=0), ""), keys
        return pointer, [self._key("r", task, pointer.version)]

    async def tasks(self, *, limit: int, after: str = "") -> list[tuple[str, Pointer]]:
        async def operation(client: Redis) -> list[tuple[str, Pointer]]:
            found: list[tuple[str, Pointer]] = []
            last = after
            while len(found) < limit:
                lower = f"({last}" if last else "-"
                page: list[Any] = await client.zrangebylex(self._key("tasks"), lower, "+", start=0, num=limit)
                if not page:
                    break
                names = [name.decode() for name in page]
                values: list[Any] = await client.mget([self._key("p", name) for name in names])
                expired = [name for name, data in zip(names, values, strict=True) if data is None]
                if expired:
                    await self._unlist(client, expired)
                for name, data in zip(names, values, strict=True):
                    pointer = None if data is None else self._sealed.list_pointer(name, data)
                    if pointer is not None:
                        found.append((name, pointer))
                last = names[-1]
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
