"""The outermost layer of the app: one plain ASGI callable that every request passes.

Gives each request an id, bounds its body in bytes and in time while it arrives, and all bodies together, adds the
headers that every answer has, counts and logs, and answers 500 for a bug, without a word of what went wrong. Knows
nothing of routes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import BodyTimeout, FewshotError, Overloaded, TooLarge
from service.callers import CallerLeft, has_left, stays, tenant
from service.metrics import Metrics
from service.web import problems

log = logging.getLogger("fewshot.access")
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,64}")
LEFT = 499  # in log and metrics, as of nginx: who asked has hung up, or was let go within a body that broke HTTP
TOO_SLOW = 408
LINGER_S = 5.0  # for who still sends a body that was refused
PROCESS = os.urandom(10).hex()
NUMBERS = itertools.count(1)
ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]


class Boundary:
    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, max_bodies_bytes: int, body_timeout_s: float, metrics: Metrics
    ):
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_bodies_bytes = max_bodies_bytes
        self.held = 0  # bytes of the bodies of all requests that are not answered yet, with what they unpack to
        self._of: dict[str, int] = {}  # the same by tenant
        self.body_timeout_s = body_timeout_s
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # whoever answers GET answers it: the server sends no body after its head
            scope = {**scope, "method": "GET"}
        start = time.perf_counter()
        has_left.set(_hangs_up(receive))
        request_id, declared = _read(scope)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        seen = held = 0
        deadline = start + self.body_timeout_s
        complete = cut = False
        took = 0.0  # where it was answered before its body had come
        status = 0

        async def bounded() -> Message:
            nonlocal seen, complete
            if complete or status:  # whoever asks while an answer goes out wants to know whether the caller is there
                return await receive()
            if _has_come(receive):  # nothing to wait for, and no timer for it
                message = await receive()
            else:
                try:
                    async with asyncio.timeout(max(0.0, deadline - time.perf_counter())):
                        message = await receive()
                except TimeoutError:
                    if status:
                        return await receive()
                    raise BodyTimeout(f"The body did not arrive within {self.body_timeout_s:g} s.") from None
            if status:
                return message
            if message["type"] == "http.disconnect":  # half way: what came is no request
                raise CallerLeft
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                seen += size
                complete = not message.get("more_body", False)
                if seen > self.max_body_bytes:
                    raise _too_large(self.max_body_bytes)
                hold(size)
            return message

        def hold(size: int) -> None:
            """Counts bytes in memory because of this request, up to its answer. Raises Overloaded."""
            nonlocal held
            held += size
            self._hold(tenant.get(), size, own=held)

        async def answer(message: Message) -> None:
            nonlocal status, cut, held, took
            if message["type"] == "http.response.start":
                status = message["status"]
                named = {name for name, _ in message["headers"]}
                always = [header for header in ALWAYS if header[0] not in named]
                headers = [*message["headers"], *always, (b"x-request-id", request_id.encode())]
                total = (time.perf_counter() - start) * 1e3
                timing = f"{state['timing']}, total;dur={total:.1f}" if "timing" in state else f"total;dur={total:.1f}"
                headers.append((b"server-timing", timing.encode()))
                cut = not complete and bool(seen or declared)
                if cut:
                    headers.append((b"connection", b"close"))  # the rest of the body is no use
                message = {**message, "headers": headers}
            elif cut and status != TOO_SLOW and not message.get("more_body"):
                await send({**message, "more_body": True})  # all of it: who sent no more than a head reads it now
                # It is answered: what still comes is dropped, and neither fills the room of others nor is time it took.
                took = time.perf_counter() - start
                self._release(tenant.get(), held)
                held = 0
                await _rest_of_body(receive)
                message = {"type": "http.response.body"}
            await send(message)

        state["hold"] = hold
        try:
            if declared > self.max_body_bytes:
                raise _too_large(self.max_body_bytes)
            await self.app(scope, bounded, answer)
        except CallerLeft:
            status = LEFT
        except FewshotError as error:
            if not status:
                await problems.of_error(error, request_id=request_id)(scope, receive, answer)
        except Exception:  # a bug: the client learns its number, the log the rest
            log.exception("request %s failed", request_id)
            if not status:
                await problems.of_bug(request_id=request_id)(scope, receive, answer)
        finally:
            self._release(tenant.get(), held)
            self._observe(scope, status, took or time.perf_counter() - start, request_id)

    def _hold(self, who: str, size: int, *, own: int) -> None:
        """Counts; beyond the limit only who has less than its share is let in, and up to twice as much in all."""
        self.held += size
        self._of[who] = mine = self._of.get(who, 0) + size
        if own == self.held or self.held <= self.max_bodies_bytes:  # whoever is alone may send as much as one may
            return
        if self.held > 2 * self.max_bodies_bytes or mine > self.max_bodies_bytes / len(self._of):
            most = self.max_bodies_bytes
            raise Overloaded(f"All bodies together have more bytes than the limit of {most} (MAX_BODIES_BYTES).")

    def _release(self, who: str, size: int) -> None:
        self.held -= size
        self._of[who] = self._of.get(who, 0) - size
        if self._of[who] <= 0:
            del self._of[who]

    def _observe(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.observe_answer(route, status, seconds)
        if log.isEnabledFor(logging.INFO):
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "duration_ms": round(seconds * 1e3, 2),
            }
            log.info("request", extra={"fields": fields})


async def _rest_of_body(receive: Receive) -> None:
    """Takes and drops it for a while: a close with bytes unread would cut off the answer (RFC 9112, 9.6)."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass


def _hangs_up(receive: Receive) -> Callable[[], bool]:
    """Whether the caller has hung up, where the server tells: uvicorn notes it at the request."""
    request: Any = getattr(receive, "__self__", None)
    if not hasattr(request, "disconnected"):
        return stays
    # The timer of an idle connection keeps the context of its last request: held from there, the request would keep the
    # connection in turn, and only the garbage collector would find them, at the price of a pause.
    seen = weakref.ref(request)
    return lambda: (found := seen()) is not None and found.disconnected


def _has_come(receive: Receive) -> bool:
    """Whether the whole body is here, where the server tells: uvicorn notes at the request that no more will come."""
    return not getattr(getattr(receive, "__self__", None), "more_body", True)


def _read(scope: Scope) -> tuple[str, int]:
    """The request's id, the caller's own where it is a harmless one, and how long a body it declares (1: unknown)."""
    request_id, declared = "", 0
    for name, value in scope["headers"]:
        if name == b"x-request-id" and not request_id and REQUEST_ID.fullmatch(value):
            request_id = value.decode()
        elif name == b"content-length":
            declared = int(value) if value.isdigit() and len(value) < 20 else 0
        elif name == b"transfer-encoding":
            declared = declared or 1
    # Of our own ids none comes twice. Asking the system for random bytes each time would let go of the interpreter, and
    # under load it is a while until the event loop gets it back.
    return request_id or f"{PROCESS}{next(NUMBERS):012x}", declared


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"The body has more bytes than the limit of {limit} (MAX_BODY_BYTES): send fewer images at once, or smaller "
        "ones; to a task that is there more can be added."
    )
