"""Traffic for faults: requests over raw sockets, many at once, each answer judged; and the nginx of operators.

Knows nothing of faults. A request has failed if it was not answered, not with 2xx, or not with what was expected.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from tests.fakes import picture
from tests.torture.world import RAW, ROOT, support, tool

Judge = Callable[[int, bytes], str]  # of status and body: what is wrong with them, "" for nothing
Asked = tuple[bytes, Judge]
COLOURS = ("red", "blue")


def raw(method: str, path: str, **options: Any) -> bytes:
    """A request as it goes over the wire; `options` as httpx has them."""
    request = httpx.Request(method, f"http://replicas{path}", **options)
    body = request.read()
    headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return f"{method} {path} HTTP/1.1\r\n{headers}\r\n".encode() + body


class Warm:
    """Tasks that are taught once and asked for ever: each question with the one right answer."""

    def __init__(self, http: httpx.Client, *, tasks: int = 4):
        self.heads: dict[str, str] = {}
        self.asked: list[Asked] = []
        for number in range(tasks):
            task = f"warm{number}"
            answer = http.put(f"/v1/tasks/{task}", files=support(number))
            assert answer.status_code == 201, answer.text
            self.heads[task] = answer.json()["head"]
            self.asked += [self._question(task, colour, seed=number) for colour in COLOURS]

    def _question(self, task: str, colour: str, *, seed: int) -> Asked:
        data = raw("POST", f"/v1/tasks/{task}/classify", content=picture(colour, seed=90_000 + seed), headers=RAW)
        head, label = f'"head": "{self.heads[task]}"'.encode(), f'"label": "{colour}"'.encode()

        def judge(status: int, body: bytes) -> str:
            if status != 200:
                return str(status)
            return "" if head in body and label in body else "wrong answer"

        return data, judge

    def question(self, number: int) -> Asked:
        return self.asked[number % len(self.asked)]


class Load(threading.Thread):
    """Sends `ask(0)`, `ask(1)`, ... over so many connections: at a rate a second, or each as soon as it can."""

    def __init__(self, ports: Sequence[int], ask: Callable[[int], Asked], *, connections: int, rate: float = 0):
        super().__init__(daemon=True)
        self._ports = ports
        self._ask = ask
        self._connections = connections
        self._rate = rate
        self._halt = threading.Event()
        self._next = 0
        self.failed: Counter[str] = Counter()
        self.failed_at: list[float] = []
        self.answers: list[tuple[float, float]] = []  # of the good ones: when, after how many seconds
        self.began = 0.0

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        self.join(60)
        assert not self.is_alive(), "a request was never answered"

    @property
    def sent(self) -> int:
        return len(self.answers) + self.failed.total()

    def figures(self, first: float = 0, last: float = 1e9) -> dict[str, float]:
        """Of what was answered between two moments, in seconds since the begin."""
        times = sorted(took for at, took in self.answers if first <= at - self.began < last)
        if not times:
            return {"answers": 0}
        span = min(last, self.answers[-1][0] - self.began) - first
        p50, p99 = (round(1e3 * times[int(share * len(times))], 1) for share in (0.5, 0.99))
        return {"answers": len(times), "per_s": round(len(times) / max(span, 1e-3), 1), "p50_ms": p50, "p99_ms": p99}

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        self.began = time.perf_counter()
        await asyncio.gather(*(self._one(self._ports[k % len(self._ports)]) for k in range(self._connections)))

    async def _one(self, port: int) -> None:
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        while not self._halt.is_set():
            number = self._next
            self._next += 1
            if self._rate:
                await asyncio.sleep(max(0.0, self.began + number / self._rate - time.perf_counter()))
            data, judge = self._ask(number)
            sent = time.perf_counter()
            try:
                if writer is None or reader is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(data)
                status, body, close = await asyncio.wait_for(_answer(reader), 45)
                wrong = judge(status, body)
            except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
                wrong, close = type(error).__name__, True
            now = time.perf_counter()
            if wrong:
                self.failed[wrong] += 1
                self.failed_at.append(now - self.began)
            else:
                self.answers.append((now, now - sent))
            if close and writer is not None:
                await _closed(writer)
                reader = writer = None
            if wrong:
                await asyncio.sleep(0.01)  # a peer that is away is asked again, but not at every turn of the loop
        if writer is not None:
            await _closed(writer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):  # the other side may have cut it off
        await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection ends with it."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = re.search(rb"\r\ncontent-length: *(\d+)", head)
    body = await reader.readexactly(int(length[1])) if length else b""
    return int(head[9:12]), body, length is None or b"\r\nconnection: close" in head


class Nginx:
    """The nginx of deploy/nginx.conf in front of these ports. `retries=False`: without its repeating of requests."""

    def __init__(self, folder: Path, ports: Sequence[int], *, retries: bool = True):
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        text, given = (ROOT / "deploy" / "nginx.conf").read_text(), iter(ports)
        servers = re.findall(r"^ +server 127\.0\.0\.1:\d+.*\n", text, re.M)
        line = re.sub(r":\d+", ":{port}", servers[0])
        text = text.replace("".join(servers), "".join(line.format(port=port) for port in given))
        text = text.replace("listen 8000;", f"listen 127.0.0.1:{self.port};")
        if not retries:
            text = re.sub(r"proxy_next_upstream [^;]+;", "proxy_next_upstream off;", text)
        (folder / "fewshot.conf").write_text(text)
        temporary = "".join(
            f"{kind}_temp_path {kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            ("user root;\n" if os.geteuid() == 0 else "")
            + "daemon off;\nworker_processes 1;\npid nginx.pid;\nerror_log error.log warn;\n"
            + "events { worker_connections 2048; }\n"
            + f"http {{\naccess_log off;\n{temporary}include fewshot.conf;\n}}\n"
        )
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Nginx:
        self._process = subprocess.Popen(
            [tool("nginx"), "-p", str(self._folder), "-e", "error.log", "-c", "nginx.conf"]
        )
        give_up = time.monotonic() + 10
        while True:
            assert self._process.poll() is None, (self._folder / "error.log").read_text()
            assert time.monotonic() < give_up, "nginx does not listen"
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)

    @property
    def resets(self) -> int:
        """Requests that a replica cut off after they were sent to it."""
        return len(re.findall("recv\\(\\) failed|prematurely closed", (self._folder / "error.log").read_text()))

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=40)
