"""Routes about the service itself: artifact, limits, health, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from models import images, text
from models.artifact import Artifact
from service import keys
from service.engine import Engine
from service.settings import Settings
from service.stores import Store
from service.web import answers, schemas


def create_router(engine: Engine, store: Store, settings: Settings) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get(
        "/v1/artifact",
        operation_id="get_artifact",
        summary="What is served, and how well it does",
        response_model=schemas.ArtifactInfo,
    )
    async def get_artifact(_: Annotated[schemas.NoOptions, Query()]) -> Response:
        return answers.answer(_artifact(engine.artifact, engine.default_method, settings))

    @router.get(
        "/v1/limits",
        operation_id="get_limits",
        summary="Every limit in force",
        response_model=schemas.LimitsInfo,
    )
    async def get_limits(_: Annotated[schemas.NoOptions, Query()]) -> Response:
        names = set(schemas.LimitsInfo.model_fields) & set(Settings.model_fields)
        limits = {name: getattr(settings, name) for name in sorted(names)}
        formats = text.FORMATS if engine.artifact.kind == "text" else images.FORMATS
        return answers.answer(
            {**limits, "min_edge": images.MIN_EDGE, "max_aspect": images.MAX_ASPECT, "formats": list(formats)}
        )

    @router.get("/healthz", operation_id="live", summary="The process runs", response_model=schemas.Health)
    async def live() -> Response:
        return answers.answer({"status": "ok"})

    @router.get(
        "/readyz",
        operation_id="ready",
        summary="The extractor runs; the store may be away",
        response_model=schemas.Health,
        responses={503: {"model": schemas.Health, "description": "the lanes have stopped, or the service is stopping"}},
    )
    async def ready(request: Request) -> Response:
        lane, up, stopping = engine.batcher.alive, await store.ping(), is_stopping(request)
        engine.metrics.store_up.set(up)
        status = "unavailable" if not lane else "stopping" if stopping else "ok" if up else "degraded"
        body = {"status": status, "lane": lane, "store": up}
        return answers.answer(body, status=503 if stopping or not lane else 200)

    @router.get(
        "/metrics",
        operation_id="metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        engine.metrics.waiting.set(engine.batcher.waiting)
        engine.metrics.store_up.set(await store.ping())
        engine.metrics.keys_file_readable.set(settings.keys_file is None or _usable(settings.keys_file))
        return Response(engine.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _usable(path: Path) -> bool:
    """Whether the keys could be read now; those in force may be older."""
    try:
        keys.load(path)
        keys.load_pepper(path)
    except keys.KeysUnusable:
        return False
    return True


def is_stopping(request: Request) -> bool:
    """Whether the server was asked to stop, which it notes in the state that every request has."""
    return bool(getattr(request.state, "stopping", False))


def _artifact(artifact: Artifact, default: str, settings: Settings) -> dict[str, Any]:
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
        "precision": settings.precision,
        "views": settings.views,
        "accuracy": [dict(row) for row in manifest.accuracy],
        "training": dict(manifest.training),
    }
