"""The shared store: Redis, for any number of replicas. Compare-and-set by WATCH, MULTI and EXEC; no Lua.

    fs:{tenant}:p:{task}             pointer
    fs:{tenant}:r:{task}:{version}   record, without TTL unless its task expires
    fs:{tenant}:h:{head id}          head, with TTL
    fs:{tenant}:tasks                sorted set of the names, all with score 0

Every operation runs to its end in a task of its own and the socket timeouts bound it, so redis-py never meets a
cancellation: no connection goes back with an unread reply, and no commit is cut half way. Knows nothing of learners.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from models.errors import StoreUnavailable, VersionConflict
from models.head import Head
from service.stores import Pointer, Record, SealBroken, Sealer, StoreMisconfigured
from service.stores.sealed import Sealed, next_version

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSE_S = 1.0  # between two attempts to reach a Redis that did not answer
TRIES = 8  # of a change that others keep overtaking
AWAY = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError, StoreMisconfigured)


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
    client: Redis

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
        self._url = url
        self._timeout_s = timeout_s
        self._credentials = {"username": user or None, "password": password or None}
        self._connections = connections
        self._checked = False
        self._closed_until = 0.0  # monotonic; 0 while Redis answers
        self._running: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Raises StoreMisconfigured when Redis may throw records away."""
        pool = BlockingConnectionPool.from_url(
            self._url,
            max_connections=self._connections,
            timeout=self._timeout_s,
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            # Nothing is retried, and with no error named as retryable a connection that is lost under WATCH stays
            # what it is: redis-py would turn it into a WatchError, as if another writer had come first.
            retry=Retry(NoBackoff(), 0, supported_errors=()),
            protocol=2,  # only then redis-py looks for unread data before it lends a connection
            **{name: value for name, value in self._credentials.items() if value is not None},
        )
        self.client = Redis.from_pool(pool)
        try:
            await self.call(lambda client: client.ping(), answers=3)
        except StoreMisconfigured:
            await self.close()
            raise
        except StoreUnavailable:
            log.warning("Redis does not answer yet; its settings will be checked when it does.")

    async def close(self) -> None:
        if self._running:
            await asyncio.wait(self._running, timeout=4 * self._timeout_s)
        await self.client.aclose()

    async def ping(self) -> bool:
        with suppress(StoreUnavailable):
            return bool(await self.call(lambda client: client.ping()))
        return False

    def scope(self, tenant: str) -> RedisScope:
        return RedisScope(self, tenant)

    async def call(self, operation: Callable[[Redis], Awaitable[T]], *, answers: int = 1) -> T:
        """Runs an operation that needs so many answers of Redis, and waits for it no longer than those may take."""
        if self._closed_until:
            if time.monotonic() < self._closed_until:
                raise StoreUnavailable("The store does not answer.")
            self._closed_until = time.monotonic() + PAUSE_S  # this caller tries; the others still fail at once
        task = asyncio.create_task(self._guarded(operation))
        self._running.add(task)
        task.add_done_callback(self._ended)
        done, _ = await asyncio.wait((task,), timeout=answers * self._timeout_s)
        if not done:
            self._closed_until = time.monotonic() + PAUSE_S
            raise StoreUnavailable("The store does not answer in time.")
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left; then nobody else asks

    async def _guarded(self, operation: Callable[[Redis], Awaitable[T]]) -> T:
        closed_until = 0.0
        try:
            if not self._checked:
                await self._check()
            return await operation(self.client)
        except AWAY as error:
            closed_until = time.monotonic() + PAUSE_S
            self._checked = False  # what comes back may be another Redis
            log.warning("Redis cannot be used: %s", error)
            if isinstance(error, StoreMisconfigured):
                raise
            raise StoreUnavailable("The store does not answer.") from error
        except redis_errors.RedisError as error:
            log.warning("Redis refused a command: %s", type(error).__name__)  # the text may hold what was written
            raise StoreUnavailable("The store refused the operation.") from error
        finally:
            self._closed_until = closed_until

    async def _check(self) -> None:
        """What Redis is set to do must fit the promise. INFO where it is allowed, CONFIG for what INFO does not say."""
        try:
            found = {**await self.client.info("memory"), **await self.client.info("persistence")}
        except redis_errors.ResponseError:
            log.warning("Redis does not tell its settings: see to it that it evicts no records and syncs its log.")
            self._checked = True
            return
        policy = str(found.get("maxmemory_policy", ""))
        if policy.startswith("allkeys"):
            raise StoreMisconfigured(f"Redis has maxmemory-policy {policy}, which evicts records; use volatile-lru.")
        fsync: str | None = "always"
        with suppress(redis_errors.ResponseError):
            fsync = (await self.client.config_get("appendfsync")).get("appendfsync")
        if not found.get("aof_enabled") or fsync != "always":
            log.warning("Redis can lose acknowledged tasks: set appendonly yes and appendfsync always.")
        self._checked = True


class RedisScope:
    def __init__(self, store: RedisStore, tenant: str):
        self._store = store
        self._tenant = tenant
        self._sealed = Sealed(store.sealer, tenant)

    def _key(self, *parts: str | int) -> str:
        return ":".join(("fs", self._tenant, *map(str, parts)))

    async def _pointer(self, client: Redis, task: str) -> Pointer | None:
        data = await fetch(client, self._key("p", task))
        return None if data is None else self._sealed.open_pointer(task, data)

    async def pointer(self, task: str) -> Pointer | None:
        return await self._store.call(lambda client: self._pointer(client, task))

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

        return await self._store.call(operation, answers=2)

    async def head(self, head_id: str) -> Head | None:
        data = await self._store.call(lambda client: fetch(client, self._key("h", head_id)))
        return self._sealed.open_head(head_id, data)

    async def keep_head(self, head_id: str, head: Head) -> None:
        value = self._sealed.seal_head(head_id, head)
        await self._store.call(lambda client: client.set(self._key("h", head_id), value, ex=self._store.head_ttl_s))

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

        return await self._store.call(lambda client: self._change(client, task, write), answers=3)

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

        return await self._store.call(operation, answers=3)

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

        return await self._store.call(operation, answers=3)

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
