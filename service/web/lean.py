"""The hot route without the framework: one image as a raw body to /v1/tasks/{task}/classify.

A framework's routing, validation and context cost more CPU per request than everything of ours around the extractor.
The general route answers the same and more (a test holds the two equal); whatever is not exactly this case goes there.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from models.errors import FewshotError
from service.engine import Engine
from service.web import answers, bodies, problems

PATH = re.compile(r"/v1/tasks/([A-Za-z0-9_-]{1,64})/classify")
JSON_LINES = bodies.JSON_LINES.encode()
TYPES = (b"image/jpeg", b"image/png", b"image/webp", b"application/octet-stream")
ROUTE = SimpleNamespace(path="/v1/tasks/{task}/classify")


class LeanClassify:
    def __init__(self, app: ASGIApp, engine: Engine, *, reject: float):
        self.app = app
        self.engine = engine
        self.reject = reject

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        task = _task(scope)
        if task is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = ROUTE
        chunks = []
        while True:
            message = await receive()  # the boundary lets no half of a body through
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        response: Response
        try:
            predictions = await self.engine.classify(scope["state"]["tenant"], task, [b"".join(chunks)])
            self.engine.metrics.none_of_these.inc(predictions.none_of_these(self.reject))
            response = answers.predictions(scope["state"], predictions, reject=self.reject)
        except FewshotError as error:
            response = problems.of_error(error, request_id=scope["state"]["request_id"])
        await response(scope, receive, send)


def _task(scope: ASGIScope) -> str | None:
    """The task's name, if this is a request of the lean kind."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["query_string"]:
        return None
    found = PATH.fullmatch(scope["path"])
    if found is None:
        return None
    headers = dict(scope["headers"])
    if headers.get(b"content-type") not in TYPES or JSON_LINES in headers.get(b"accept", b""):
        return None
    if b"content-encoding" in headers:
        return None
    return found[1]
