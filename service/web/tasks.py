"""Routes about tasks: learn, describe, list, forget. Parse, call the engine, answer."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from models.errors import InvalidRequest, VersionConflict
from service.engine import Engine
from service.web import answers, schemas
from service.web.access import scope_of
from service.web.bodies import Bounds, one_of, read_support
from service.web.openapi import CONFLICT, NOT_FOUND, PROBLEMS, STALE, SUPPORT_BODY


class AdaptOptions(schemas.Closed):
    method: str = Field("", max_length=64, description="learner; empty = the default of the service")
    ttl: float | None = Field(None, gt=0, le=10 * 365 * 86400, description="seconds until the task is forgotten")
    on_bad_image: Literal["skip", "fail"] = Field("skip", description="leave unreadable images out, or refuse them all")


class ListOptions(schemas.Closed):
    limit: int = Field(50, ge=1, le=200)
    cursor: str = Field("", max_length=64, description="next_cursor of the page before")


def create_router(engine: Engine, bounds: Bounds) -> APIRouter:
    router = APIRouter(tags=["tasks"])

    @router.post(
        "/v1/tasks",
        operation_id="adapt",
        summary="Learn a task from labelled images",
        status_code=201,
        response_model=schemas.Task,
        openapi_extra=SUPPORT_BODY,
        responses={200: {"model": schemas.Task, "description": "known already"}, **PROBLEMS},
    )
    async def adapt(request: Request, options: Annotated[AdaptOptions, Query()]) -> Response:
        given = await read_support(request, bounds)
        adapted = await engine.adapt(
            scope_of(request),
            None,
            given.examples,
            unlabelled=given.unlabelled,
            method=one_of(options.method, given.method),
            ttl_s=options.ttl,
            on_bad_image=options.on_bad_image,
        )
        return answers.task(request.scope["state"], adapted, status=201 if adapted.created else 200)

    @router.put(
        "/v1/tasks/{task}",
        operation_id="adapt_named",
        summary="Create or replace a task under a name",
        response_model=schemas.Task,
        openapi_extra=SUPPORT_BODY,
        responses={201: {"model": schemas.Task, "description": "created"}, **PROBLEMS, **CONFLICT},
    )
    async def adapt_named(request: Request, task: str, options: Annotated[AdaptOptions, Query()]) -> Response:
        expect = _expected(request)
        given = await read_support(request, bounds)
        adapted = await engine.adapt(
            scope_of(request),
            task,
            given.examples,
            unlabelled=given.unlabelled,
            method=one_of(options.method, given.method),
            ttl_s=options.ttl,
            expect=expect,
            on_bad_image=options.on_bad_image,
        )
        return answers.task(request.scope["state"], adapted, status=201 if adapted.created else 200)

    @router.get(
        "/v1/tasks",
        operation_id="list_tasks",
        summary="List tasks by name",
        response_model=schemas.TaskList,
        responses={k: v for k, v in PROBLEMS.items() if k in (422, 503)},
    )
    async def list_tasks(request: Request, options: Annotated[ListOptions, Query()]) -> Response:
        found = await engine.tasks(scope_of(request), limit=options.limit + 1, after=options.cursor)
        more = len(found) > options.limit
        items = [{"task": name, "version": p.version, "head": p.head} for name, p in found[: options.limit]]
        return answers.answer({"items": items, "next_cursor": items[-1]["task"] if more else None})

    @router.get(
        "/v1/tasks/{task}",
        operation_id="get_task",
        summary="Describe a task",
        response_model=schemas.Task,
        responses={304: {"description": "not modified"}, 503: PROBLEMS[503], 422: PROBLEMS[422], **NOT_FOUND, **STALE},
    )
    async def get_task(request: Request, task: str) -> Response:
        adapted = await engine.describe(scope_of(request), task)
        if request.headers.get("if-none-match") == answers.etag(adapted):
            return Response(status_code=304, headers={"ETag": answers.etag(adapted)})
        return answers.task(request.scope["state"], adapted, status=200)

    @router.delete(
        "/v1/tasks/{task}",
        operation_id="delete_task",
        summary="Forget a task",
        status_code=204,
        responses={503: PROBLEMS[503], 422: PROBLEMS[422], **NOT_FOUND},
    )
    async def delete_task(request: Request, task: str) -> Response:
        await engine.forget(scope_of(request), task)
        return Response(status_code=204)

    return router


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
