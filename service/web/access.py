"""Who is asking, and may they: a layer that every request passes before any route sees it, so that none is forgotten.

With keys, a request needs one that is good and has the scope that its method and path need; what stands in no line of
the table needs `admin`. It then goes on with its tenant's view of the store and the allowance of its key. Without keys
everything belongs to one tenant, and pages of others change nothing (origins.py). Knows nothing of how keys are kept,
nor of what routes do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ASGIScope

from models.errors import FewshotError, Forbidden, Unauthorized
from service import callers, quota
from service.keys import Key, Keyring
from service.quota import Allowance
from service.stores import Scope, Store
from service.web import origins, problems

TENANT = "default"  # whose tasks they are where no keys are configured

# What a method on a path needs: the first line that fits.
PUBLIC = "public"
READ = "GET"
TABLE = [
    ("POST", r"/v1/tasks/[^/]+/classify", "classify"),
    (READ, r"/|/healthz|/readyz|/v2/health/(live|ready)|/openapi\.json|/docs(/[^/]+)?|/(page|offline)/[^/]+", PUBLIC),
    (READ, r"/metrics", "admin"),
    (READ, r"/v[12](/.*)?", "classify"),
    ("POST", r"/v1/(classify|embed)", "classify"),
    ("POST", r"/v2/(models/[^/]+(/versions/[^/]+)?/infer|repository/index)", "classify"),
    ("POST PUT PATCH DELETE", r"/v1/tasks(/.*)?", "adapt"),
]
# Who may change a task may use it too.
ENOUGH: Mapping[str, frozenset[str]] = {
    "classify": frozenset({"classify", "adapt"}),
    "adapt": frozenset({"adapt"}),
    "admin": frozenset({"admin"}),
}
_RULES = [(frozenset(methods.split()), re.compile(path), need) for methods, path, need in TABLE]


def needed(method: str, path: str) -> str:
    """The scope that a request needs, or PUBLIC."""
    for methods, pattern, need in _RULES:
        if method in methods and pattern.fullmatch(path):
            return need
    return "admin"


class Access:
    def __init__(
        self, app: ASGIApp, store: Store, keyring: Keyring | None = None, *, allowed: frozenset[str] = frozenset()
    ):
        """`allowed`: origins whose pages may change tasks without a key."""
        self.app = app
        self.store = store
        self.keyring = keyring
        self.allowed = allowed
        self._allowances: dict[str, Allowance] = {}

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none, and none gets past the keys
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            if self.keyring is None:
                at, _ = scope.get("server") or ("", None)
                method, headers = scope["method"], dict(scope["headers"])
                private = needed(method, scope["path"]) != PUBLIC
                if private and (said := origins.refusal(method, headers, at, self.allowed)):
                    answer = problems.of_error(Forbidden(said), request_id=scope["state"]["request_id"])
                    await answer(scope, receive, send)
                    return
                scope["state"]["tenant"] = self.store.scope(TENANT)
            else:
                need = needed(scope["method"], scope["path"])
                if need != PUBLIC:  # what is public is nobody's, and finds no tenant
                    await self._admitted(scope, receive, send, self.keyring.check(presented(scope["headers"])), need)
                    return
        await self.app(scope, receive, send)

    async def _admitted(self, scope: ASGIScope, receive: Receive, send: Send, key: Key, need: str) -> None:
        """Goes on in the name of a key that is good."""
        allowance = self._allowance(key)
        quota.current.set(allowance)
        if allowance is not None:
            send = _telling(send, allowance)
        if ENOUGH[need].isdisjoint(key.scopes):
            error: FewshotError = Forbidden(f"This needs a key with the scope `{need}`.")
            await problems.of_error(error, request_id=scope["state"]["request_id"])(scope, receive, send)
            return
        scope["state"]["tenant"] = self.store.scope(key.tenant)
        callers.tenant.set(key.tenant)
        await self.app(scope, receive, send)

    def _allowance(self, key: Key) -> Allowance | None:
        if key.quota is None:
            return None
        found = self._allowances.get(key.id)
        if found is None or found.quota != key.quota:
            found = self._allowances[key.id] = Allowance(key.quota)
        return found


def presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key of a request. Raises Unauthorized when there is none, or more than one."""
    found = [value for name, value in headers if name == b"authorization"]
    if not found:
        raise Unauthorized("Send a key in the header `Authorization: Bearer ...`.")
    scheme, _, token = found[0].partition(b" ")
    if len(found) > 1 or scheme.lower() != b"bearer":
        raise Unauthorized("Send one header `Authorization: Bearer ...` with a key, and no other.")
    return token.strip(b" ")


def _telling(send: Send, allowance: Allowance) -> Send:
    """Tells on the answer what is left of the allowance (draft-ietf-httpapi-ratelimit-headers)."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            left, seconds = allowance.left()
            policy, now = f'"default";q={allowance.quota};w={quota.WINDOW_S}', f'"default";r={left};t={seconds}'
            limits = [(b"ratelimit-policy", policy.encode()), (b"ratelimit", now.encode())]
            message = {**message, "headers": [*message["headers"], *limits]}
        await send(message)

    return told


def scope_of(request: Request) -> Scope:
    scope: Scope = request.state.tenant
    return scope
