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
NOT_RETAINED: dict[int | str, dict[str, Any]] = {409: {**PROBLEMS[422], "description": "the images were not kept"}}
DENIED: dict[int, dict[str, Any]] = {
    401: {**PROBLEMS[422], "description": "no key, or none that is good here"},
    403: {**PROBLEMS[422], "description": "the key lacks the scope"},
    429: {**PROBLEMS[422], "description": "the key's quota is used up; see Retry-After"},
}
CONFLICT: dict[int | str, dict[str, Any]] = {412: {**PROBLEMS[422], "description": "the task has moved"}}


def _binary(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary"}, "description": description}


_FILES = {"schema": {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}}


def _either(images: type[BaseModel], texts: type[BaseModel]) -> dict[str, Any]:
    """Which of them it is, is a property of the artifact that is served: see `input` of /v1/artifact."""
    return {"schema": {"anyOf": [ref(images), ref(texts)]}}


def _body(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": dict(content)}}


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
        "multipart/form-data": {**_FILES, "description": "files"},
        "application/json": _either(schemas.QueryBody, schemas.TextQueryBody),
        "application/x-ndjson": {
            **_either(schemas.QueryLine, schemas.TextQueryLine),
            "description": "one image or text a line",
        },
    }
)


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
    return document
