"""Puts the app together: engine, store, routes, error handlers, the outer boundary.

`create_app` reads nothing from the environment; two apps with different settings live in one process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from models.artifact import Artifact
from models.errors import FewshotError, InvalidRequest
from models.extractor import Extractor, best_device, cuda_works, load_extractor
from models.views import seen
from service.batcher import Batcher
from service.callers import CallerLeft
from service.engine import Engine
from service.keys import Keyring
from service.metrics import Metrics
from service.precision import automatic
from service.settings import Settings, SettingsError
from service.stores import Store, StoreMisconfigured
from service.stores.opening import open_store
from service.support import Limits
from service.web import about, classify, docs, export, open_inference, openapi, origins, page, problems, tasks, tracing
from service.web.access import Access
from service.web.bodies import Bounds
from service.web.boundary import LEFT, Boundary
from service.web.lean import LeanClassify
from service.web.tracing import Traced

log = logging.getLogger(__name__)
VERSION = "0.1.0"
MAX_LANES = 8


def create_app(
    settings: Settings,
    *,
    artifact: Artifact | None = None,
    extractor: Extractor | None = None,
    store: Store | None = None,
    metrics: Metrics | None = None,
) -> ASGIApp:
    """The service as an ASGI app. Raises ArtifactInvalid or SettingsError before anything is served."""
    keyring = None if settings.keys_file is None else Keyring(settings.keys_file)
    artifact = artifact or Artifact.load(settings.artifact)
    for name in ("device", "adapt_device"):
        if getattr(settings, name) == "cuda" and not cuda_works():
            raise SettingsError(f"FEWSHOT_{name.upper()} is cuda, but torch is not installed or finds no device.")
    device = best_device(artifact) if settings.device == "auto" else settings.device
    if settings.precision == "auto":
        chosen = "float32" if extractor else automatic(artifact, settings.data_dir, device=device)
        settings = settings.model_copy(update={"precision": chosen})
    if extractor is None:
        extractor = load_extractor(artifact, device=device, precision=settings.precision)
        difference = artifact.check(extractor, precision=settings.precision)
        log.info(
            "artifact %s (%s) on %s, probe within %.1e", artifact.manifest.name, artifact.digest, device, difference
        )
    if settings.views > 1 and artifact.kind != "image":
        raise SettingsError(f"FEWSHOT_VIEWS is for images; {artifact.manifest.name} reads {artifact.kind}s.")
    metrics = metrics or Metrics()
    metrics.build_info.labels(VERSION, artifact.manifest.name).set(1)
    store = store or open_store(settings)
    # Lanes are threads and threads belong to a running app: they start with the event loop.
    batcher = Batcher(
        seen(extractor, settings.views),
        artifact.decoder(
            max_pixels=settings.max_pixels,
            max_bytes=settings.max_example_bytes,
            max_text_bytes=settings.max_text_bytes,
        ),
        lanes=settings.lanes or min(os.cpu_count() or 1, MAX_LANES),
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        max_wait_s=settings.max_wait_s,
        metrics=metrics,
    )
    limits = Limits(**{name: getattr(settings, name) for name in Limits.__dataclass_fields__})
    engine = Engine(
        artifact,
        batcher,
        limits=limits,
        default_method=settings.default_method,
        metrics=metrics,
        adapt_device="cpu" if settings.adapt_device == "auto" else settings.adapt_device,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        try:
            await store.open()
        except (FewshotError, StoreMisconfigured) as error:
            await batcher.close()
            log.error("fewshot cannot start: %s", error)
            raise
        try:
            yield {"alive": lambda: batcher.alive}
        finally:
            await batcher.close()
            await store.close()

    app = FastAPI(
        title="fewshot",
        version=VERSION,
        summary="Learns a new image-classification task from a handful of labelled photos, at once.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # its address would be made of what the client says the host is
    )
    bounds = Bounds(
        parts=settings.max_examples + settings.max_queries,
        unpacked=4 * settings.max_body_bytes,
        entry=settings.max_example_bytes,
        kind=artifact.kind,
    )
    routers = [
        tasks.create_router(engine, bounds),
        classify.create_router(engine, bounds, reject=settings.reject),
        about.create_router(engine, store, settings),
        open_inference.create_router(
            engine,
            version=VERSION,
            max_body_bytes=settings.max_body_bytes,
            max_text_bytes=settings.max_text_bytes,
            reject=settings.reject,
        ),
        export.create_router(engine, precision=settings.precision, reject=settings.reject, views=settings.views),
        docs.create_router(),
        page.create_router(kind=artifact.kind, offline=export.runtime_is_there() and settings.views == 1),
    ]
    for router in routers:
        app.include_router(router)

    generated = app.openapi
    # What FastAPI made is kept by it, and was completed where it stands: to do so again would name each header twice.
    app.openapi = lambda: app.openapi_schema or openapi.complete(generated())  # type: ignore[method-assign]

    @app.exception_handler(FewshotError)
    async def ours(request: Request, error: FewshotError) -> Response:
        return problems.of_error(error, request_id=request.state.request_id)

    @app.exception_handler(Exception)  # starlette's own answer is no problem document; the log is the boundary's
    async def bug(request: Request, error: Exception) -> Response:
        return problems.of_bug(request_id=request.state.request_id)

    @app.exception_handler(CallerLeft)
    async def left(request: Request, error: CallerLeft) -> Response:  # for log and traces; nobody reads it
        return Response(status_code=LEFT)

    @app.exception_handler(HTTPException)
    async def theirs(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the router names the methods of one route only
            routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
            allowed = {
                m for route in routes if route.matches(request.scope)[0] != Match.NONE for m in route.methods or ()
            }
            headers["Allow"] = ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))
        return problems.of_status(
            error.status_code,
            str(error.detail),
            path=request.url.path,
            request_id=request.state.request_id,
            headers=headers,
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        first = found[0]
        place, name = first["loc"][0], first["loc"][min(1, len(first["loc"]) - 1)]
        if first["type"] == "extra_forbidden":
            known = ", ".join(f"`{option}`" for option in _options(request)) or "none"
            text = f"An unknown query parameter is not allowed here; there are {known}."
        elif first["type"] == "missing" and place == "query":
            text = f"`{name}` is missing: it is a part of the address, as ?{name}=..."
        else:  # of a choice each part has its own complaint
            said = dict.fromkeys(one["msg"] for one in found if one["loc"][:2] == first["loc"][:2])
            text = f"`{name}`: {'; or: '.join(said)}."
        return problems.of_error(InvalidRequest(text), request_id=request.state.request_id)

    lean = app if artifact.kind == "text" else LeanClassify(app, engine, reject=settings.reject)
    allowed = origins.of(settings.cors_origins)
    bounded = Boundary(
        Access(lean, store, keyring, allowed=allowed),
        max_body_bytes=settings.max_body_bytes,
        max_bodies_bytes=settings.max_bodies_bytes,
        body_timeout_s=settings.body_timeout_s,
        metrics=metrics,
    )
    whole: ASGIApp = bounded
    if allowed:
        whole = CORSMiddleware(
            bounded,
            allow_origins=sorted(allowed),
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", *openapi.HEADERS],
            expose_headers=["ETag", "Retry-After", "Idempotent-Replayed", "Server-Timing", "X-Request-Id"],
            max_age=600,
        )
    return Traced(whole, tracing.provider(settings.trace_endpoint)) if settings.trace_endpoint else whole


def _options(request: Request) -> list[str]:
    """The query parameters of the route that a request met."""
    dependant = getattr(request.scope.get("route"), "dependant", None)
    fields = dependant.query_params if dependant else ()
    return [name for field in fields for name in getattr(field.field_info.annotation, "model_fields", {})]
