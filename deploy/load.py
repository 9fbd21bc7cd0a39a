"""Closed-loop load on one task: each connection sends one image, waits for the answer, sends the next.

    python deploy/load.py http://127.0.0.1:8000 TASK IMAGES... --connections 64 --seconds 10

Prints one JSON line: answers, throughput, percentiles of latency, statuses. Raw sockets and as little work per request
as possible, for it shares the machine with what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

try:
    import uvloop

    run = uvloop.run
except ImportError:
    run = asyncio.run  # type: ignore[assignment]


class Connection(asyncio.Protocol):
    def __init__(self, load: Load, number: int):
        self.load = load
        self.number = number
        self.buffer = b""
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        if time.perf_counter() >= self.load.ends:
            self.transport.close()
            return
        request = self.load.requests[self.number % len(self.load.requests)]
        self.number += 1
        self.sent_at = time.perf_counter()
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
        self.load.answered(int(self.buffer[9:12]), time.perf_counter() - self.sent_at)
        self.buffer = b""
        self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None or time.perf_counter() < self.load.ends:
            self.load.statuses["broken"] += 1
        self.load.open -= 1
        if self.load.open == 0:
            self.load.done.set()


class Load:
    def __init__(self, requests: list[bytes], seconds: float, connections: int):
        self.requests = requests
        self.begins = time.perf_counter() + 0.5  # the first half second fills caches and is not counted
        self.ends = self.begins + seconds
        self.open = connections
        self.done = asyncio.Event()
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()

    def answered(self, status: int, latency: float) -> None:
        if time.perf_counter() > self.begins:
            self.statuses[str(status)] += 1
            self.latencies.append(latency)


async def measure(url: str, task: str, images: list[bytes], *, connections: int, seconds: float) -> dict[str, object]:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    requests = [
        f"POST /v1/tasks/{task}/classify HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/jpeg\r\n"
        f"Content-Length: {len(image)}\r\n\r\n".encode()
        + image
        for image in images
    ]
    loop = asyncio.get_running_loop()
    load = Load(requests, seconds, connections)
    await asyncio.gather(
        *(loop.create_connection(lambda n=n: Connection(load, n), host, port) for n in range(connections))
    )  # type: ignore[misc]
    await asyncio.wait_for(load.done.wait(), seconds + 30)
    latencies = sorted(load.latencies)

    def percentile(share: float) -> float:
        return round(1e3 * latencies[min(len(latencies) - 1, int(share * len(latencies)))], 2)

    return {
        "connections": connections,
        "answers": len(latencies),
        "per_s": round(len(latencies) / seconds, 1),
        "p50_ms": percentile(0.5),
        "p95_ms": percentile(0.95),
        "p99_ms": percentile(0.99),
        "statuses": dict(load.statuses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("task")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    images = [path.read_bytes() for path in given.images]
    print(json.dumps(run(measure(given.url, given.task, images, connections=given.connections, seconds=given.seconds))))


if __name__ == "__main__":
    main()
