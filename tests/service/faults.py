"""A service that fails when it is told to: an app around the real one, and what was asked of it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Faults:
    """Each request takes the next fault, if there is one:

    "cut"          the connection ends before the request is heard
    "lose answer"  the request is done, and the connection ends before its answer
    "wait 0.5"     nothing is answered for so many seconds
    "503 0.2"      that status, with so many seconds of Retry-After; "502" without, in a proxy's words
    """

    app: ASGIApp
    next: deque[str] = field(default_factory=deque)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, idempotency key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        key = dict(scope["headers"]).get(b"idempotency-key", b"").decode()
        self.asked.append((scope["method"], scope["path"], key))
        fault = self.next.popleft() if self.next else ""
        if fault in ("cut", "lose answer"):
            if fault == "lose answer":
                await self.app(scope, receive, _nowhere)
            # An answer that is shorter than it says: the server can do no more than close the connection.
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
            return
        if fault.startswith("wait"):
            await asyncio.sleep(float(fault.split()[1]))
        elif fault:
            status, *seconds = fault.split()
            headers = {"Retry-After": seconds[0]} if seconds else {}
            await Response("<h1>Not now</h1>", int(status), headers, "text/html")(scope, receive, send)
            return
        await self.app(scope, receive, send)


async def _nowhere(_: Message) -> None:
    pass
