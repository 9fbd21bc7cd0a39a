"""Who is asking: puts the tenant's view of the store on each request, before any route sees it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from service.stores import Scope, Store

TENANT = "default"  # whose tasks they are where no keys are configured


class Access:
    def __init__(self, app: ASGIApp, store: Store):
        self.app = app
        self.store = store

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["tenant"] = self.store.scope(TENANT)
        await self.app(scope, receive, send)


def scope_of(request: Request) -> Scope:
    scope: Scope = request.state.tenant
    return scope
