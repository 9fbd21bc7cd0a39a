"""Routes about tasks: learn, change, describe, list, forget. Parse, call the engine, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from models.errors import ExampleNotFound, InvalidRequest
from service.engine import Engine
from service.support import OnBadImage
from service.tasks import Adapted
from service.web import answers, schemas
from service.web.access import scope_of
from service.web.bodies import Bounds, Given, one_of, read_support
from service.web.conditions import etag, expected, unchanged
from service.web.idempotency import KEY, WHERE, once
from service.web.openapi import AT_WORK, CONFLICT, NOT_FOUND, NOT_RETAINED, PROBLEMS, STALE, SUPPORT_BODY, optional
from service.web.retained import archive, media_type_of, retained

CHANGED: dict[int | str, dict[str, Any]] = {status: PROBLEMS[status] for status in (422, 500, 503)}
BRIEFLY = "With `Prefer: return=minimal` in the header a change is answered once it is kept, and learned behind that."
READ: dict[int | str, dict[str, Any]] = {status: PROBLEMS[status] for status in (422, 503)}
Version = Annotated[int, Field(ge=1, lt=2**53)]
BadImage = Annotated[OnBadImage, Field(description="leave unreadable images out, or refuse them all")]


class NewOptions(schemas.Closed):
    method: str = Field("", max_length=64, description="learner; empty = the default of the service")
    ttl: float | None = Field(None, gt=0, le=10 * 365 * 86400, description="seconds until the task is forgotten")
    on_bad_image: BadImage = "skip"
    from_task: str = Field("", max_length=64, description="a task that this one is to equal; then there is no body")
    retain: Literal["features", "images"] = Field(
        "features", description="images: kept too, so that the task outlives a change of artifact"
    )


class AddOptions(schemas.Closed):
    on_bad_image: BadImage = "skip"


class GetOptions(schemas.Closed):
    version: Version | None = Field(None, description="an earlier version that is still kept")


class RollbackOptions(schemas.Closed):
    version: Version


class ChangeOptions(schemas.Closed):
    method: str = Field(min_length=1, max_length=64, description="learner; `/v1/artifact` lists them")


class ListOptions(schemas.Closed):
    limit: int = Field(50, ge=1, le=200)
    cursor: str = Field("", max_length=64, description="next_cursor of the page before")


def create_router(engine: Engine, bounds: Bounds) -> APIRouter:
    router = APIRouter(tags=["tasks"])

    async def terms(request: Request, task: str) -> dict[str, Any]:
        return {"expect": await expected(request, engine, task), "brief": _is_brief(request)}

    async def asked(request: Request, options: NewOptions) -> Given:
        if not options.from_task:
            return await read_support(request, bounds)
        if await request.body() or options.model_fields_set & {"retain", "on_bad_image"}:
            raise InvalidRequest("With `from_task` come no examples, and only `method` and `ttl` beside it.")
        return Given([], [], [])

    async def changed(request: Request, task: str, change: Callable[..., Awaitable[Adapted]]) -> Response:
        """The answer to a change of a task, which takes the terms of the request."""

        async def work() -> Response:
            return answers.task(request.scope["state"], await change(**await terms(request, task)), status=200)

        return await once(request, task, work)

    async def made(request: Request, task: str | None, options: NewOptions, given: Given | None = None) -> Response:
        scope, given = scope_of(request), given or await asked(request, options)
        expect = None if task is None else await expected(request, engine, task, makes=True)
        method = one_of(options.method, given.method)
        if options.from_task:
            adapted = await engine.copy(scope, task, options.from_task, method=method, ttl_s=options.ttl, expect=expect)
        else:
            adapted = await engine.adapt(
                scope,
                task,
                given.examples,
                unlabelled=given.unlabelled,
                method=method,
                ttl_s=options.ttl,
                retain=options.retain == "images",
                expect=expect,
                on_bad_image=options.on_bad_image,
            )
        status = 201 if adapted.created else 200
        return answers.task(request.scope["state"], adapted, status=status, names=given.names)

    @router.post(
        "/v1/tasks",
        operation_id="adapt",
        summary="Learn a task from labelled images",
        status_code=201,
        response_model=schemas.Task,
        openapi_extra=optional(SUPPORT_BODY),
        responses={
            200: {"model": schemas.Task, "description": "known already"},
            **PROBLEMS,
            **NOT_FOUND,
            **AT_WORK,
            **CONFLICT,
        },
    )
    async def adapt(request: Request, options: Annotated[NewOptions, Query()]) -> Response:
        conditional = any(header in request.headers for header in WHERE)
        if options.from_task:

            async def copied() -> Response:
                given = await asked(request, options)
                task = None
                if conditional:  # these are about a task by its name, which is that of the head
                    method = one_of(options.method, given.method)
                    task = await engine.name_of_copy(scope_of(request), options.from_task, method=method)
                return await made(request, task, options, given)

            # Its key is kept beside the other task: the name of a copy moves as that one does.
            return await once(request, options.from_task, copied)
        if not conditional and KEY not in request.headers:
            return await made(request, None, options)
        given = await asked(request, options)
        task = engine.name(given.examples, unlabelled=given.unlabelled, method=one_of(options.method, given.method))
        return await once(request, task, lambda: made(request, task, options, given), makes=True)

    @router.put(
        "/v1/tasks/{task}",
        operation_id="adapt_named",
        summary="Create or replace a task under a name",
        response_model=schemas.Task,
        openapi_extra=optional(SUPPORT_BODY),
        responses={
            201: {"model": schemas.Task, "description": "created"},
            **PROBLEMS,
            **NOT_FOUND,
            **AT_WORK,
            **CONFLICT,
        },
    )
    async def adapt_named(request: Request, task: str, options: Annotated[NewOptions, Query()]) -> Response:
        return await once(request, task, lambda: made(request, task, options), makes=True)

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
    async def get_task(request: Request, task: str, options: Annotated[GetOptions, Query()]) -> Response:
        adapted = await engine.describe(scope_of(request), task, version=options.version)
        tag = etag(adapted.pointer)
        if unchanged(request, tag):
            return Response(status_code=304, headers={"ETag": tag})
        return answers.task(request.scope["state"], adapted, status=200)

    @router.delete(
        "/v1/tasks/{task}",
        operation_id="delete_task",
        summary="Forget a task",
        status_code=204,
        responses={503: PROBLEMS[503], 422: PROBLEMS[422], **NOT_FOUND, **CONFLICT},
    )
    async def delete_task(request: Request, task: str, _: Annotated[schemas.NoOptions, Query()]) -> Response:
        await engine.forget(scope_of(request), task, expect=await expected(request, engine, task))
        return Response(status_code=204)

    @router.post(
        "/v1/tasks/{task}/examples",
        operation_id="add_examples",
        summary="Add examples, perhaps of new classes",
        description=BRIEFLY,
        response_model=schemas.Task | schemas.Moved,
        openapi_extra=SUPPORT_BODY,
        responses={**PROBLEMS, **NOT_FOUND, **AT_WORK, **CONFLICT},
    )
    async def add_examples(request: Request, task: str, options: Annotated[AddOptions, Query()]) -> Response:
        async def work() -> Response:
            given = await read_support(request, bounds)
            if given.method:
                raise InvalidRequest("Examples are added to a task as it is; `method` belongs to a new task.")
            adapted = await engine.add(
                scope_of(request),
                task,
                given.examples,
                unlabelled=given.unlabelled,
                on_bad_image=options.on_bad_image,
                **await terms(request, task),
            )
            return answers.task(request.scope["state"], adapted, status=200, names=given.names)

        return await once(request, task, work)

    @router.delete(
        "/v1/tasks/{task}/examples/{example}",
        operation_id="remove_example",
        summary="Take an example back",
        description=BRIEFLY,
        response_model=schemas.Task | schemas.Moved,
        responses={**CHANGED, **NOT_FOUND, **AT_WORK, **CONFLICT},
    )
    async def remove_example(
        request: Request, task: str, example: str, _: Annotated[schemas.NoOptions, Query()]
    ) -> Response:
        return await changed(request, task, partial(engine.remove_example, scope_of(request), task, example))

    @router.delete(
        "/v1/tasks/{task}/classes/{label:path}",
        operation_id="remove_class",
        summary="Take a class back",
        description=BRIEFLY,
        response_model=schemas.Task | schemas.Moved,
        responses={**CHANGED, **NOT_FOUND, **AT_WORK, **CONFLICT},
    )
    async def remove_class(
        request: Request, task: str, label: str, _: Annotated[schemas.NoOptions, Query()]
    ) -> Response:
        return await changed(request, task, partial(engine.remove_class, scope_of(request), task, label))

    @router.get(
        "/v1/tasks/{task}/versions",
        operation_id="list_versions",
        summary="The versions that can be rolled back to, newest first",
        response_model=schemas.VersionList,
        responses={503: PROBLEMS[503], 422: PROBLEMS[422], **NOT_FOUND, **STALE},
    )
    async def list_versions(request: Request, task: str, _: Annotated[schemas.NoOptions, Query()]) -> Response:
        found = await engine.versions(scope_of(request), task)
        return answers.answer({"items": [answers.version(at) for at in found]})

    @router.patch(
        "/v1/tasks/{task}",
        operation_id="change_task",
        summary="Learn the same examples with another method",
        description=BRIEFLY,
        response_model=schemas.Task | schemas.Moved,
        responses={**CHANGED, **NOT_FOUND, **AT_WORK, **CONFLICT},
    )
    async def change_task(request: Request, task: str, options: Annotated[ChangeOptions, Query()]) -> Response:
        return await changed(request, task, partial(engine.learn_with, scope_of(request), task, options.method))

    @router.post(
        "/v1/tasks/{task}/rollback",
        operation_id="rollback",
        summary="Make an earlier version the newest",
        description=BRIEFLY,
        response_model=schemas.Task | schemas.Moved,
        responses={**CHANGED, **NOT_FOUND, **AT_WORK, **CONFLICT},
    )
    async def rollback(request: Request, task: str, options: Annotated[RollbackOptions, Query()]) -> Response:
        return await changed(request, task, partial(engine.rollback, scope_of(request), task, options.version))

    @router.get(
        "/v1/tasks/{task}/support",
        operation_id="download_support",
        summary="The images of a task, where they were kept: a zip with one folder per label",
        response_class=Response,
        responses={200: {"content": {"application/zip": {}}}, **READ, **NOT_FOUND, **NOT_RETAINED},
    )
    async def download_support(request: Request, task: str, _: Annotated[schemas.NoOptions, Query()]) -> Response:
        record = (await engine.record(scope_of(request), task))[1]
        body = await asyncio.to_thread(archive, record)
        return Response(
            body,
            media_type="application/zip",
            headers={"Content-Disposition": f'attachment; filename="{task}.zip"'},
        )

    @router.get(
        "/v1/tasks/{task}/examples/{example}/image",
        operation_id="get_example_image",
        summary="The image or text of an example, where it was kept",
        response_class=Response,
        responses={200: {"content": {"image/*": {}, "text/plain": {}}}, **READ, **NOT_FOUND, **NOT_RETAINED},
    )
    async def get_example_image(
        request: Request, task: str, example: str, _: Annotated[schemas.NoOptions, Query()]
    ) -> Response:
        record = (await engine.record(scope_of(request), task))[1]
        if example not in record.ids:
            raise ExampleNotFound(f"The task has no example {example[:64]!r}.")
        image = retained(record)[record.ids.index(example)]
        return Response(image, media_type=media_type_of(image))

    return router


def _is_brief(request: Request) -> bool:
    """Whether the client prefers a short answer to a report (RFC 7240)."""
    preferences = ",".join(request.headers.getlist("prefer")).lower().replace(";", ",").replace('"', "").split(",")
    return "return=minimal" in (part.strip() for part in preferences)
