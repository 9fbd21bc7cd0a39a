"""The OpenAPI file against the running service: requests made from the file get only answers that it names.

Most names and bodies are real ones, so that cases get beyond "no such task"; the others are whatever the file allows.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

requests = pytest.importorskip("requests", reason="it comes with schemathesis")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytestmark = pytest.mark.slow

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service import keys
from service.settings import PRETRAINED, Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.fakes import picture
from tests.service.live import served
from tests.service.web.asks import colours, folders, support_json, tarred, text, zipped

CASES = int(os.environ.get("FEWSHOT_TEST_CASES", "25"))  # of each operation
SUPPORT = {"support": support_json("red", "blue")}
ADDED = {"support": [{"label": "green", "image": text(picture("green", seed=k))} for k in range(2)]}
QUERY = {"images": [text(picture("red", seed=9))]}

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client, with its key, of a service with the artifact for characters."""
    folder = tmp_path_factory.mktemp("keys")
    secret = issued(folder / "keys.json")
    settings = Settings(artifact=PRETRAINED / "characters", keys_file=folder / "keys.json")
    with served(create_app(settings, store=MemoryStore())) as http:
        http.headers["Authorization"] = f"Bearer {secret}"
        yield http


def issued(file: Path) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = keys.main(["--file", str(file), "create", "--tenant", "t", "--scopes", "adapt,classify,admin"])
    assert code == 0
    return re.search(r"fsk_\w+", output.getvalue())[0]  # type: ignore[index]


def real(case: Any, known: dict[str, Any]) -> None:
    """Puts names, numbers and bodies of the real task into most places of a case."""
    chance = random.Random(repr((case.path_parameters, case.query, repr(case.body)[:200])))
    for name in list(case.path_parameters or {}):
        if name in known and chance.random() < 0.8:
            case.path_parameters[name] = known[name]
    for name, value in {"version": 1, "method": "ridge", "format": "onnx"}.items():
        if name in (case.query or {}) and chance.random() < 0.8:
            case.query[name] = value
    if case.media_type and chance.random() < 0.8:
        case.body = body_of(case.operation.path, case.media_type, case.body)


def body_of(path: str, kind: str, made: Any) -> Any:
    """A body that can be worked with, in the spelling asked for."""
    questions = path.endswith(("/classify", "/embed")) and path != "/v1/classify"
    if kind == "application/zip":
        return zipped(folders("green") if path.endswith("/examples") else folders("red", "blue"))
    if kind == "application/x-tar":
        return tarred(folders("green") if path.endswith("/examples") else folders("red", "blue"))
    if kind == "application/x-ndjson":
        lines = [{"image": image} for image in QUERY["images"]] if questions else SUPPORT["support"]
        return "\n".join(map(json.dumps, lines)).encode()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return picture("red", seed=9)
    if kind == "application/json" and path.startswith("/v1"):
        if path == "/v1/classify":
            return {**SUPPORT, "queries": QUERY["images"]}
        return QUERY if questions else ADDED if path.endswith("/examples") else SUPPORT
    return made


def sent(case: Any, client: httpx.Client) -> Any:
    """The answer to a case. Forms of files are sent by the client, for the file allows any name of a field."""
    if case.media_type == "multipart/form-data":
        files = [*colours("green" if case.operation.path.endswith("/examples") else "red", "blue")]
        asked = [("query", ("q.png", picture("red", seed=9)))] if case.operation.path == "/v1/classify" else []
        url = case.as_transport_kwargs(base_url=str(client.base_url))["url"]
        return requests.request(
            case.method, url, params=case.query, files=[*files, *asked], headers=dict(client.headers), timeout=20
        )
    return case.call(base_url=str(client.base_url), headers=dict(client.headers))


def test_requests_made_from_the_file_get_only_answers_that_it_names(client: httpx.Client) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    counts: dict[str, Counter[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        seen = counts.setdefault(f"{operation.method.upper()} {operation.path}", Counter())

        @hypothesis.settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def each(case: schemathesis.Case) -> None:
            client.delete("/v1/tasks/real")
            made = client.put("/v1/tasks/real?retain=images", files=colours("red", "blue")).json()
            real(case, {"task": "real", "m": "real", "example": made["examples"][0]["id"], "label": "red"})
            if case.operation.method == "delete" and case.path.endswith("{label}"):  # three classes, one can go
                client.post("/v1/tasks/real/examples", files=colours("green"))
            response = sent(case, client)
            seen[response.status_code] += 1  # noqa: B023
            case.validate_response(response, checks=CHECKS)

        each()
    for name, seen in counts.items():
        print(name, dict(seen))
    share = {name: sum(n for status, n in seen.items() if status < 300) / seen.total() for name, seen in counts.items()}
    print(sum(seen.total() for seen in counts.values()), "cases")
    assert min(share.values()) >= 0.1, share  # of 25 cases; in the middle half of them
