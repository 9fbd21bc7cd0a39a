"""Load on one task or several: each request asks about one image.

    python deploy/load.py http://127.0.0.1:8000 TASK IMAGES... --connections 64 --seconds 10
    python deploy/load.py http://127.0.0.1:8000 --tasks a,b,c IMAGES... --rate 500 --deadline-ms 1000

Closed loop: each connection sends, waits for the answer, sends the next. Open loop (--rate): requests arrive when they
arrive, at random or evenly (--even), however slow the answers are; latency counts from the moment a request was due. A
client hangs up when its deadline has passed, and in a closed loop asks again; goodput is what was answered 200 before.
A key is taken from FEWSHOT_KEY.

Prints one JSON line: answers, throughput, percentiles of latency in all and by status. Raw sockets and as little work
per request as possible, for it shares the machine with what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

try:
    import uvloop

    run = uvloop.run
except ImportError:
    run = asyncio.run  # type: ignore[assignment]

WARM_S = 0.5  # fills caches and is not counted


class Connection(asyncio.Protocol):
    """One connection, with at most one request on it. `due`: when that was to be sent; 0 while there is none."""

    def __init__(self, load: Load):
        self.load = load
        self.buffer = b""
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.load.free(self)

    def ask(self, request: bytes, due: float) -> None:
        self.due = due
        self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        lower = self.buffer[:head].lower()
        at = lower.index(b"content-length:") + 15
        end = lower.find(b"\r", at)
        length = int(lower[at : end if end > 0 else head])
        if len(self.buffer) < head + 4 + length:
            return
        status, due = self.buffer[9:12].decode(), self.due
        self.buffer, self.due = b"", 0.0
        if due:
            self.load.count(status, due)
        if b"connection: close" in lower:
            self.transport.close()
        elif due:
            self.load.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self.due:
            self.load.count("broken", self.due)
        self.load.lost(self)


class Load:
    """What both loops have in common. `latencies`: seconds, by status, or by how else a request ended."""

    def __init__(self, url: str, requests: list[bytes], seconds: float, deadline_s: float):
        self.requests = requests
        self.deadline_s = deadline_s
        self.asked: deque[tuple[float, Connection]] = deque()
        self.number = 0
        parts = urlsplit(url)
        self.address = parts.hostname or "127.0.0.1", parts.port or 80
        self.seconds = seconds
        self.begins = time.perf_counter() + WARM_S
        self.ends = self.begins + seconds
        self.latencies: dict[str, list[float]] = defaultdict(list)

    def count(self, status: str, due: float) -> None:
        if due >= self.begins:
            took = time.perf_counter() - due
            # An answer may come in the moment in which it is noticed that it is late.
            self.latencies["late" if took > self.deadline_s else status].append(took)

    def next(self) -> bytes:
        self.number += 1
        return self.requests[self.number % len(self.requests)]

    def send(self, connection: Connection, due: float) -> None:
        connection.ask(self.next(), due)
        self.asked.append((due, connection))

    def give_up(self, before: float) -> None:
        """Hangs up where an answer to what was due before has not come."""
        while self.asked and self.asked[0][0] < before:
            due, connection = self.asked.popleft()
            if connection.due == due:
                connection.due = 0.0
                self.count("late", due)
                connection.transport.abort()  # type: ignore[attr-defined]

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: Connection(self), *self.address)

    def free(self, connection: Connection) -> None:
        """The connection can take a request."""
        raise NotImplementedError

    def lost(self, connection: Connection) -> None:
        raise NotImplementedError

    def result(self) -> dict[str, Any]:
        answers = {status: found for status, found in self.latencies.items() if status.isdigit()}
        everything = [latency for found in answers.values() for latency in found]
        return {
            "answers": len(everything),
            "per_s": round(len(everything) / self.seconds, 1),
            "goodput_per_s": round(len(self.latencies.get("200", ())) / self.seconds, 1),
            **percentiles(everything),
            "statuses": {status: len(found) for status, found in self.latencies.items()},
            "by_status": {status: percentiles(found) for status, found in self.latencies.items()},
        }


class Closed(Load):
    def __init__(self, url: str, requests: list[bytes], seconds: float, deadline_s: float, connections: int):
        super().__init__(url, requests, seconds, deadline_s)
        self.open = self.connections = connections
        self.done = asyncio.Event()
        self.again: set[asyncio.Task[None]] = set()

    def free(self, connection: Connection) -> None:
        now = time.perf_counter()
        if now < self.ends:
            self.send(connection, now)
        else:
            connection.transport.close()

    def lost(self, connection: Connection) -> None:
        if time.perf_counter() < self.ends:
            task = asyncio.create_task(self.connect())
            self.again.add(task)
            task.add_done_callback(self._connected)
        else:
            self._closed()

    def _connected(self, task: asyncio.Task[None]) -> None:
        self.again.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.count("not connected", time.perf_counter())
            self._closed()

    def _closed(self) -> None:
        self.open -= 1
        if self.open == 0:
            self.done.set()

    async def measure(self) -> dict[str, Any]:
        await asyncio.gather(*(self.connect() for _ in range(self.connections)))
        while not self.done.is_set():
            self.give_up(time.perf_counter() - self.deadline_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.done.wait(), 0.02)
        return {"connections": self.connections, **self.result()}


class Open(Load):
    """Takes a connection that is free, or makes one: so many as are waited for."""

    def __init__(self, url: str, requests: list[bytes], seconds: float, deadline_s: float, rate: float, even: bool):
        super().__init__(url, requests, seconds, deadline_s)
        self.rate = rate
        dice = random.Random(1)
        self.gap: Callable[[], float] = (lambda: 1 / rate) if even else (lambda: dice.expovariate(rate))
        self.idle: list[Connection] = []
        self.waiting: deque[float] = deque()  # due, but without a connection yet
        self.connecting: set[asyncio.Task[None]] = set()
        self.lags: list[float] = []
        self.closing = False

    def free(self, connection: Connection) -> None:
        if self.waiting:
            self._send(connection, self.waiting.popleft())
        elif self.closing:
            connection.transport.close()
        else:
            self.idle.append(connection)

    def lost(self, connection: Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)

    def _send(self, connection: Connection, due: float) -> None:
        if due >= self.begins:
            self.lags.append(time.perf_counter() - due)
        self.send(connection, due)

    def _arrives(self, due: float) -> None:
        if self.idle:
            self._send(self.idle.pop(), due)
            return
        self.waiting.append(due)
        task = asyncio.create_task(self.connect())
        self.connecting.add(task)
        task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self.connecting.discard(task)
        if not task.cancelled() and task.exception() is not None and self.waiting:
            self.count("not connected", self.waiting.popleft())

    def give_up(self, before: float) -> None:
        super().give_up(before)
        while self.waiting and self.waiting[0] < before:
            self.count("late", self.waiting.popleft())

    async def measure(self) -> dict[str, Any]:
        due = time.perf_counter()
        while due < self.ends:
            now = time.perf_counter()
            while due <= now and due < self.ends:
                self._arrives(due)
                due += self.gap()
            self.give_up(now - self.deadline_s)
            await asyncio.sleep(max(0.001, min(due - now, 0.01)))
        while self.waiting or any(c.due == due for due, c in self.asked):
            self.give_up(time.perf_counter() - self.deadline_s)
            await asyncio.sleep(0.01)
        self.closing = True
        for connection in self.idle:
            connection.transport.close()
        await asyncio.gather(*self.connecting, return_exceptions=True)
        return {
            "rate": self.rate,
            "lag_p99_ms": percentiles(self.lags).get("p99_ms"),  # of this program itself
            **self.result(),
        }


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    found = sorted(latencies)
    shares = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
    return {name: round(1e3 * found[int(share * len(found))], 2) for name, share in shares.items() if found}


async def measure(
    url: str,
    tasks: Sequence[str],
    images: Sequence[bytes],
    *,
    seconds: float,
    connections: int = 8,
    rate: float = 0,
    deadline_ms: float = 0,
    even: bool = False,
    key: str = "",
) -> dict[str, Any]:
    # As many as there are pairs of a task and an image, at most; each task and each image come up equally often.
    turns = range(len(tasks) * len(images))
    known = f"Authorization: Bearer {key}\r\n" if key else ""
    requests = [
        f"POST /v1/tasks/{tasks[n % len(tasks)]}/classify HTTP/1.1\r\nHost: service\r\nContent-Type: image/jpeg\r\n"
        f"{known}Content-Length: {len(images[n // len(tasks)])}\r\n\r\n".encode()
        + images[n // len(tasks)]
        for n in turns
    ]
    deadline_s = deadline_ms / 1e3 or 30.0
    if rate:
        return await Open(url, requests, seconds, deadline_s, rate, even).measure()
    return await Closed(url, requests, seconds, deadline_s, connections).measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("task_and_images", nargs="+", metavar="TASK|IMAGE", help="the task, unless --tasks; images")
    parser.add_argument("--tasks", help="several tasks in turn, with commas between")
    parser.add_argument("--connections", type=int, default=8, help="of the closed loop")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=0, help="arrivals per second: the open loop")
    parser.add_argument("--deadline-ms", type=float, default=0, help="when a client gives up; 30 s if not set")
    parser.add_argument("--even", action="store_true", help="arrivals of the open loop at equal distances")
    given = parser.parse_args()
    tasks = given.tasks.split(",") if given.tasks else [given.task_and_images.pop(0)]
    images = [Path(path).read_bytes() for path in given.task_and_images]
    if not images:
        parser.error("name at least one image")
    options = {name: getattr(given, name) for name in ("connections", "seconds", "rate", "deadline_ms", "even")}
    key = os.environ.get("FEWSHOT_KEY", "")
    print(json.dumps(run(measure(given.url, tasks, images, key=key, **options))))


if __name__ == "__main__":
    main()
