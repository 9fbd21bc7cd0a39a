"""`Idempotency-Key`: a change that is asked for twice is made once, and answered twice.

The key is remembered beside the task, for a day, with a fingerprint of the request and, when it was answered, the
answer (the IETF draft "The Idempotency-Key HTTP Header Field"). What failed is not remembered: a retry may succeed.
Beside one task there is room for so much (`stores.MOST_REMEMBERED_BYTES`): what no longer fits counts as never asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from models.errors import FewshotError, IdempotencyMismatch, InFlight, InvalidRequest
from service.stores import Scope, SealBroken
from service.support import task_name
from service.web.access import scope_of

KEY = "idempotency-key"
ANSWER_S = 24 * 3600
CLAIM_S = 60  # whoever dies at work stands in the way for so long
LONGEST = 255
REPLAYED = ("content-type", "etag", "location", "preference-applied")
WHERE = ("if-match", "if-none-match")  # what a request asks for beside its address and body
BOUNDARY = re.compile(r"""multipart/form-data;.*\bboundary="?([^";]+)""", re.IGNORECASE)


async def once(
    request: Request, task: str, work: Callable[[], Awaitable[Response]], *, makes: bool = False
) -> Response:
    """Does the work, or answers what it answered before. `makes`: the task need not be there.

    Raises InFlight while another request with the key is at work, IdempotencyMismatch when that one asked something
    else.
    """
    given = request.headers.get(KEY)
    if given is None:
        return await work()
    if not given or len(given) > LONGEST or not given.isprintable():
        raise InvalidRequest(f"An Idempotency-Key has 1 to {LONGEST} printable characters.")
    scope, key = scope_of(request), hashlib.sha256(given.encode()).hexdigest()
    fingerprint = _fingerprint(request, await request.body())
    task_name(task)
    with suppress(SealBroken):  # damaged: the work says so, in its own words
        if not makes and await scope.pointer(task) is None:
            return await work()  # nothing is kept beside a task that is not there, and may never be
    claim = json.dumps({"fingerprint": fingerprint}).encode()
    while not await scope.remember(task, key, claim, ttl_s=CLAIM_S, new=True):
        found = await scope.recall(task, key)
        before: dict[str, Any] = _unpacked(found) if found else {"fingerprint": fingerprint}
        if "status" in before and await _is_gone(scope, task):  # it tells of a task that has ended since
            await scope.forget_remembered(task, key)
            continue
        if before["fingerprint"] != fingerprint:
            raise IdempotencyMismatch("This Idempotency-Key was used for another request; take a new one.")
        if "status" not in before:
            raise InFlight("The first request with this Idempotency-Key is still at work.")
        return Response(before["body"], before["status"], {**before["headers"], "Idempotent-Replayed": "true"})
    try:
        response = await work()
    except BaseException:
        with suppress(FewshotError):
            await scope.forget_remembered(task, key)
        raise
    answer = {
        "fingerprint": fingerprint,
        "status": response.status_code,
        "headers": {name: response.headers[name] for name in REPLAYED if name in response.headers},
    }
    await scope.remember(task, key, _packed(answer, bytes(response.body)), ttl_s=ANSWER_S)
    return response


def _packed(answer: dict[str, Any], body: bytes) -> bytes:
    return zlib.compress(json.dumps(answer).encode() + b"\n" + body, 1)


def _unpacked(value: bytes) -> dict[str, Any]:
    """A claim, or an answer with its body."""
    if value.startswith(b"{"):  # a claim, or an answer as it was written before it was packed
        found: dict[str, Any] = json.loads(value)
        return {**found, "body": base64.b64decode(found.get("body", ""))}
    answer, _, body = zlib.decompress(value).partition(b"\n")
    return {**json.loads(answer), "body": body}


async def _is_gone(scope: Scope, task: str) -> bool:
    with suppress(SealBroken):
        return await scope.pointer(task) is None
    return False


def _fingerprint(request: Request, body: bytes) -> str:
    """Of all that is asked for. A form that is sent again may come with another boundary, which says nothing."""
    asked = json.dumps([request.method, request.url.path, request.url.query, *map(request.headers.get, WHERE)])
    boundary = BOUNDARY.match(request.headers.get("content-type", ""))
    if boundary:
        body = body.replace(b"--" + boundary[1].encode("latin-1"), b"--")
    return hashlib.sha256(asked.encode() + b"\0" + body).hexdigest()
