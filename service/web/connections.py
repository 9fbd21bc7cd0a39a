"""The connections of the service, bounded: how many there are, how large a head is, how long a client keeps us waiting.

uvicorn waits for ever for the head of a request, on a connection that says nothing, and for a client that does not take
its answer; its heads may be of any size. Here a sweep once a second looks at every connection and ends those that keep
us waiting, so a request costs no timer. When there is no room, one that has said nothing for a while goes for who
comes; where there is none, who comes is told so and let go, without harm to others.
The body has its own deadline (boundary.py).

What breaks the protocol is answered here, in the form of all other problems, and never in the place of an answer that
an earlier request waits for. An offer to upgrade is passed over, as HTTP allows. Knows nothing of the app.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import logging
import math
import selectors
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope

log = logging.getLogger(__name__)
MAX_HEAD_BYTES = 16_384
MAX_HEADERS = 100
MAX_PIPELINED = 16
MOST_FRAMING = 16  # bytes that come for each byte of a body
SWEEP_S = 1.0
AT_ONCE = 500  # connections that are looked at in one go, which takes a tenth of a millisecond or a few
TELL_S = 10.0  # the log hears of what was ended once in so many seconds, however much it was
SILENT_S = 1.0  # without a word, after which a connection may go for one that comes
MOST_SILENT = 1024  # that may go in a second
LEAST = 65_536  # bytes of its answers that a client takes in `answer_timeout_s`, unless there are fewer
LINGER_S = 1.0  # for who was refused to read why: a close with bytes unread would cut that off
MOST_LINGER = 64
USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
RESET = struct.pack("ii", 1, 0)
MOST_JOINED = 65_536  # bytes of a body that are copied to go out with the head; more take a packet of their own anyway
RESERVED = 128  # open files that are no connections: store, lanes, log, those who linger


class Door:
    """What the connections of one server share: their bounds, the sweep, and what the log hears of them."""

    WHY = (
        "found no room",
        "was silent when others came",
        "broke the protocol",
        "did not take an answer",
        "left too much untaken",
        "sent no request",
    )

    def __init__(
        self,
        *,
        max_connections: int,
        header_timeout_s: float,
        answer_timeout_s: float,
        max_unsent_bytes: float = math.inf,
    ):
        self.max_connections = max_connections
        self.max_unsent_bytes = max_unsent_bytes
        self.header_timeout_s = header_timeout_s
        self.answer_timeout_s = answer_timeout_s
        self.ended: Counter[str] = Counter()  # since the log was told
        self._before = Counter(dict.fromkeys(self.WHY, 0))
        self._lingering: set[asyncio.Transport] = set()
        self._silent: list[Connection] = []  # that may go for others, the next one last
        self._looked = -math.inf
        self._unsent: list[Connection] = []  # those the sweep has seen that had something to take
        self._sweeps = False
        self._told = 0.0

    @property
    def total(self) -> Counter[str]:
        """How many were ended or refused since the start, and why."""
        found = self._before.copy()
        found.update(self.ended)
        return found

    def protocol(self) -> type[asyncio.Protocol]:
        """For uvicorn.Config(http=...)."""

        class Ours(Connection):
            door = self

        return Ours

    def enter(self, transport: asyncio.Transport, inside: set[Any], loop: asyncio.AbstractEventLoop) -> bool:
        """Whether there is room for one more; else the client is told, and let go."""
        if not self._sweeps:
            self._sweeps = True
            loop.call_later(SWEEP_S, self._sweep, inside, loop)
        if len(inside) < self.max_connections or self._makes_room(inside):
            return True
        self.ended["found no room"] += 1
        transport.write(NO_ROOM)
        many = len(self._lingering) >= MOST_LINGER
        transport.set_protocol(_Refused(transport, self._lingering))
        if many:
            transport.close()
        else:
            transport.write_eof()
            loop.call_later(LINGER_S, transport.abort)
        return False

    def _makes_room(self, inside: set[Any]) -> bool:
        """Ends a silent connection: first those that never asked anything, of these and of others the longest silent.

        To look at all takes milliseconds, so it is done once a second at most, however many come.
        """
        now = time.monotonic()
        if not self._silent and now - self._looked > SWEEP_S:
            self._looked = now
            resting = ((one.cycle is not None, one.at_rest_since, one) for one in inside)
            found = (one for one in resting if one[1] < now - SILENT_S)
            self._silent = [one for *_, one in heapq.nsmallest(MOST_SILENT, found, key=lambda one: one[:2])][::-1]
        while self._silent:
            one = self._silent.pop()
            if one in inside and one.at_rest_since < now - SILENT_S and not has_said(one.transport):
                self.ended["was silent when others came"] += 1
                inside.discard(one)
                one.transport.close()
                return True
        return False

    def _sweep(self, inside: set[Any], loop: asyncio.AbstractEventLoop, left: list[Any] | None = None) -> None:
        """Looks at every connection once a second, some at a time, so that no request waits for all of them."""
        now = time.monotonic()
        if not left:
            left = list(inside)
            self._silent = [connection for connection in self._silent if connection in inside]
        looked = 0
        while left and looked < AT_ONCE:
            connection = left.pop()
            if connection in inside:
                connection.look(now)
                looked += 1
                if connection.unsent:
                    self._unsent.append(connection)
        if not left:
            self._bound_unsent(inside)
        if self.ended and now - self._told > TELL_S:
            log.warning("Connections were ended: %s.", ", ".join(f"{n} {why}" for why, n in self.ended.most_common()))
            self._before.update(self.ended)
            self.ended.clear()
            self._told = now
        self._sweeps = bool(inside or self.ended)
        if self._sweeps:
            loop.call_later(SWEEP_S / (1 + len(inside) // AT_ONCE), self._sweep, inside, loop, left)

    def _bound_unsent(self, inside: set[Any]) -> None:
        """Ends those who leave most of their answers untaken, until all that is untaken has room in memory.

        Who is alone may leave as much as an answer has.
        """
        there = [one for one in self._unsent if one in inside and one.unsent]
        sizes = sorted(((one.transport.get_write_buffer_size(), n) for n, one in enumerate(there)), reverse=True)
        self._unsent, total = [], sum(size for size, _ in sizes)
        for size, n in sizes if len(sizes) > 1 else ():
            if total <= self.max_unsent_bytes:
                return
            total -= size
            there[n].drop("left too much untaken")


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds."""

    door: ClassVar[Door]
    head = 0  # bytes of a head that does not end; the read it began in counts as one
    in_body = False  # from the end of a head to that of its request
    # Bytes since a request began with nothing before it, those of them that are bodies, and how many requests they are.
    came = 0
    body = 0
    begun = 0
    # What the sweep saw. A request touches none of it.
    silent_since = 0.0
    after: object = None  # the request that the silence follows
    unsent = 0  # bytes that the client had to take when it last was seen to take some
    unsent_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self.door.enter(transport, self.connections, self.loop):
            self.silent_since = time.monotonic()
            super().connection_made(transport)
            if USER_TIMEOUT is not None:  # for what the kernel has taken from us and the client not from the kernel
                timeout = int(1000 * self.door.answer_timeout_s)
                with suppress(OSError):  # no TCP
                    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, USER_TIMEOUT, timeout)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if not self.in_body:
            self.came = self.body = self.begun = 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._pass_over(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(INVALID)
        else:
            if self.scope is not None and "method" not in self.scope:
                self.head += len(data) if self.head else 1
                if self.head > MAX_HEAD_BYTES:
                    self._refuse(LARGE_HEAD)
            elif self.in_body:
                self.came += len(data)
                # Extensions and trailers of chunks are neither body nor head; a chunk of one byte takes six.
                if self.came > 2 * MAX_HEAD_BYTES * max(1, self.begun) + MOST_FRAMING * self.body:
                    self._refuse(INVALID)

    def on_message_begin(self) -> None:
        self.in_body = False
        self.begun += 1
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self.in_body = False
        super().on_message_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_body:  # else it is of a trailer, which nobody asked for and nobody checks (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self.body += len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self.head, self.in_body = 0, True
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if len(self.pipeline) >= MAX_PIPELINED:
            raise OverflowError  # the parser passes it on as an error of its own
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode()  # and comes again, see _pass_over
        elif size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            app, self.app = self.app, _large_head  # it has to wait for its turn
            self._begin()
            self.app = app
        else:
            self._begin()

    def _begin(self) -> None:
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":  # whose answer has nothing but a head
            self.cycle.transport = AtOnce(self.transport, self.loop)  # type: ignore[assignment]

    def _should_upgrade(self) -> bool:
        return True  # says to uvicorn that the rest of this request is not its own, see _pass_over

    def _pass_over(self, rest: bytes) -> None:
        """The same request again without its offer to upgrade, with which the parser gives up its body."""
        if self.scope["method"] == "CONNECT" or not (self.cycle is None or self.cycle.response_complete):
            self._refuse(INVALID)
            return
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.scope["method"].encode(), self.url, version)]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _refuse(self, answer: bytes) -> None:
        """Ends the connection because of what came in on it last; answers to what came before go out first."""
        self.door.ended["broke the protocol"] += 1
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.write(answer)
            self.transport.close()
        elif not cycle.more_body:
            cycle.keep_alive = False
            self.flow.pause_reading()
        elif self.pipeline or cycle.response_started:  # its body is broken, and it is too late to say so
            self.transport.abort()
        else:
            self.transport.write(answer)
            self.transport.close()

    def resume_writing(self) -> None:
        self.unsent = 0
        super().resume_writing()

    @property
    def at_rest_since(self) -> float:
        """Since when nothing is asked on it, and all that was asked is answered and taken; else infinity.

        Who never asked anything and has begun to is no better than who is silent.
        """
        if (self.head and self.cycle is not None) or self.transport.get_write_buffer_size():
            return math.inf
        if self.timeout_keep_alive_task is not None:
            return self.timeout_keep_alive_task.when() - self.timeout_keep_alive
        return self.silent_since if self.cycle is None else math.inf

    def look(self, now: float) -> None:
        """Ends the connection if its client has kept us waiting for too long."""
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            if not self.unsent or unsent <= self.unsent - LEAST:
                self.unsent_since = now
                self.unsent = unsent
            elif now - self.unsent_since > self.door.answer_timeout_s:
                self.drop("did not take an answer")
            else:
                self.unsent = max(self.unsent, unsent)
            return
        self.unsent = 0
        cycle = self.cycle
        if self.timeout_keep_alive_task is not None or not (cycle is None or cycle.response_complete):
            return  # between two requests, where uvicorn has a timer, or at work
        if self.after is not cycle:
            self.after, self.silent_since = cycle, now
        elif now - self.silent_since > self.door.header_timeout_s:
            self.door.ended["sent no request"] += 1
            self.transport.close()

    def drop(self, why: str) -> None:
        self.door.ended[why] += 1
        self.unsent = 0  # none of it will be
        # Closed as usual, the kernel would keep what is unsent for minutes.
        with suppress(OSError, ValueError):  # it has gone by itself; uvloop says so by a number that is none
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()


