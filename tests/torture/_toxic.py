"""A TCP proxy that does to a connection what networks do: delays, pieces, silence, cuts and resets. No fault itself.

It runs in a thread with a loop of its own, or, with `async with`, in the loop that is running, which is much faster
where both ends are in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Toxic:
    """What happens to one piece of data, as it was read from one side, on its way to the other."""

    delay_s: float = 0  # before it goes on
    slice: int = 0  # it goes on in pieces of so many bytes
    rate: float = 0  # bytes a second
    share: float = 1  # so much of it arrives
    then: str = ""  # and after that: "cut" (both ways), "cut one way", "reset", "hang"


HARMLESS = Toxic()


class Proxy:
    """Use as a context manager. `down` and `up` choose for each piece of an answer, or a request; set at any time."""

    def __init__(self, port: int):
        self._upstream = port
        self.down: Callable[[], Toxic] = lambda: HARMLESS
        self.up: Callable[[], Toxic] = lambda: HARMLESS
        self.connections = 0  # open now
        self.most = 0  # at once, so far
        self.opened = 0
        self.met = 0  # pieces that met a toxic
        self._stop: Callable[[], object] = lambda: None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._thread.join(10)

    async def _serve(self) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        async with self:
            self._stop = lambda: loop.call_soon_threadsafe(stop.set)
            self._ready.set()
            await stop.wait()

    async def __aenter__(self) -> Proxy:
        self._never = asyncio.get_running_loop().create_future()
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def always(self, toxic: Toxic) -> None:
        """The same for every answer from now on."""
        self.down = lambda: toxic

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connected(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.opened += 1
        self.most = max(self.most, self.connections)
        ends = [writer]
        try:
            with contextlib.suppress(OSError):
                upstream, sink = await asyncio.open_connection("127.0.0.1", self._upstream)
                ends.append(sink)
                ways = [
                    asyncio.create_task(self._pump(upstream, writer, lambda: self.down())),
                    asyncio.create_task(self._pump(reader, sink, lambda: self.up())),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)  # it takes the other way along
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self.connections -= 1
            for end in ends:
                end.transport.abort()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, choose: Callable[[], Toxic]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                toxic = choose()
                if toxic is HARMLESS:
                    sink.write(data)
                    continue
                self.met += 1
                await asyncio.sleep(toxic.delay_s)
                data = data[: int(len(data) * toxic.share)]
                size = toxic.slice or len(data) or 1
                for start in range(0, len(data), size):
                    sink.write(data[start : start + size])
                    await sink.drain()
                    await asyncio.sleep(size / toxic.rate if toxic.rate else 0)
                if toxic.then == "hang":  # both ways are open, and nothing comes any more
                    await asyncio.shield(self._never)
                if toxic.then == "cut one way":  # the sender goes on and is not heard
                    sink.write_eof()
                    while await source.read(1 << 16):
                        pass
                if toxic.then == "reset":
                    raw = sink.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if toxic.then:
                    return
