"""One short function per route: parse, call the engine, answer. Everything is in `create_router`'s arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from models.artifact import Artifact
from models.errors import FewshotError, InvalidRequest, VersionConflict
from models.images import FORMATS, MAX_ASPECT, MIN_EDGE
from service.engine import Adapted, Engine, Predictions, Rejected
from service.settings import Settings
from service.stores import Scope, Store
from service.web import schemas
from service.web.bodies import Bounds, read_queries, read_support

TENANT = "default"


def _ref(model: type[BaseModel]) -> dict[str, str]:
    """Where the OpenAPI file has the schema; `app.py` puts it there."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/problem+json": {"schema": _ref(schemas.Problem)}},
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
CONFLICT: dict[int | str, dict[str, Any]] = {412: {**PROBLEMS[422], "description": "the task has moved"}}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdaptOptions(Strict):
    method: str = Field("", max_length=64, description="learner; empty = the default of the service")
    ttl: float | None = Field(None, gt=0, le=10 * 365 * 86400, description="seconds until the task is forgotten")
    on_bad_image: Literal["skip", "fail"] = Field("skip", description="leave unreadable images out, or refuse them all")


class OneCallOptions(Strict):
    method: str = Field("", max_length=64, description="learner; empty = the default of the service")
    on_bad_image: Literal["skip", "fail"] = "skip"


class ClassifyOptions(Strict):
    on_bad_image: Literal["skip", "fail"] = Field("skip", description="an error for each bad image, or refuse them all")


class ListOptions(Strict):
    limit: int = Field(50, ge=1, le=200)
    cursor: str = Field("", max_length=64, description="next_cursor of the page before")


