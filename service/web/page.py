"""The page at /: its files, read once at the start, with the policy under which a browser may run them.

The one thing that is told to it is whether there is anything under /offline/: it need not ask in vain, which a browser
would report as an error. Knows nothing of tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from service.web.conditions import unchanged

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self' 'wasm-unsafe-eval'",  # a model in the browser runs as WebAssembly
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "media-src blob:",
        "worker-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept by the browser, and asked for again with its ETag
}


TEXTS = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fewshot</title>
<link rel="icon" type="image/svg+xml" href="page/icon.svg">
</head>
<body>
<h1>fewshot</h1>
<p>The artifact that is served reads texts, and the page for teaching is for photos. <a href="docs">The API</a> takes
texts.</p>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class File:
    body: bytes
    media_type: str
    etag: str


def load(folder: Path) -> Mapping[str, File]:
    """The files by name. Raises KeyError for one whose type is not known here."""
    return {path.name: _file(path.read_bytes(), path.suffix) for path in sorted(folder.iterdir())}


def _file(body: bytes, suffix: str) -> File:
    return File(body, TYPES[suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def create_router(*, kind: str = "image", offline: bool = False) -> APIRouter:
    """`kind`: what the artifact reads; to teach it texts there is no page, and `/` says so."""
    router = APIRouter(include_in_schema=False)
    files = load(FOLDER)
    index = files["index.html"]
    if kind == "text":
        index = _file(TEXTS, ".html")
    elif offline:
        index = _file(index.body.replace(b"<html ", b"<html data-offline ", 1), ".html")

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _answer(request, index)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            return Response(status_code=404)
        return _answer(request, files[name])

    return router


def _answer(request: Request, file: File) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    if unchanged(request, file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
