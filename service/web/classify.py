"""Routes that answer questions about images. Parse, call the engine, answer."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from service.engine import Engine
from service.support import OnBadImage
from service.web import answers, schemas
from service.web.access import scope_of
from service.web.bodies import JSON_LINES, Bounds, one_of, read_queries, read_support
from service.web.openapi import LINES, NOT_FOUND, ONE_CALL_BODY, PROBLEMS, QUERY_BODY, STALE

Reject = Literal["off"] | Annotated[float, Field(ge=0.001, le=0.5)]
BadImage = Annotated[OnBadImage, Field(description="an error for each bad image, or refuse them all")]
REJECT = Field(None, description="share of genuine images that may be turned away as none of these, or off")


class ClassifyOptions(schemas.Closed):
    reject: Reject | None = REJECT
    explain: bool = Field(False, description="name the support examples that each image resembles most")
    top: int | None = Field(
        None, ge=1, description="probabilities of so many classes, the likeliest first; else of all"
    )
    on_bad_image: BadImage = "skip"


class OneCallOptions(ClassifyOptions):
    method: str = Field("", max_length=64, description="learner; empty = the default of the service")


class EmbedOptions(schemas.Closed):
    on_bad_image: BadImage = "skip"


def create_router(engine: Engine, bounds: Bounds, *, reject: float) -> APIRouter:
    router = APIRouter(tags=["classify"])

    @router.post(
        "/v1/tasks/{task}/classify",
        operation_id="classify",
        summary="Classify images with a task",
        response_model=schemas.Predictions,
        openapi_extra=QUERY_BODY,
        description=f"With `Accept: {JSON_LINES}` the predictions come one a line, and nothing around them.",
        responses={**LINES, **PROBLEMS, **NOT_FOUND, **STALE},
    )
    async def classify(request: Request, task: str, options: Annotated[ClassifyOptions, Query()]) -> Response:
        payloads = await read_queries(request, bounds)
        predictions = await engine.classify(
            scope_of(request), task, payloads, explain=options.explain, on_bad_image=options.on_bad_image
        )
        rate = _rate(options.reject, reject)
        engine.metrics.none_of_these.inc(predictions.none_of_these(rate))
        return answers.predictions(
            request.scope["state"], predictions, reject=rate, top=options.top, lines=_wants_lines(request)
        )

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
            explain=options.explain,
            on_bad_image=options.on_bad_image,
        )
        rate = _rate(options.reject, reject)
        engine.metrics.none_of_these.inc(predictions.none_of_these(rate))
        return answers.predictions(
            request.scope["state"], predictions, rejected, names=given.names, reject=rate, top=options.top
        )

    @router.post(
        "/v1/embed",
        operation_id="embed",
        summary="Features of images",
        response_model=schemas.Features,
        openapi_extra=QUERY_BODY,
        responses=PROBLEMS,
    )
    async def embed(request: Request, options: Annotated[EmbedOptions, Query()]) -> Response:
        payloads = await read_queries(request, bounds)
        embedded = await engine.embed(payloads, on_bad_image=options.on_bad_image)
        artifact = engine.artifact
        return answers.features(request.scope["state"], embedded, artifact=artifact.digest, dim=artifact.manifest.dim)

    return router


def _rate(asked: Literal["off"] | float | None, default: float) -> float:
    return default if asked is None else 0.0 if asked == "off" else asked


def _wants_lines(request: Request) -> bool:
    return JSON_LINES in request.headers.get("accept", "")
