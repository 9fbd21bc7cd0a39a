"""Routes that let a task leave: its file, and the runtime that runs it in a browser. Parse, call, answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from models.errors import ExportRefused, Overloaded
from service.callers import CallerLeft, has_left, tenant
from service.engine import Engine
from service.export_onnx import bundle, export
from service.web import schemas
from service.web.access import scope_of
from service.web.conditions import unchanged
from service.web.openapi import NOT_FOUND, PROBLEMS

OFFLINE = Path(__file__).parent / "offline"  # filled by deploy/offline.sh
RUNTIME = {
    "ort.wasm.min.mjs": "text/javascript",
    "ort-wasm-simd-threaded.mjs": "text/javascript",
    "ort-wasm-simd-threaded.wasm": "application/wasm",
}
REFUSED: dict[int | str, dict[str, Any]] = {
    409: {**PROBLEMS[422], "description": "learned with another artifact, or no file answers like the service"}
}
FAILED: dict[int | str, dict[str, Any]] = {status: PROBLEMS[status] for status in (422, 500, 503)}


MOST_ASKED = 4  # at once, of one tenant: each waits for all before it


class ExportOptions(schemas.Closed):
    format: Literal["onnx", "zip"] = Field("onnx", description="zip: with a program that runs it, and test vectors")
    precision: Literal["float32", "int8"] | None = Field(None, description="default: that of the service")


# A file is for any computer: what only a GPU computes in is exported in full.
GRAPH_OF = {"bfloat16": "float32"}


def create_router(engine: Engine, *, precision: str, reject: float, views: int) -> APIRouter:
    """`precision` and `views` are what the engine runs at; `reject` what the service turns away as none of these."""
    router = APIRouter()
    one_at_a_time = asyncio.Lock()  # each takes a core for a second, and several times the size of its file
    asked: Counter[str] = Counter()  # files that are made or waited for, by tenant

    @router.get(
        "/v1/tasks/{task}/export",
        operation_id="export_task",
        summary="The task as one ONNX file: uint8 pixels in, probabilities out",
        tags=["tasks"],
        response_class=Response,
        responses={
            200: {"content": {"application/octet-stream": {}, "application/zip": {}}},
            304: {"description": "not modified"},
            **FAILED,
            **NOT_FOUND,
            **REFUSED,
        },
    )
    async def export_task(request: Request, task: str, options: Annotated[ExportOptions, Query()]) -> Response:
        pointer, head = await engine.head(scope_of(request), task)
        if views > 1:
            raise ExportRefused(
                f"A file sees one view of an image, and this service {views} (VIEWS): export from one that sees one."
            )
        graph = options.precision or GRAPH_OF.get(precision, precision)
        # All that may make another file of the same head.
        tag = f'"v{pointer.version}-{pointer.head}-{graph}-{reject:g}.{options.format}"'
        headers = {"ETag": tag}
        if unchanged(request, tag):
            return Response(status_code=304, headers=headers)
        who = tenant.get()
        if asked[who] >= MOST_ASKED:
            raise Overloaded(f"{MOST_ASKED} exports are being made already; ask again when one is done.")
        asked[who] += 1
        try:
            async with one_at_a_time:
                if has_left.get()():
                    raise CallerLeft
                exported = await export(
                    engine,
                    task,
                    pointer,
                    head,
                    precision=graph,
                    served=precision,
                    reject=reject,
                )
                body = exported.model if options.format == "onnx" else await asyncio.to_thread(bundle, exported)
        finally:
            asked[who] -= 1
            if not asked[who]:
                del asked[who]
        # A task name has no letter that a file name could not have; the word before it keeps a dash from the front.
        headers["Content-Disposition"] = f'attachment; filename="fewshot-{task}-v{pointer.version}.{options.format}"'
        media_type = "application/octet-stream" if options.format == "onnx" else "application/zip"
        return Response(body, media_type=media_type, headers=headers)

    if runtime_is_there():

        @router.get("/offline/{name}", include_in_schema=False)
        async def offline(name: str) -> Response:
            if name not in RUNTIME:
                raise HTTPException(404)
            headers = {"Cache-Control": "public, max-age=31536000, immutable"}
            return FileResponse(OFFLINE / name, media_type=RUNTIME[name], headers=headers)

    return router


def runtime_is_there() -> bool:
    """Whether a browser can be given what runs exported tasks: `make offline` fetches it."""
    return all((OFFLINE / name).is_file() for name in RUNTIME)
