"""Errors on the wire: class -> status, in one table, and the body in the dialect of the path.

RFC 9457 everywhere but under /v2, where the Open Inference Protocol asks for `{"error": "..."}` and for a 400 where
we say 422. The only place that gives errors a status. No body holds an exception's text other than the sentences that
the project wrote itself, nor anything of the request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from models import errors

STATUS: Mapping[type[errors.FewshotError], tuple[int, str]] = {
    errors.Unauthorized: (401, "A key is needed"),
    errors.Forbidden: (403, "The key does not allow this"),
    errors.OverQuota: (429, "The quota of the key is used up"),
    errors.InvalidRequest: (422, "The request cannot be read"),
    errors.InvalidSupport: (422, "The support set cannot be learned from"),
    errors.UndecodableExample: (422, "An image cannot be read"),
    errors.UnknownMethod: (422, "Unknown method"),
    errors.TooLarge: (413, "A limit was passed"),
    errors.UnsupportedMedia: (415, "Unsupported media type"),
    errors.BodyTimeout: (408, "The body came too slowly"),
    errors.TaskNotFound: (404, "No such task"),
    errors.ExampleNotFound: (404, "No such example"),
    errors.ClassNotFound: (404, "No such class"),
    errors.VersionNotFound: (404, "No such version"),
    errors.NotRetained: (409, "The images were not kept"),
    errors.ExportRefused: (409, "The task cannot be exported"),
    errors.InFlight: (409, "The first request is still at work"),
    errors.IdempotencyMismatch: (422, "The idempotency key was used for another request"),
    errors.TaskStale: (409, "The task belongs to another artifact"),
    errors.VersionConflict: (412, "The task has moved"),
    errors.Overloaded: (503, "Too busy"),
    errors.StoreUnavailable: (503, "The store does not answer"),
    errors.ExtractorFailed: (500, "The extractor failed"),
}
MEDIA_TYPE = "application/problem+json"
OPEN_INFERENCE = re.compile(r"/v2(/|$)")


class Problem(Response):
    """An error as an answer. Whose dialect it speaks is settled when it is sent, which is when the path is known."""

    def __init__(self, body: Mapping[str, Any], headers: Mapping[str, str]):
        super().__init__(json.dumps(body), body["status"], media_type=MEDIA_TYPE, headers=headers)
        self.problem = body
        self.extra = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not OPEN_INFERENCE.match(scope["path"]):
            await super().__call__(scope, receive, send)
            return
        index = self.problem.get("index")
        detail = self.problem["detail"] if index is None else f"Image {index}: {self.problem['detail']}"
        status = 400 if self.status_code == 422 else self.status_code
        response = Response(
            json.dumps({"error": detail}), status, media_type="application/json", headers=dict(self.extra)
        )
        await response(scope, receive, send)


def problem(
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    request_id: str,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Response:
    """An RFC 9457 answer; `type` is a stable URN made from the code."""
    body = {
        "type": f"urn:fewshot:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request_id,
        **{key: value for key, value in members.items() if value is not None},
    }
    return Problem(body, dict(headers or {}))


def of_error(error: errors.FewshotError, *, request_id: str) -> Response:
    status, title = STATUS[type(error)]
    headers = {}
    if isinstance(error, (errors.Overloaded, errors.StoreUnavailable, errors.InFlight, errors.OverQuota)):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="fewshot"'
    return problem(
        status,
        error.code,
        title,
        error.detail,
        request_id=request_id,
        headers=headers,
        index=error.index,
        pointer=error.pointer,
    )


def of_bug(*, request_id: str) -> Response:
    detail = "Something is wrong here; the log has more."
    return problem(500, "internal_error", "Internal error", detail, request_id=request_id)


def of_status(
    status: int, detail: str, *, path: str, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    """For what the router itself refuses: unknown paths and methods."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
    hint = ""
    if status == 404:
        slash = ", no route ends with a slash" if path.endswith("/") else ""
        hint = f": there is no such route{slash}; /docs shows those there are"
    elif headers and "Allow" in headers:
        hint = f": this route takes {headers['Allow']}"
    return problem(status, code, detail, f"{detail}{hint}.", request_id=request_id, headers=headers)