def _binary(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary"}, "description": description}


_FILES = {"schema": {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}}


def _body(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": dict(content)}}


SUPPORT_BODY = _body(
    {
        "multipart/form-data": {**_FILES, "description": "files; the name of a field is the label"},
        "application/json": {"schema": _ref(schemas.SupportBody)},
        "application/zip": _binary("one folder per label"),
        "application/x-tar": _binary("one folder per label"),
    }
)
ONE_CALL_BODY = _body(
    {
        "multipart/form-data": {**_FILES, "description": "files; fields named `query` are the questions"},
        "application/json": {"schema": _ref(schemas.OneCallBody)},
    }
)
QUERY_BODY = _body(
    {
        "image/jpeg": _binary("one image"),
        "image/png": _binary("one image"),
        "image/webp": _binary("one image"),
        "multipart/form-data": {**_FILES, "description": "files"},
        "application/json": {"schema": _ref(schemas.QueryBody)},
    }
)


def create_router(engine: Engine, store: Store, settings: Settings, *, precision: str) -> APIRouter:
    router = APIRouter()
    tenant: Scope = store.scope(TENANT)
    support_bounds = Bounds(
        parts=settings.max_examples + settings.max_queries,
        unpacked=4 * settings.max_body_bytes,
        entry=settings.max_example_bytes,
    )

    @router.post(
        "/v1/tasks",
        operation_id="adapt",
        summary="Learn a task from labelled images",
        status_code=201,
        response_model=schemas.Task,
        openapi_extra=SUPPORT_BODY,
        tags=["tasks"],
        responses={200: {"model": schemas.Task, "description": "known already"}, **PROBLEMS},
    )
    async def adapt(request: Request, options: Annotated[AdaptOptions, Query()]) -> Response:
        given = await read_support(request, support_bounds)
        adapted = await engine.adapt(
            tenant,
            None,
            given.examples,
            unlabelled=given.unlabelled,
            method=_one(options.method, given.method),
            ttl_s=options.ttl,
            on_bad_image=options.on_bad_image,
        )
        return _task(request.scope["state"], adapted, status=201 if adapted.created else 200)

    @router.put(
        "/v1/tasks/{task}",
        operation_id="adapt_named",
        summary="Create or replace a task under a name",
        response_model=schemas.Task,
        openapi_extra=SUPPORT_BODY,
        tags=["tasks"],
        responses={201: {"model": schemas.Task, "description": "created"}, **PROBLEMS, **CONFLICT},
    )
    async def adapt_named(request: Request, task: str, options: Annotated[AdaptOptions, Query()]) -> Response:
        expect = _expected(request)
        given = await read_support(request, support_bounds)
        adapted = await engine.adapt(
            tenant,
            task,
            given.examples,
            unlabelled=given.unlabelled,
            method=_one(options.method, given.method),
            ttl_s=options.ttl,
            expect=expect,
            on_bad_image=options.on_bad_image,
        )
        return _task(request.scope["state"], adapted, status=201 if adapted.created else 200)

    @router.get(
        "/v1/tasks",
        operation_id="list_tasks",
        summary="List tasks by name",
        tags=["tasks"],
        response_model=schemas.TaskList,
        responses={k: v for k, v in PROBLEMS.items() if k in (422, 503)},
    )
    async def list_tasks(options: Annotated[ListOptions, Query()]) -> Response:
        found = await engine.tasks(tenant, limit=options.limit + 1, after=options.cursor)
        more = len(found) > options.limit
        items = [{"task": name, "version": p.version, "head": p.head} for name, p in found[: options.limit]]
        return _json({"items": items, "next_cursor": items[-1]["task"] if more else None})

    @router.get(
        "/v1/tasks/{task}",
        operation_id="get_task",
        summary="Describe a task",
        tags=["tasks"],
        response_model=schemas.Task,
        responses={304: {"description": "not modified"}, 503: PROBLEMS[503], 422: PROBLEMS[422], **NOT_FOUND, **STALE},
    )
    async def get_task(request: Request, task: str) -> Response:
        adapted = await engine.describe(tenant, task)
        if request.headers.get("if-none-match") == _etag(adapted):
            return Response(status_code=304, headers={"ETag": _etag(adapted)})
        return _task(request.scope["state"], adapted, status=200)

    @router.delete(
        "/v1/tasks/{task}",
        operation_id="delete_task",
        summary="Forget a task",
        status_code=204,
        tags=["tasks"],
        responses={503: PROBLEMS[503], 422: PROBLEMS[422], **NOT_FOUND},
    )
    async def delete_task(task: str) -> Response:
        await engine.forget(tenant, task)
        return Response(status_code=204)

    @router.post(
        "/v1/tasks/{task}/classify",
        operation_id="classify",
        summary="Classify images with a task",
        response_model=schemas.Predictions,
        openapi_extra=QUERY_BODY,
        tags=["classify"],
        responses={**PROBLEMS, **NOT_FOUND, **STALE},
    )
    async def classify(request: Request, task: str, options: Annotated[ClassifyOptions, Query()]) -> Response:
        payloads = await read_queries(request, support_bounds)
        predictions = await engine.classify(tenant, task, payloads, on_bad_image=options.on_bad_image)
        return answer_predictions(request.scope["state"], predictions)

    @router.post(
        "/v1/classify",
        operation_id="classify_once",
        summary="Support set and questions in one call",
        response_model=schemas.Predictions,
        openapi_extra=ONE_CALL_BODY,
        tags=["classify"],
        responses=PROBLEMS,
    )
    async def classify_once(request: Request, options: Annotated[OneCallOptions, Query()]) -> Response:
        given = await read_support(request, support_bounds, with_queries=True)
        predictions, rejected = await engine.classify_once(
            given.examples,
            given.queries,
            unlabelled=given.unlabelled,
            method=_one(options.method, given.method),
            on_bad_image=options.on_bad_image,
        )
        return answer_predictions(request.scope["state"], predictions, rejected)

    @router.get(
        "/v1/artifact",
        operation_id="get_artifact",
        summary="What is served, and how well it does",
        response_model=schemas.ArtifactInfo,
        tags=["service"],
    )
    async def get_artifact() -> Response:
        return _json(_artifact(engine.artifact, engine.default_method, precision))

    @router.get(
        "/v1/limits",
        operation_id="get_limits",
        summary="Every limit in force",
        tags=["service"],
        response_model=schemas.LimitsInfo,
    )
    async def get_limits() -> Response:
        names = set(schemas.LimitsInfo.model_fields) & set(Settings.model_fields)
        limits = {name: getattr(settings, name) for name in sorted(names)}
        return _json({**limits, "min_edge": MIN_EDGE, "max_aspect": MAX_ASPECT, "formats": list(FORMATS)})

    @router.get(
        "/healthz", operation_id="live", summary="The process runs", response_model=schemas.Health, tags=["service"]
    )
    async def live() -> Response:
        return _json({"status": "ok"})

    @router.get(
        "/readyz",
        operation_id="ready",
        summary="The extractor runs; the store may be away",
        response_model=schemas.Health,
        tags=["service"],
        responses={503: {"model": schemas.Health, "description": "the lanes have stopped"}},
    )
    async def ready() -> Response:
        lane, up = engine.batcher.alive, await store.ping()
        engine.metrics.store_up.set(up)
        status = "unavailable" if not lane else "ok" if up else "degraded"
        return _json({"status": status, "lane": lane, "store": up}, status=200 if lane else 503)

    @router.get(
        "/metrics",
        operation_id="metrics",
        summary="Prometheus metrics",
        tags=["service"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        engine.metrics.waiting.set(engine.batcher.waiting)
        return Response(engine.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _one(option: str, body: str) -> str:
    if option and body and option != body:
        raise InvalidRequest("`method` is given twice, and differently, in the query string and in the body.")
    return option or body


def _expected(request: Request) -> int | None:
    """The version that If-Match or If-None-Match ask for: see Scope.commit."""
    none_match, match = request.headers.get("if-none-match"), request.headers.get("if-match")
    if none_match == "*" and match is None:
        return 0
    if none_match is not None:
        raise InvalidRequest("If-None-Match takes only '*' here.")
    if match is None:
        return None
    version = match.strip('"').split("-")[0].removeprefix("v")
    if not version.isdecimal() or len(version) > 18:
        raise VersionConflict("If-Match is no ETag of a task.")
    return int(version)


def _etag(adapted: Adapted) -> str:
    return f'"v{adapted.pointer.version}-{adapted.pointer.head}"'


def _json(body: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, media_type="application/json", headers=dict(headers or {}))


def _timing(state: MutableMapping[str, Any], timings_ms: Mapping[str, float]) -> dict[str, float]:
    state["timing"] = ", ".join(f"{name};dur={value:.2f}" for name, value in timings_ms.items())
    return {name: round(value, 3) for name, value in timings_ms.items()}


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _rejected(rejected: tuple[Rejected, ...]) -> list[dict[str, Any]]:
    return [{"index": item.index, "code": item.code, "detail": item.detail} for item in rejected]


def _task(state: MutableMapping[str, Any], adapted: Adapted, *, status: int) -> Response:
    record, pointer = adapted.record, adapted.pointer
    counts = [0] * len(record.labels)
    for index in record.classes:
        counts[index] += 1
    body = {
        "task": adapted.task,
        "version": pointer.version,
        "head": pointer.head,
        "artifact": record.artifact,
        "method": record.method,
        "classes": [{"label": label, "shots": n} for label, n in zip(record.labels, counts, strict=True)],
        "examples": [
            {"id": example, "label": record.labels[index]}
            for example, index in zip(record.ids, record.classes, strict=False)  # unlabelled ids follow
        ],
        "unlabelled": len(record.unlabelled),
        "rejected": _rejected(adapted.rejected),
        "created_at": _time(record.created),
        "expires_at": _time(record.expires),
        "timings_ms": _timing(state, adapted.timings_ms),
    }
    headers = {"ETag": _etag(adapted)}
    if status == 201:
        headers["Location"] = f"/v1/tasks/{adapted.task}"
    return _json(body, status=status, headers=headers)


def answer_predictions(
    state: MutableMapping[str, Any], found: Predictions, rejected: tuple[Rejected, ...] = ()
) -> Response:
    labels = found.head.labels
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(found.rows):
        if isinstance(row, FewshotError):
            rows.append({"index": index, "error": {"index": index, "code": row.code, "detail": row.detail}})
            continue
        values = [round(value, 6) for value in row.tolist()]
        best = int(row.argmax())
        rows.append(
            {
                "index": index,
                "label": labels[best],
                "probability": values[best],
                "probabilities": dict(zip(labels, values, strict=True)),
            }
        )
    body = {
        "task": found.task,
        "version": found.pointer.version if found.pointer else None,
        "head": found.head_id,
        "stale": found.pointer.stale if found.pointer else False,
        "predictions": rows,
        "rejected": _rejected(rejected),
        "timings_ms": _timing(state, found.timings_ms),
    }
    return _json(body)


def _artifact(artifact: Artifact, default: str, precision: str) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "digest": artifact.digest,
        "name": manifest.name,
        "description": manifest.description,
        "input": dict(manifest.input),
        "dim": manifest.dim,
        "methods": [
            {"name": name, "default": name == default, "unlabelled": name != "ridge"} for name in manifest.methods
        ],
        "precision": precision,
        "accuracy": [dict(row) for row in manifest.accuracy],
        "training": dict(manifest.training),
    }
