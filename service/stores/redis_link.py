"""The way to Redis: a bounded pool, a deadline for every operation, and a pause after Redis did not answer.

An operation runs to its end in a task of its own, bounded by the socket timeouts; its caller may stop waiting at any
time. So redis-py never meets a cancellation: no connection goes back with an unread reply, and no commit is cut half
way. Knows nothing of what is stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from models.errors import StoreUnavailable
from service.stores import StoreMisconfigured

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSE_S = 1.0  # between two attempts to reach a Redis that did not answer
GRACE_S = 0.05
AWAY = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)


class Link:
    _client: Redis
    _slots: asyncio.Semaphore

    def __init__(self, url: str, *, timeout_s: float, user: str, password: str, connections: int):
        self._url = url
        self._timeout_s = timeout_s
        self._credentials = {"username": user, "password": password}
        self._connections = connections
        self._checked = False
        self._closed_until = 0.0  # monotonic; 0 while Redis answers
        self._running: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Raises StoreMisconfigured when Redis may throw records away; that it is away is no reason to fail."""
        try:
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
                **{name: value for name, value in self._credentials.items() if value},
            )
        except ValueError:  # its text may quote a password
            raise StoreMisconfigured("The address of Redis is none: it has the form redis://host:port/db.") from None
        self._client = Redis.from_pool(pool)
        self._slots = asyncio.Semaphore(self._connections)
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
        await self._client.aclose()

    async def call(self, operation: Callable[[Redis], Awaitable[T]], *, answers: int = 1) -> T:
        """Runs an operation that needs so many answers of Redis, and waits no longer than those may take."""
        now, probe = time.monotonic(), False
        if self._closed_until:
            if now < self._closed_until:
                raise StoreUnavailable("The store does not answer.")
            self._closed_until, probe = now + PAUSE_S, True  # this one tries; the others still fail at once
        task = asyncio.create_task(self._guarded(operation, probe=probe))
        self._running.add(task)
        task.add_done_callback(self._ended)
        # A little longer than a socket waits, so that a hung Redis is noted before anybody can ask again. The deadline
        # itself is no reason for a pause: here, too, may be more to do than fits into it.
        done, _ = await asyncio.wait((task,), timeout=answers * self._timeout_s + GRACE_S)
        if not done:
            raise StoreUnavailable("The store does not answer in time.")
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left; then nobody else asks

    async def _guarded(self, operation: Callable[[Redis], Awaitable[T]], *, probe: bool) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise StoreUnavailable("The store has too much to do.") from None
        try:
            if self._closed_until and not probe:  # found out while this one waited for its turn
                raise StoreUnavailable("The store does not answer.")
            return await self._attempt(operation)
        finally:
            self._slots.release()

    async def _attempt(self, operation: Callable[[Redis], Awaitable[T]]) -> T:
        lost = ""
        try:
            if not self._checked:
                await self._check()
            return await operation(self._client)
        except AWAY as error:
            lost = str(error) or type(error).__name__
            raise StoreUnavailable("The store does not answer.") from error
        except StoreMisconfigured as error:
            lost = error.detail
            raise
        except redis_errors.RedisError as error:
            log.warning("Redis refused a command: %s", type(error).__name__)  # the text may hold what was written
            raise StoreUnavailable("The store refused the operation.") from error
        finally:
            if lost:
                self._lost(lost)
            else:  # whatever else was raised, Redis has answered
                self._answered()

    def _lost(self, reason: str) -> None:
        if not self._closed_until:
            log.warning("Redis cannot be used: %s", reason)
        self._closed_until = time.monotonic() + PAUSE_S
        self._checked = False  # what comes back may be another Redis

    def _answered(self) -> None:
        if self._closed_until:
            log.warning("Redis answers again.")
        self._closed_until = 0.0

    async def _check(self) -> None:
        """What Redis is set to do must fit the promise. INFO where it is allowed, CONFIG for what INFO does not say."""
        try:
            found = {**await self._client.info("memory"), **await self._client.info("persistence")}
        except redis_errors.ResponseError:
            log.warning("Redis does not tell its settings: see to it that it evicts no records and syncs its log.")
            self._checked = True
            return
        policy = str(found.get("maxmemory_policy", ""))
        if policy.startswith("allkeys"):
            raise StoreMisconfigured(f"Redis has maxmemory-policy {policy}, which evicts records; use volatile-lru.")
        fsync: str | None = "always"
        with suppress(redis_errors.ResponseError):
            fsync = (await self._client.config_get("appendfsync")).get("appendfsync")
        if not found.get("aof_enabled") or fsync != "always":
            log.warning("Redis can lose acknowledged tasks: set appendonly yes and appendfsync always.")
        self._checked = True