class AtOnce:
    """A transport that sends the head of an answer and what follows it as one piece, where that follows at once.

    uvicorn writes the two by themselves: two calls of the system, two packets, and a client that is woken twice.
    """

    __slots__ = ("_first", "_held", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport = transport
        self._loop = loop
        self._first = True
        self._held = b""

    def write(self, data: bytes) -> None:
        if self._first:
            self._first, self._held = False, data
            self._loop.call_soon(self._let_go)
        elif self._held:
            held, self._held = self._held, b""
            if len(data) <= MOST_JOINED:
                self._transport.write(held + data)
            else:
                self._transport.write(held)
                self._transport.write(data)
        else:
            self._transport.write(data)

    def _let_go(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._let_go()
        self._transport.close()


def has_said(transport: asyncio.Transport) -> bool:
    """Whether there is something that was sent and not read yet."""
    with selectors.DefaultSelector() as selector:
        selector.register(transport.get_extra_info("socket").fileno(), selectors.EVENT_READ)
        return bool(selector.select(0))


class _Refused(asyncio.Protocol):
    """Who was told to go; what comes from there is dropped."""

    def __init__(self, transport: asyncio.Transport, lingering: set[asyncio.Transport]):
        self._transport = transport
        self._lingering = lingering
        lingering.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lingering.discard(self._transport)


def room(wanted: int) -> int:
    """How many connections fit under the limit of open files, which is raised as far as needed and allowed."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(wanted, max(soft - RESERVED, soft // 2))


def _problem(status: int, code: str, title: str, detail: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an answer that ends its connection."""
    body = {"type": f"urn:fewshot:problem:{code}", "title": title, "status": status, "detail": detail, "code": code}
    content = json.dumps(body).encode()
    headers = {
        "content-type": "application/problem+json",
        "content-length": str(len(content)),
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
        "connection": "close",
        **({"retry-after": "1"} if status == 503 else {}),
    }
    return [(name.encode(), value.encode()) for name, value in headers.items()], content


def _wire(status: int, code: str, title: str, detail: str) -> bytes:
    headers, content = _problem(status, code, title, detail)
    first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()
    return b"\r\n".join([first, *(name + b": " + value for name, value in headers), b"", content])


_LARGE = (
    431,
    "too_large",
    "A limit was passed",
    f"The head of a request may have {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers.",
)
LARGE_HEAD = _wire(*_LARGE)
INVALID = _wire(400, "invalid_request", "The request cannot be read", "The request breaks the rules of HTTP.")
NO_ROOM = _wire(503, "overloaded", "Too busy", "There are as many connections as may be (MAX_CONNECTIONS).")


async def _large_head(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    headers, content = _problem(*_LARGE)
    await send({"type": "http.response.start", "status": 431, "headers": headers, "trailers": False})
    await send({"type": "http.response.body", "body": content, "more_body": False})
