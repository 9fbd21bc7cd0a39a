"""The way to Redis: a bounded pool, a deadline for every operation, and none of them while Redis cannot be used.

An operation runs to its end in a task of its own, bounded by the socket timeouts; its caller may stop waiting at any
time. So redis-py never meets a cancellation: no connection goes back with an unread reply, and no commit is cut half
way. Once Redis did not answer, callers are refused at once, and a task of our own tries, now and then, whether it is
back: nobody waits for that. An operation that alone takes too long, as that of a large record does, is no reason to
refuse others: while one takes long, Redis is asked for a PING beside it. Knows nothing of what is stored.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from models.errors import StoreUnavailable
from service.stores import StoreMisconfigured

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSE_S = 0.7  # between two attempts to reach Redis: with what an attempt takes, all is well a second after it is back
LOOK_S = 5.0  # between two looks at how Redis is set up
REFUSED_S = 15.0  # how long a command that it refused counts: it may be full, or a right be missing
GRACE_S = 0.05
# A RuntimeError is how uvloop says that a connection was reset before anything was written to it.
AWAY = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError, RuntimeError)
SILENT = "The store does not answer."


class Link:
    _client: Redis
    _slots: asyncio.Semaphore

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        user: str,
        password: str,
        connections: int,
        recognise: Callable[[Redis], Awaitable[None]],
    ):
        """`recognise`: is it the Redis that it was? Raises StoreMisconfigured; asked each time it comes back."""
        self._url = url
        self._timeout_s = timeout_s
        self._credentials = {"username": user, "password": password}
        self._connections = connections
        self._recognise = recognise
        self._closed = SILENT  # why callers are refused; empty while Redis can be used
        self._told = False  # that it cannot be used
        self._look_again = 0.0  # monotonic
        self._refused_until = 0.0  # monotonic
        self._late_until = 0.0  # likewise: of answers that were late there was a line in the log
        # About the settings of Redis, since it was last away: what was said, and what may not be asked.
        self._said: set[str] = set()
        self._denied: set[str] = set()
        self._running: set[asyncio.Task[Any]] = set()
        self._probe: asyncio.Task[None] | None = None
        self._alive = -math.inf  # monotonic: when a probe began that was answered
        self._watcher: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()  # to look without a pause

    @property
    def well(self) -> bool:
        """Whether Redis can be used, and refused nothing of late."""
        return not self._closed and time.monotonic() >= self._refused_until

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
            await self._bounded(self._look(), answers=3)
        except StoreMisconfigured:
            await self.close()
            raise
        except StoreUnavailable:
            log.warning("Redis does not answer yet; its settings will be checked when it does.")
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=4 * self._timeout_s)
        await self._client.aclose()

    async def call(self, operation: Callable[[Redis], Awaitable[T]], *, answers: int = 1) -> T:
        """Runs an operation that needs so many answers of Redis, and waits no longer than those may take."""
        if self._closed:
            raise StoreUnavailable(self._closed)
        try:
            return await self._bounded(self._guarded(operation), answers=answers)
        except StoreMisconfigured as error:
            raise StoreUnavailable(error.detail) from error

    async def _bounded(self, work: Coroutine[Any, Any, T], *, answers: int) -> T:
        task = self._started(work)
        # A little longer than a socket waits, so that a hung Redis is noted before anybody can ask again. The deadline
        # itself is no reason to think it away: here, too, may be more to do than fits into it.
        done, _ = await asyncio.wait((task,), timeout=answers * self._timeout_s + GRACE_S)
        if not done:
            raise StoreUnavailable("The store does not answer in time.")
        return task.result()

    def _started(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left; then nobody else asks

    async def _watch(self) -> None:
        """Looks at Redis now and then, and each PAUSE_S while it cannot be used; at once when an answer was late."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self._hurry.wait()
            self._hurry.clear()
            if self._closed or time.monotonic() >= self._look_again:
                look = self._started(self._look())
                await asyncio.wait((look,))  # it is not cancelled with us
                error = look.exception()
                if error is not None and not isinstance(error, StoreUnavailable):
                    log.error("Redis could not be looked at.", exc_info=error)

    async def _look(self) -> None:
        """Lets callers in if Redis answers and is what it must be. Raises StoreUnavailable."""
        await self._guarded(self._check, look=True)
        self._look_again = time.monotonic() + LOOK_S
        if self._told:
            log.warning("Redis answers again.")
        self._closed, self._told = "", False

    async def _guarded(self, operation: Callable[[Redis], Awaitable[T]], *, look: bool = False) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise StoreUnavailable("The store has too much to do.") from None
        try:
            if self._closed and not look:  # found out while this one waited for its turn
                raise StoreUnavailable(self._closed)
            with self._probed():
                return await self._attempt(operation)
        finally:
            self._slots.release()

    @contextmanager
    def _probed(self) -> Iterator[None]:
        """What takes long within is accompanied by probes: when it times out, it is known whether Redis is away."""
        loop, pause_s = asyncio.get_running_loop(), self._timeout_s / 2
        alarm: asyncio.TimerHandle

        def probe() -> None:
            nonlocal alarm
            alarm = loop.call_later(pause_s, probe)
            if self._probe is None or self._probe.done():
                self._probe = self._started(self._ping_anew(pause_s))

        alarm = loop.call_later(pause_s, probe)
        try:
            yield
        finally:
            alarm.cancel()

    async def _ping_anew(self, timeout_s: float) -> None:
        """On a connection of its own, which the pool does not count: those that are in use may all be slow."""
        began = time.monotonic()
        connection = self._client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            with suppress(*AWAY, redis_errors.RedisError):
                async with asyncio.timeout(timeout_s):
                    await connection.connect()
                    await connection.send_command("PING")
                    await connection.read_response()
                self._alive = began
        finally:
            await connection.disconnect(nowait=True)

    async def _attempt(self, operation: Callable[[Redis], Awaitable[T]]) -> T:
        try:
            return await operation(self._client)
        except AWAY as error:
            # Redis is well if it answered what it was asked after this. Its connection is dropped by redis-py.
            late = isinstance(error, redis_errors.TimeoutError)
            if late and time.monotonic() - self._alive < self._timeout_s:
                if time.monotonic() >= self._late_until:
                    log.warning("Redis answers, but one operation took it too long.")
                self._late_until = time.monotonic() + REFUSED_S
                raise StoreUnavailable("The store does not answer in time.") from error
            if late and not self._closed:  # it may have been busy for a moment, with writing a large record
                self._hurry.set()
            self._lost(SILENT, str(error) or type(error).__name__)
            raise StoreUnavailable(SILENT) from error
        except StoreMisconfigured as error:
            self._lost(error.detail, error.detail)
            raise
        except redis_errors.RedisError as error:
            self._refused(error)
            raise StoreUnavailable("The store refused the operation.") from error

    def _lost(self, closed: str, reason: str) -> None:
        if not self._told:  # what comes back may be another Redis
            self._said.clear()
            self._denied.clear()
        if not self._told or closed != self._closed:
            log.warning("Redis cannot be used: %s", reason)
        self._closed, self._told = closed, True

    def _refused(self, error: redis_errors.RedisError) -> None:
        now = time.monotonic()
        if now >= self._refused_until:
            # Only of a missing right the text is told, from where it is Redis's own: else it may hold what was written.
            missing = isinstance(error, redis_errors.NoPermissionError)
            text = f": {str(error).rpartition('caused error: ')[2]}" if missing else ""
            log.warning("Redis refused a command: %s%s", type(error).__name__, text)
        self._refused_until = now + REFUSED_S

    def _say(self, text: str) -> None:
        if text not in self._said:
            log.warning(text)
        self._said.add(text)

    async def _ask(self, name: str, question: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        """The answer; empty where Redis does not allow the question, which is then not asked again."""
        if name not in self._denied:
            try:
                return dict(await question())
            except redis_errors.ResponseError:
                self._denied.add(name)
        return {}

    async def _check(self, client: Redis) -> None:
        """What Redis is set to do must fit the promise. INFO where it is allowed, CONFIG for what INFO does not say."""
        await client.ping()
        memory = await self._ask("info", lambda: client.info("memory"))
        kept = await self._ask("info", lambda: client.info("persistence"))
        policy = str(memory.get("maxmemory_policy", ""))
        if policy.startswith("allkeys"):
            raise StoreMisconfigured(f"Redis has maxmemory-policy {policy}, which evicts records; use noeviction.")
        if policy.startswith("volatile"):
            self._say(f"Redis has maxmemory-policy {policy}: tasks with an end may go before it; set noeviction.")
        if not kept:
            self._say("Redis does not tell its settings: see to it that it evicts no records and syncs its log.")
        else:
            found = await self._ask("config", lambda: client.config_get("appendfsync", "no-appendfsync-on-rewrite"))
            synced = found.get("appendfsync", "always") == "always"
            if not kept.get("aof_enabled") or not synced or found.get("no-appendfsync-on-rewrite") == "yes":
                self._say(
                    "Redis can lose acknowledged tasks: set appendonly yes, appendfsync always and "
                    "no-appendfsync-on-rewrite no."
                )
            elif not found:
                log.info("Redis does not tell how it syncs its log: see to appendfsync always.")
        self._see_whether_it_is_written(await self._ask("info", lambda: client.info("replication")), memory)
        await self._recognise(client)

    def _see_whether_it_is_written(self, replication: dict[str, Any], memory: dict[str, Any]) -> None:
        """What it will refuse at the next change is known before, and for as long as it lasts."""
        most = int(memory.get("maxmemory", 0))
        if replication.get("role") == "slave":
            self._say("Redis is a replica of another: it can be read and takes no changes.")
        elif not 0 < most <= int(memory.get("used_memory", 0)):
            return
        self._refused_until = max(self._refused_until, time.monotonic() + LOOK_S + 2 * PAUSE_S)
