"""`python -m service`: reads the settings, starts the server, prints an address and a command that works."""

from __future__ import annotations

import os
import sys

# One thread for the small products of heads and learners: the lanes already use every core. Read by numpy when it is
# first imported, so it stands before everything else.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import asyncio  # noqa: E402
import faulthandler  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402
from types import FrameType  # noqa: E402

import uvicorn  # noqa: E402

from models.artifact import MANIFEST  # noqa: E402
from models.errors import ArtifactInvalid, FewshotError  # noqa: E402
from service import logs  # noqa: E402
from service.metrics import Metrics  # noqa: E402
from service.settings import Settings, SettingsError, overlooked, read, spelled  # noqa: E402
from service.web.app import create_app  # noqa: E402
from service.web.connections import Door, room  # noqa: E402

log = logging.getLogger("fewshot")
SAMPLE = Path(__file__).resolve().parent / "sample"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
GRACE_S = 25  # for what is in hand when the service is asked to stop
HANGING_S = 3  # and then for what does not end: a lane in a call that never returns
BROKEN_S = 5.0  # for an extractor that fails to recover, before the service ends to be started anew
LAST_S = 0.1  # for the requests of connections that were taken just before the end


class Server(uvicorn.Server):
    """uvicorn, with a word for people once it listens."""

    def __init__(self, config: uvicorn.Config, settings: Settings):
        super().__init__(config)
        self.settings = settings
        self.broken = False
        self._broken_since = math.inf

    async def on_tick(self, counter: int) -> bool:
        """Ends a service whose lanes have died or whose extractor fails at everything, as that of a lost GPU does."""
        alive = self.lifespan.state.get("alive", lambda: True)
        if alive():
            self._broken_since = math.inf
        elif not self.should_exit:
            self._broken_since = min(self._broken_since, time.monotonic())
            if time.monotonic() - self._broken_since > BROKEN_S:
                log.error("The extractor does not work any more: the service ends, to be started again.")
                self.broken = self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            # What was made up to here stays. The collector would go through all of it every now and then, some 30 ms in
            # which nobody is answered.
            gc.collect()
            gc.freeze()
            logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
            with suppress(OSError):  # a full disk, or nobody who reads: no reason not to serve
                print(welcome(self.settings, self.servers[0].sockets[0].getsockname()[1]), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Not ready, but at work, until those who send requests here have found out; then uvicorn's own end.

        Each answer from here on closes its connection, so that a proxy has none left to use when the end comes.
        """
        end = threading.Timer(self.settings.drain_s + GRACE_S + HANGING_S, give_up)
        end.daemon = True
        end.start()
        self.lifespan.state["stopping"] = True
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        await asyncio.sleep(self.settings.drain_s)
        came = [
            connection for server in self.servers for listener in server.sockets for connection in waiting(listener)
        ]
        for server in self.servers:
            server.close()
        for connection in came:
            await asyncio.get_running_loop().connect_accepted_socket(self.protocol, connection)
        await asyncio.sleep(LAST_S)
        await super().shutdown(sockets)

    def protocol(self) -> asyncio.Protocol:
        kind = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Asked again: at once. What was acknowledged is on disk, and the rest is as after a `kill -9`."""
        if self.should_exit:
            end_at_once(0)
        super().handle_exit(sig, frame)


def waiting(listener: socket.socket) -> list[socket.socket]:
    """Connections that nobody has accepted yet. With their listener they would end, requests and all."""
    found = []
    with suppress(BlockingIOError), socket.socket(fileno=os.dup(listener.fileno())) as same:
        while True:
            found.append(same.accept()[0])
    return found


def give_up() -> None:
    log.error("Something does not end; it is left behind.")
    end_at_once(1)


def end_at_once(status: int) -> None:
    """Whatever else is under way; but the log's last lines are written, where somebody takes them."""
    end_log()
    os._exit(status)


def end_log() -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logs.Later):
            handler.end()


def last_word(text: str) -> None:
    """Why there is no service, for people: after all that the log has to say, for the last line is what they read."""
    end_log()
    print(text, file=sys.stderr)


def welcome(settings: Settings, port: int) -> str:
    address = settings.address(port)
    sample = os.path.relpath(SAMPLE)
    if json.loads((settings.artifact / MANIFEST).read_bytes())["input"]["kind"] == "text":
        what = "two kinds of text from an example each"
        fields = " -F code='return x + 1' -F prose='It was a dark night.' -F query='if not x: break'"
    else:
        what = "two characters from three examples each"
        fields = "".join(f" -F {label}=@{sample}/{label}/{n}.png" for label in ("alpha", "theta") for n in (1, 2, 3))
        fields += f" -F query=@{sample}/theta/9.png"
    return (
        f"\nfewshot is ready at {address} (API reference: {address}/docs)\n"
        f"Teach it {what}, and ask about a new one, in one call:\n\n"
        f"  curl -s {shlex.quote(address + '/v1/classify')}"  # some shells take brackets for a pattern
        + (' -H "Authorization: Bearer $KEY"' if settings.keys_file else "")
        + f"{fields}\n"
    )


def main() -> int:
    # uvicorn ends its work first and then sends itself the signal again: being asked to stop is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    faulthandler.enable()  # a crash below Python leaves a trace on stderr, and not a status alone
    metrics = Metrics()
    try:
        settings = read()
        lines = logs.configure(settings.log_level)
        for text in overlooked():
            log.warning(text)
        app = create_app(settings, metrics=metrics)
        if settings.keys_file is None:
            open_to = "this computer" if settings.host in LOOPBACK else f"everybody who reaches {settings.host}"
            level = logging.INFO if settings.host in LOOPBACK else logging.WARNING
            log.log(level, "No keys are configured (FEWSHOT_KEYS_FILE): all tasks are open to %s.", open_to)
    except (SettingsError, ArtifactInvalid) as error:
        last_word(f"fewshot cannot start: {error}")
        return 2
    except FewshotError as error:
        last_word(f"fewshot cannot start: {error.detail}")
        return 2
    connections = room(settings.max_connections)
    if connections < settings.max_connections:
        log.warning("At most %d connections: more is not allowed by the limit of open files.", connections)
    door = Door(
        max_connections=connections,
        header_timeout_s=settings.header_timeout_s,
        answer_timeout_s=settings.answer_timeout_s,
        max_unsent_bytes=settings.max_bodies_bytes,
    )
    config = uvicorn.Config(
        app,
        http=door.protocol(),
        ws="none",
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=30,
    )
    server = Server(config, settings)
    metrics.connections.set_function(lambda: len(server.server_state.connections))
    metrics.elsewhere.connections_ended = lambda: door.total
    metrics.elsewhere.log_lines_dropped = lambda: lines.dropped
    # Until it listens, what went wrong is told in one line of ours rather than by uvicorn's traceback.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    try:
        server.run()
    except KeyboardInterrupt:
        return 0
    except SystemExit:
        if server.started:
            return int(server.broken)
        if server.lifespan.should_exit:  # the store or the lanes; that has been told
            return 2
        last_word(
            f"fewshot cannot listen on {spelled(settings.host)}:{settings.port}: is the port taken? "
            f"FEWSHOT_PORT (make run PORT=...) chooses another."
        )
        return 3
    return int(server.broken) if server.started else 2


if __name__ == "__main__":
    sys.exit(main())
