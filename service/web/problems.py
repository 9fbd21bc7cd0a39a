"""Errors on the wire: class -> status, in one table, and the RFC 9457 body.

The only place that gives errors a status. No body holds an exception's text other than the sentences that the project
wrote itself, nor anything of the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from models import errors

STATUS: Mapping[type[errors.FewshotError], tuple[int, str]] = {
    errors.InvalidRequest: (422, "The request cannot be read"),
    errors.InvalidSupport: (422, "The support set cannot be learned from"),
    errors.UndecodableExample: (422, "An image cannot be read"),
    errors.UnknownMethod: (422, "Unknown method"),
    errors.TooLarge: (413, "A limit was passed"),
    errors.UnsupportedMedia: (415, "Unsupported media type"),
    errors.BodyTimeout: (408, "The body came too slowly"),
    errors.TaskNotFound: (404, "No such task"),
    errors.TaskStale: (409, "The task belongs to another artifact"),
    errors.VersionConflict: (412, "The task has moved"),
    errors.Overloaded: (503, "Too busy"),
    errors.StoreUnavailable: (503, "The store does not answer"),
    errors.ExtractorFailed: (500, "The extractor failed"),
}
MEDIA_TYPE = "application/problem+json"


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
    return Response(json.dumps(body), status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def of_error(error: errors.FewshotError, *, request_id: str) -> Response:
    status, title = STATUS[type(error)]
    headers = {}
    if isinstance(error, (errors.Overloaded, errors.StoreUnavailable)):
        headers["Retry-After"] = str(error.retry_after)
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


def of_status(status: int, detail: str, *, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """For what the router itself refuses: unknown paths and methods."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
    return problem(status, code, detail, detail + ".", request_id=request_id, headers=headers)
