"""`python -m service.web.reference`: writes docs/api.md, the API reference, from the OpenAPI file of the service.

The file is asked for as a client would, so the page says what is served; a test fails when it does not. Knows nothing
of what the routes do.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import uvicorn
from starlette.types import Message

from models.artifact import Artifact
from service.settings import PRETRAINED, Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from service.web.openapi import DENIED
from service.web.problems import STATUS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
JSON = Mapping[str, Any]
HEAD = """# API reference

Every route, what it takes and what it answers. This page is made from the OpenAPI file of the service by
`python -m service.web.reference`; a running service has the same at `/docs`, to try out, and at `/openapi.json`, for
programs. [using.md](using.md) shows the routes at work, and [open-inference.md](open-inference.md) the ones that other
programs may already speak.

Where [keys](keys.md) are configured, each route but the public ones needs the scope that is named with it, and answers
401, 403 or 429 without it. Where none are, nobody is asked for one.
"""
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "maxLength": "up to {} characters",
    "maxItems": "up to {}",
}
# What is refused by the router, and bugs.
OTHERS = {
    (404, "not_found", "No such route"),
    (405, "method_not_allowed", "The route has other methods"),
    (500, "internal_error", "A bug; the log has more"),
}


class _NoExtractor:
    """The file does not depend on what is served, so nothing is loaded for it."""

    dim = 0

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        raise NotImplementedError


async def document() -> dict[str, Any]:
    """The OpenAPI file, as the service answers it."""
    artifact = Artifact.load(PRETRAINED / "characters")
    app = create_app(Settings(lanes=1), artifact=artifact, extractor=_NoExtractor(), store=MemoryStore())
    config = uvicorn.Config(app, log_config=None)
    config.load()
    lifespan = config.lifespan_class(config)
    await lifespan.startup()
    answer = bytearray()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        answer.extend(message.get("body", b""))

    request = {"type": "http", "method": "GET", "path": "/openapi.json", "query_string": b"", "headers": []}
    try:
        await app({**request, "root_path": "", "scheme": "http", "server": ("localhost", 80)}, receive, send)
    finally:
        await lifespan.shutdown()
    return cast(dict[str, Any], json.loads(answer))


def page(document: JSON) -> str:
    """The reference as Markdown."""
    parts = [HEAD]
    operations = [
        (operation["tags"][0], method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    for tag in dict.fromkeys(tag for tag, *_ in operations):
        parts.append(f"## {tag.capitalize()}\n")
        for of, method, path, operation in operations:
            if of == tag:
                parts.append("\n".join(_operation(method, path, operation)))
    parts.append("## Values\n")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append("\n".join(_schema(name, schema)))
    parts.append("\n".join(_problems()))
    return "\n".join(parts).rstrip() + "\n"


def _operation(method: str, path: str, operation: JSON) -> Iterator[str]:
    yield f"### `{method.upper()} {path}`\n"
    scopes = [scope for need in operation.get("security", []) for scope in need["key"]]
    yield f"{_sentence(operation['summary'])} Operation `{operation['operationId']}`" + (
        f"; scope `{scopes[0]}`.\n" if scopes else "; needs no key.\n"
    )
    if "description" in operation:
        yield f"{operation['description']}\n"
    if operation.get("parameters"):
        yield "| parameter | in | type | default | meaning |\n|---|---|---|---|---|"
        for row in operation["parameters"]:
            schema = row["schema"]
            default = "required" if row.get("required") else _code(schema.get("default"))
            yield _row(f"`{row['name']}`", row["in"], _type(schema), default, row.get("description", ""))
        yield ""
    if "requestBody" in operation:
        yield "| body as | holds |\n|---|---|"
        for media, content in operation["requestBody"]["content"].items():
            kind = _type(content.get("schema", {}))
            text = content.get("description", "")
            yield _row(f"`{media}`", f"{kind}: {text}" if text and kind.startswith("[") else text or kind)
        yield ""
    refusals = []
    yield "| answer | holds | when |\n|---|---|---|"
    for status, answer in sorted(operation["responses"].items()):
        content = answer.get("content", {})
        if "application/problem+json" in content:
            if int(status) not in DENIED:
                refusals.append(f"{status} ({answer['description']})")
            continue
        when = "" if answer["description"] == "Successful Response" else answer["description"]
        yield _row(status, ", ".join(_held(media, value) for media, value in content.items()) or "nothing", when)
    yield ""
    if refusals:
        yield f"[Problems](#problems): {', '.join(refusals)}.\n"


def _held(media: str, content: JSON) -> str:
    """What an answer of this form holds. One of JSON lines holds many; a file is called by its type alone."""
    if not content.get("schema"):
        return f"`{media}`"
    kind = _type(content["schema"])
    return kind if media == "application/json" else f"{kind} ({content['description']}) as `{media}`"


def _schema(name: str, schema: JSON) -> Iterator[str]:
    yield f"### {name}\n"
    if "description" in schema:
        yield f"{schema['description']}\n"
    if "properties" not in schema:
        yield f"{_type(schema)}.\n"
        return
    fields = schema["properties"].items()
    told = any("description" in value for _, value in fields)
    yield "| field | type | meaning |\n|---|---|---|" if told else "| field | type |\n|---|---|"
    for field, value in fields:
        optional = "" if field in schema.get("required", []) else "; optional"
        cells = [f"`{field}`", _type(value) + optional]
        yield _row(*cells, value.get("description", "")) if told else _row(*cells)
    yield ""


def _problems() -> Iterator[str]:
    yield """## Problems

What is refused is answered as a [Problem](#problem); under `/v2` as that protocol says. `code` is part of the API: it
keeps its meaning, and new ones may come. [mistakes.md](mistakes.md) shows the ones that are met first.

| status | `code` | title |
|---|---|---|"""
    kinds = {(status, kind.code, title) for kind, (status, title) in STATUS.items()}
    for status, code, title in sorted(kinds | OTHERS):
        yield _row(str(status), f"`{code}`", title)


def _type(schema: JSON) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_type(one) for one in schema[several])
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return " or ".join(_code(value) for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        inner = schema.get("prefixItems") or [schema.get("items", {})]
        text = f"list of {_type(inner[0])}" if len(inner) == 1 else f"{len(inner)} of {_type(inner[0])}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        text = f"object of {_type(schema['additionalProperties'])}"
    else:
        text = "file" if schema.get("format") == "binary" else kind
    bounds = [] if "prefixItems" in schema else _bounds(schema)
    return f"{text} ({', '.join(bounds)})" if bounds else text


def _bounds(schema: JSON) -> list[str]:
    return [text.format(schema[name]) for name, text in BOUNDS.items() if name in schema]


def _code(value: Any) -> str:
    return "" if value is None or value == "" else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _row(*cells: str) -> str:
    flat = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(flat)} |"


def _sentence(text: str) -> str:
    return text.rstrip(".") + "."


def main() -> int:
    PAGE.write_text(page(asyncio.run(document())))
    print(f"{PAGE} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
