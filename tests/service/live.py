"""A real server on a free port, in a thread of the test process."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.types import ASGIApp

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # for addresses without TLS: to read whom to trust takes its time


class Server(uvicorn.Server):
    """Ends as soon as it is told, and not with its next look, a tenth of a second apart, at whether it was."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Event()
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._told.wait()

    def stop(self) -> None:
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._told.set)


@contextmanager
def running(server: Server, *sockets: socket.socket) -> Iterator[None]:
    """Runs it in a thread of its own, until the block ends."""
    thread = threading.Thread(target=server.run, args=(list(sockets) or None,))
    thread.start()
    try:
        assert server.listening.wait(10)
        yield
    finally:
        server.stop()
        thread.join(15)
        assert not thread.is_alive()


@contextmanager
def served(app: ASGIApp) -> Iterator[httpx.Client]:
    """An HTTP client of the app; the app's lifespan is that of the block."""
    server = Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    with running(server):
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, verify=PLAIN) as client:
            yield client
