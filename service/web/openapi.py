"""What the OpenAPI file says beyond what FastAPI finds out: problems by status, and bodies that we read ourselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from service.web import schemas
from service.web.access import PUBLIC, needed


def ref(model: type[BaseModel]) -> dict[str, str]:
    """Where the OpenAPI file has the schema; `complete` puts it there."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/problem+json": {"schema": ref(schemas.Problem)}},
    }
    for status, text in {
        408: "the body came too slowly",
        413: "a limit was passed",
        415: "unsupported media type",
        422: "the request cannot be read or learned from",
        500: "the extractor failed, or a bug",
        503: "too busy, or the store does not answer; see Retry-After",
    }.items()
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {**PROBLEMS[422], "description": "no task of that name"}}
STALE: dict[int | str, dict[str, Any]] = {409: {**PROBLEMS[422], "description": "learned with another artifact"}}
AT_WORK: dict[int | str, dict[str, Any]] = {
    409: {**PROBLEMS[422], "description": "learned with another artifact; or the first request with the key is at work"}
}
NOT_RETAINED: dict[int | str, dict[str, Any]] = {409: {**PROBLEMS[422], "description": "the images were not kept"}}
DENIED: dict[int, dict[str, Any]] = {
    401: {**PROBLEMS[422], "description": "no key, or none that is good here"},
    403: {**PROBLEMS[422], "description": "the key lacks the scope"},
    429: {**PROBLEMS[422], "description": "the key's quota is used up; see Retry-After"},
}
CONFLICT: dict[int | str, dict[str, Any]] = {412: {**PROBLEMS[422], "description": "the task has moved"}}


def _binary(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary"}, "description": description}


_FILE = {"type": "string", "format": "binary"}
_FILES = {"schema": {"type": "object", "additionalProperties": {"anyOf": [_FILE, {"type": "array", "items": _FILE}]}}}


def _either(images: type[BaseModel], texts: type[BaseModel]) -> dict[str, Any]:
    """Which of them it is, is a property of the artifact that is served: see `input` of /v1/artifact."""
    return {"schema": {"anyOf": [ref(images), ref(texts)]}}


def _body(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": dict(content)}}


def optional(body: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {**body["requestBody"], "required": False}}


# Headers that we read ourselves, by operation, and those that answers have.
HEADERS = {
    "If-Match": "the ETag that the task must be at, or several, or `*`: any; 412 where it is not",
    "If-None-Match": "`*`: only where there is no such task; 412 where there is one",
    "Idempotency-Key": "1 to 255 printable characters: a request that is sent again within a day is not done again",
    "Prefer": "`return=minimal`: answered once the change is kept, and learned behind that",
}
UNLESS = {"If-None-Match": "an ETag, or several, or `*`: any; 304 where the task is still at it"}
TERMS = ("If-Match", "Idempotency-Key", "Prefer")
TAKES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("adapt", "adapt_named"), ("If-Match", "If-None-Match", "Idempotency-Key")),
    **dict.fromkeys(("get_task", "export_task"), ("If-None-Match",)),
    "delete_task": ("If-Match",),
    **dict.fromkeys(("add_examples", "remove_example", "remove_class", "change_task", "rollback"), TERMS),
}
ETAG = "version and head of the task"
EXPORT_ETAG = f"{ETAG}, precision, rate of rejection and format"
REPLAYED = "`true`: this was answered before, to the same Idempotency-Key"
RETRY_AFTER = "seconds to wait before it is asked again"


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _with_headers(operation: dict[str, Any]) -> None:
    """Adds what `TAKES` says of an operation, and the headers of its answers."""
    kind = operation["operationId"]
    names = TAKES.get(kind, ())
    told = UNLESS if kind in ("get_task", "export_task") else HEADERS
    operation.setdefault("parameters", []).extend(
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": told[name]}
        for name in names
    )
    for status, answer in operation["responses"].items():
        headers: dict[str, Any] = {}
        if status in ("200", "201", "304") and names:
            headers["ETag"] = _header(EXPORT_ETAG if kind == "export_task" else ETAG)
            if "Idempotency-Key" in names:
                headers["Idempotent-Replayed"] = _header(REPLAYED)
        if status in ("429", "503"):
            headers["Retry-After"] = _header(RETRY_AFTER, "integer")
        if headers:
            operation["responses"][status] = {**answer, "headers": headers}


SUPPORT_BODY = _body(
    {
        "multipart/form-data": {**_FILES, "description": "files; the name of a field is the label"},
        "application/json": _either(schemas.SupportBody, schemas.TextSupportBody),
        "application/x-ndjson": {
            **_either(schemas.SupportLine, schemas.TextSupportLine),
            "description": "one example a line",
        },
        "application/zip": _binary("one folder per label"),
        "application/x-tar": _binary("one folder per label"),
    }
)
ONE_CALL_BODY = _body(
    {
        "multipart/form-data": {**_FILES, "description": "files; fields named `query` are the questions"},
        "application/json": _either(schemas.OneCallBody, schemas.TextOneCallBody),
    }
)
QUERY_BODY = _body(
    {
        "image/jpeg": _binary("one image"),
        "image/png": _binary("one image"),
        "image/webp": _binary("one image"),
        "text/plain": {"schema": {"type": "string"}, "description": "one text, where the artifact reads texts"},
        "application/octet-stream": _binary("one image or text: what the artifact reads"),
        "multipart/form-data": {**_FILES, "description": "files"},
        "application/json": _either(schemas.QueryBody, schemas.TextQueryBody),
        "application/x-ndjson": {
            **_either(schemas.QueryLine, schemas.TextQueryLine),
            "description": "one image or text a line",
        },
    }
)


# Beside the usual form of the answer, which FastAPI knows.
LINES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-ndjson": {"schema": ref(schemas.Prediction), "description": "one a line"}}}
}


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's file, with the schemas that only our own descriptions refer to."""
    known = document["components"]["schemas"]
    images = (schemas.SupportBody, schemas.QueryBody, schemas.OneCallBody, schemas.SupportLine, schemas.QueryLine)
    texts = (
        schemas.TextSupportBody,
        schemas.TextQueryBody,
        schemas.TextOneCallBody,
        schemas.TextSupportLine,
        schemas.TextQueryLine,
    )
    for model in (*images, *texts, schemas.Problem):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        known.update(schema.pop("$defs", {}))
        known[model.__name__] = schema
    return _guarded(document)


def _guarded(document: dict[str, Any]) -> dict[str, Any]:
    """The file, with the scope that each operation needs and what is answered without it."""
    document["components"]["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key, where keys are configured; without them nobody is asked for one.",
        }
    }
    for path, item in document["paths"].items():
        for method, operation in item.items():
            need = needed(method.upper(), path)
            if need != PUBLIC:
                operation["security"] = [{"key": [need]}]
                operation["responses"].update({str(status): answer for status, answer in DENIED.items()})
            _with_headers(operation)
    return document
