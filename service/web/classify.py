"""Routes that answer questions about images. Parse, call the engine, answer."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from service.engine import Engine
from service.web import answers, schemas
from service.web.access import scope_of
from service.web.bodies import Bounds, one_of, read_queries, read_support
from service.web.openapi import NOT_FOUND, ONE_CALL_BODY, PROBLEMS, QUERY_BODY, STALE


class OneCallOptions(schemas.Closed):
    method: str = Field("", max_length=64, description="learner; empty = the default of the service")
    on_bad_image: Literal["skip", "fail"] = "skip"


class ClassifyOptions(schemas.Closed):
    on_bad_image: Literal["skip", "fail"] = Field("skip", description="an error for each bad image, or refuse them all")


def create_router(engine: Engine, bounds: Bounds) -> APIRouter:
    router = APIRouter(tags=["classify"])

    @router.post(
        "/v1/tasks/{task}/classify",
        operation_id="classify",
        summary="Classify images with a task",
        response_model=schemas.Predictions,
        openapi_extra=QUERY_BODY,
        responses={**PROBLEMS, **NOT_FOUND, **STALE},
    )
    async def classify(request: Request, task: str, options: Annotated[ClassifyOptions, Query()]) -> Response:
        payloads = await read_queries(request, bounds)
        predictions = await engine.classify(scope_of(request), task, payloads, on_bad_image=options.on_bad_image)
        return answers.predictions(request.scope["state"], predictions)

    @router.post(
        "/v1/classify",
        operation_id="classify_once",
        summary="Support set and questions in one call",
        response_model=schemas.Predictions,
        openapi_extra=ONE_CALL_BODY,
        responses=PROBLEMS,
    )
    async def classify_once(request: Request, options: Annotated[OneCallOptions, Query()]) -> Response:
        given = await read_support(request, bounds, with_queries=True)
        predictions, rejected = await engine.classify_once(
            given.examples,
            given.queries,
            unlabelled=given.unlabelled,
            method=one_of(options.method, given.method),
            on_bad_image=options.on_bad_image,
        )
        return answers.predictions(request.scope["state"], predictions, rejected)

    return router
