"""The API reference at /docs: Swagger UI, its files from an installed package, nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, Response

ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon.png": "image/png",
}
FOLDER = Path(fastapi_offline.__file__).parent / "static"
# Swagger UI sets styles in place; scripts are ours or its own file and nothing else.
# And the page sends requests, so nobody may lay it, framed, under what somebody thinks to click on.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fewshot API</title>
<link rel="icon" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true, tryItOutEnabled: true});\n'


def create_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    files = {name: (FOLDER / name).read_bytes() for name in ASSETS}

    @router.get("/docs")
    async def page() -> Response:
        return Response(PAGE, media_type="text/html", headers={"Content-Security-Policy": POLICY})

    @router.get("/docs/{name}")
    async def asset(name: str) -> Response:
        if name == "start.js":
            return Response(START, media_type="text/javascript")
        if name not in files:
            return Response(status_code=404)
        return Response(files[name], media_type=ASSETS[name])

    return router
