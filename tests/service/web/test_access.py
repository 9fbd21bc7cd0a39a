"""Who may do what: every route, with every kind of key, against the tasks of one's own and of others.

The routes are found in the app, so a new one is held to the same rules without a line here; the controls show that each
rule would notice a route that breaks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp

from service import keys
from service.keys import create, revoke
from service.settings import Settings, SettingsError
from service.stores.lru import Recent
from service.stores.memory import MemoryStore
from service.waiting import Waiting
from service.web import access
from service.web.app import create_app
from tests.fakes import MeanColour, picture, tiny_artifact
from tests.service.live import served
from tests.service.test_main import refused as start_refused
from tests.service.web.asks import colours, refused, text
from tests.service.web.conftest import LIMITS

RED = picture("red", seed=90)
CANARY = [
    (f"canary{k}", (f"{n}.png", picture(c, seed=n))) for k, c in enumerate(("red", "lime", "blue")) for n in (0, 1)
]
SUPPORT: list[tuple[str, Any]] = [
    *colours("red", "blue"),
    ("query", RED),
]  # good as a support set, as questions, and as both in one
IMAGES = len(SUPPORT)
SCOPES = ("adapt", "classify", "admin")
PUBLIC = ("/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs", "/docs/{name}")
# Requests that send a body and change nothing.
ASKING = ("/classify", "/embed", "/infer", "/repository/index")
# What has no tenant: whose scope it were given would make no difference.
STATELESS = ("/v1/classify", "/v1/embed", "/v1/artifact", "/v1/limits", "/metrics", "/v2", "/v2/", "/v2/health/")


class Crossing(Recent):
    """A store that can be told to show everybody the tasks of one tenant, as a route that errs would."""

    crossed: str | None = None

    def scope(self, tenant: str) -> Any:
        return super().scope(self.crossed or tenant)


# What is sent for the parameters that a route needs; 1 for those that are not named here.
QUERY: Mapping[str, Any] = {"method": "ridge"}


@dataclass(frozen=True)
class Operation:
    method: str
    path: str  # with its parameters in braces, as in the OpenAPI file
    query: Mapping[str, int]  # what cannot be left out
    sends: str | None  # the kind of its body

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def stateless(self) -> bool:
        return self.path in STATELESS or self.path.startswith("/v2/health/")

    @property
    def wanted(self) -> set[str]:
        """The scopes of which one is enough: said here once more, apart from the table of the service."""
        if self.path == "/metrics":
            return {"admin"}
        if self.method in ("GET", "HEAD") or self.path.endswith(ASKING):
            return {"classify", "adapt"}
        return {"adapt"}

    def ask(self, http: httpx.Client, key: str | None, about: Mapping[str, str]) -> httpx.Response:
        path = re.sub(r"\{(\w+)\}", lambda found: about[found[1]], self.path)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body: dict[str, Any] = {}
        if self.sends == "support":
            body = {"files": SUPPORT}
        elif self.sends == "tensors":
            tensor = {"name": "image", "shape": [IMAGES], "datatype": "BYTES", "data": [text(RED)] * IMAGES}
            body = {"json": {"inputs": [{**tensor, "parameters": {"content_type": "base64"}}]}}
        return http.request(self.method, path, params=dict(self.query), headers=headers, **body)


def operations(app: ASGIApp) -> list[Operation]:
    """All that the app answers and that is not public, whether or not the OpenAPI file tells of it."""
    while not isinstance(app, FastAPI):
        app = app.app  # type: ignore[attr-defined]
    described = app.openapi()["paths"]
    found = []

    def walk(routes: Any) -> None:
        for route in routes:
            if hasattr(route, "original_router"):
                walk(route.original_router.routes)
                continue
            path = re.sub(r":\w+\}", "}", route.path)
            for method in sorted(route.methods or ()):
                says = described.get(path, {}).get(method.lower(), {})
                content = says.get("requestBody", {}).get("content", {})
                assert not content or "multipart/form-data" in content, f"{method} {path}: how is its body sent?"
                sends = "support" if content else "tensors" if path.endswith("/infer") else None
                asked = [p["name"] for p in says.get("parameters", ()) if p["in"] == "query" and p.get("required")]
                query = {name: QUERY.get(name, 1) for name in asked}
                if path not in PUBLIC and not path.startswith(("/page/", "/offline/")):
                    found.append(Operation(method, path, query, sends))

    walk(app.routes)
    known = {(operation.method.lower(), operation.path) for operation in found}
    told = {(method, path) for path, item in described.items() for method in item if path not in PUBLIC}
    assert told <= known, "the walk over the routes has missed some"
    return found


@dataclass(frozen=True)
class Guarded:
    http: httpx.Client
    store: Crossing
    operations: list[Operation]
    file: Path
    keys: Mapping[str, str]  # "a": tenant a with all scopes; "b": tenant b likewise; "b adapt": with that one

    def get(self, path: str, key: str) -> httpx.Response:
        return self.http.get(path, headers=bearer(self.keys[key]))

    def stored(self, tenant: str) -> dict[Any, Any]:
        values = self.store.beneath.values  # type: ignore[attr-defined]
        return {name: value for name, value in values.items() if name[0] == tenant}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@contextlib.contextmanager
def guarded(folder: Path, **settings: Any) -> Iterator[Guarded]:
    """A running service with keys, in which tenants a and b have nothing yet."""
    file = folder / "keys.json"
    made = {tenant: create(file, tenant=tenant, scopes=SCOPES)[1] for tenant in ("a", "b")}
    made |= {f"b {scope}": create(file, tenant="b", scopes=[scope])[1] for scope in SCOPES}
    store = Crossing(MemoryStore(), most=100, stale_ok_s=300)
    app = create_app(
        Settings(**{**LIMITS, "keys_file": file, **settings}),
        artifact=tiny_artifact(folder / "artifact"),
        extractor=MeanColour(),
        store=store,
    )
    with served(app) as http:
        yield Guarded(http, store, operations(app), file, made)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(tmp_path_factory.mktemp("access")) as found:
        yield found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys file is looked at twenty times a second."""
    monkeypatch.setattr(keys, "CHECK_S", 0.05)


names = (f"door{number}" for number in itertools.count())


def taught(service: Guarded, token: str = "") -> dict[str, str]:
    """A new task, of tenant a unless another's key is given, and what a path may say about it."""
    name = next(names)
    answer = service.http.put(
        f"/v1/tasks/{name}?retain=images", files=CANARY, headers=bearer(token or service.keys["a"])
    )
    assert answer.status_code == 201, answer.text
    task = answer.json()
    example = task["examples"][0]
    version = str(task["version"])
    return {"task": name, "name": name, "example": example["id"], "label": example["label"], "version": version}


def told(answer: httpx.Response, about: Mapping[str, str]) -> tuple[Any, ...]:
    """What an answer says, but for the name that was asked about and what differs every time."""
    own = {"x-request-id", "server-timing", "date", "content-length", "ratelimit"}
    headers = {
        (name, value.replace(about["task"], "TASK")) for name, value in answer.headers.items() if name not in own
    }
    body: Any = answer.text.replace(about["task"], "TASK")

    def lasting(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key not in ("request_id", "timings_ms", "created_at")}

    with contextlib.suppress(ValueError):
        body = json.loads(body, object_hook=lasting)
    return answer.status_code, headers, body


def crossings(service: Guarded, operation: Operation, *, crossed: bool = False) -> list[str]:
    """What is wrong when tenant b asks about a task of tenant a: it has to be like a name that nobody ever used.

    `crossed`: tenant b is given the scope of tenant a meanwhile, as a route that errs would do.
    """
    about = taught(service)
    unused = {**about, "task": next(names)} | {"name": next(names)}
    unused["name"] = unused["task"]
    before = service.stored("a")
    service.store.crossed = "a" if crossed else None
    answer = operation.ask(service.http, service.keys["b"], about)
    service.store.crossed = None
    after = service.stored("a")
    never = operation.ask(service.http, service.keys["b"], unused)
    wrong = []
    if after != before:
        wrong.append(f"{operation.name}: it changed what is stored of tenant a")
    if "canary" in answer.text and about["label"] not in operation.path:
        wrong.append(f"{operation.name}: tenant b sees labels of tenant a")
    if "{" in operation.path:
        created = operation.method == "PUT" and answer.status_code == 201 and answer.json()["version"] == 1
        if answer.status_code != 404 and not created:
            wrong.append(f"{operation.name}: tenant b is answered {answer.status_code}")
        if told(answer, about) != told(never, unused):
            wrong.append(f"{operation.name}: a task of tenant a is told from one that never was")
    elif about["task"] in answer.text:
        wrong.append(f"{operation.name}: tenant b sees the name of a task of tenant a")
    own = operation.ask(service.http, service.keys["a"], about)
    # 409: found, and not to be had in this artifact
    if not crossed and own.status_code >= 400 and own.status_code != 409:
        wrong.append(f"{operation.name}: the request is no good, not even for its owner ({own.text})")
    for name in (about["task"], unused["task"]):
        service.http.delete(f"/v1/tasks/{name}", headers=bearer(service.keys["b"]))
    return wrong


def trespasses(service: Guarded, operation: Operation) -> list[str]:
    """What is wrong when somebody asks without a key, or with one that lacks the scope."""
    name = next(names)
    about = {"task": name, "name": name, "example": "ex_1", "label": "red", "version": "1"}
    before = service.stored("b")
    wrong = []
    for key in (None, "fsk_live_" + "a" * 12 + "_" + "A" * 43):
        answer = operation.ask(service.http, key, about)
        if not denied(answer, operation.path, 401, "unauthorized", ""):
            wrong.append(f"{operation.name}: answered {answer.status_code} without a good key")
    for scope in SCOPES:
        if scope not in operation.wanted:
            answer = operation.ask(service.http, service.keys[f"b {scope}"], about)
            if not any(denied(answer, operation.path, 403, "forbidden", f"`{need}`") for need in operation.wanted):
                wrong.append(f"{operation.name}: answered {answer.status_code} with the scope {scope}")
    if service.stored("b") != before:
        wrong.append(f"{operation.name}: it was refused, and yet it changed something")
    for scope in operation.wanted:
        answer = operation.ask(service.http, service.keys[f"b {scope}"], about)
        if answer.status_code in (401, 403):
            wrong.append(f"{operation.name}: answered {answer.status_code} with the scope {scope}")
    return wrong


def denied(answer: httpx.Response, path: str, status: int, code: str, words: str) -> bool:
    if answer.status_code != status:
        return False
    assert (answer.headers.get("www-authenticate") == 'Bearer realm="fewshot"') == (status == 401)
    if path.startswith("/v2"):
        assert list(answer.json()) == ["error"]
        return words in answer.json()["error"]
    return words in refused(answer, status, code)["detail"]


@pytest.mark.slow
def test_no_route_shows_or_changes_a_task_of_another_tenant(service: Guarded) -> None:
    assert len(service.operations) > 15
    assert [wrong for operation in service.operations for wrong in crossings(service, operation)] == []


@pytest.mark.slow
def test_the_matrix_would_notice_each_route_that_took_the_scope_of_another_tenant(tmp_path: Path) -> None:
    with guarded(tmp_path) as service:
        unnoticed = [op.name for op in service.operations if not crossings(service, op, crossed=True)]
        assert unnoticed == [op.name for op in service.operations if op.stateless]


@pytest.mark.slow
def test_no_route_is_open_without_a_key_or_with_one_that_lacks_the_scope(service: Guarded) -> None:
    assert [wrong for operation in service.operations for wrong in trespasses(service, operation)] == []


@pytest.mark.slow
@pytest.mark.parametrize("need", [*SCOPES, access.PUBLIC])
def test_the_matrix_would_notice_each_route_that_asked_for_another_scope(
    service: Guarded, monkeypatch: pytest.MonkeyPatch, need: str
) -> None:
    right = access.needed
    for operation in service.operations:
        path = re.compile(re.sub(r"\{\w+\}", "[^/]+", operation.path))

        def wrong(method: str, asked: str, op: Operation = operation, path: re.Pattern[str] = path) -> str:
            return need if method == op.method and path.fullmatch(asked) else right(method, asked)

        monkeypatch.setattr(access, "needed", wrong)
        is_right = set(access.ENOUGH.get(need, ())) == operation.wanted
        assert (trespasses(service, operation) == []) == is_right, operation.name


def test_the_openapi_file_says_which_scope_each_operation_needs(service: Guarded) -> None:
    document = service.http.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    wanted = {(op.method.lower(), op.path): op.wanted for op in service.operations}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if path in PUBLIC:
                assert "security" not in operation
                continue
            (need,) = operation["security"][0]["key"]
            assert access.ENOUGH[need] == wanted[method, path]
            for status in ("401", "403", "429"):
                content = operation["responses"][status]["content"]
                assert content == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "//v1/tasks", "/V1/tasks", "/docs/a/b", "/page"])
def test_where_there_is_nothing_a_key_is_needed_to_learn_so(service: Guarded, path: str) -> None:
    url = httpx.URL(service.http.base_url.copy_with(raw_path=path.encode()))
    refused(service.http.get(url), 401, "unauthorized")
    refused(service.http.get(url, headers=bearer(service.keys["b"])), 404, "not_found")


def test_what_stands_in_no_line_of_the_table_needs_the_scope_that_few_have(service: Guarded) -> None:
    for method, path in (("GET", "/nothing"), ("POST", "/v1/nothing"), ("DELETE", "/v2/models/x"), ("PATCH", "/v1")):
        for scope in ("classify", "adapt"):
            answer = service.http.request(method, path, headers=bearer(service.keys[f"b {scope}"]))
            assert (answer.status_code, "`admin`" in answer.text) == (403, True), (method, path)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PATCH", "TRACE", "POST", "DELETE"])
def test_another_method_does_not_get_past_the_keys(service: Guarded, method: str) -> None:
    for path in ("/v1/tasks", "/v1/tasks/x/classify", "/metrics", "/metrics/", "/v2"):
        assert service.http.request(method, path).status_code == 401
    if method != "HEAD":
        for path in ("/", "/healthz", "/docs", "/openapi.json"):
            assert service.http.request(method, path).status_code == 401


def test_what_is_public_asks_for_no_key_and_looks_at_none(service: Guarded) -> None:
    for path in ("/", "/healthz", "/readyz", "/docs", "/docs/swagger-ui.css", "/docs/start.js", "/openapi.json"):
        for headers in ({}, bearer("wrong"), bearer(service.keys["a"])):
            assert service.http.get(path, headers=headers).status_code in (200, 307), path


def test_a_key_counts_in_its_one_place_only(service: Guarded) -> None:
    key = service.keys["a"]
    get = service.http.get
    assert get("/v1/tasks", headers={"Authorization": f"bearer  {key}"}).status_code == 200
    for headers in (
        [("X-API-Key", key)],
        [("Authorization", key)],
        [("Authorization", f"Basic {key}")],
        [("Authorization", "Bearer")],
        [("Authorization", f"Bearer {key} {key}")],
        [("Authorization", f"Bearer {key},")],
        [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")],
        [("Proxy-Authorization", f"Bearer {key}")],
        [("Cookie", f"Authorization=Bearer {key}")],
        [("Authorization", "Bearer " + "x" * 10_000)],
    ):
        refused(get("/v1/tasks", headers=headers), 401, "unauthorized")
    for query in (f"key={key}", f"access_token={key}", f"Authorization=Bearer%20{key}"):
        refused(get(f"/v1/tasks?{query}"), 401, "unauthorized")


def test_without_a_good_key_nobody_waits_for_the_body(service: Guarded) -> None:
    host, port = service.http.base_url.host, service.http.base_url.port
    with socket.create_connection((host, port), timeout=10) as raw:
        start = time.perf_counter()
        raw.sendall(b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 90000\r\n\r\n")
        answer = raw.recv(65536).lower()
        assert time.perf_counter() - start < LIMITS["body_timeout_s"] / 2
    assert b" 401 " in answer.split(b"\r\n")[0]
    assert b"connection: close" in answer


def test_there_is_no_way_around_the_keys_over_a_websocket() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("let in")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/tasks", "headers": [], "state": {}}
    asyncio.run(access.Access(app, MemoryStore())(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.slow
def test_lanes_know_for_which_tenant_they_work(service: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tenants take turns on them, whatever the way in and whichever of its keys."""
    seen: list[str] = []
    join = Waiting.join
    monkeypatch.setattr(Waiting, "join", lambda self, job: (seen.append(job.tenant), join(self, job))[1])
    path = f"/v1/tasks/{taught(service)['task']}/classify"
    other = create(service.file, tenant="c", scopes=["adapt"])[1]
    wait_for(service, other, 200)
    image = picture("red")
    assert (
        service.http.post(
            path, content=image, headers={**bearer(service.keys["a"]), "Content-Type": "image/png"}
        ).status_code
        == 200
    )
    assert service.http.post(path, files={"image": image}, headers=bearer(service.keys["a"])).status_code == 200
    assert service.http.put("/v1/tasks/t", files=colours("red", "blue"), headers=bearer(other)).status_code == 201
    assert seen == ["a", "a", "a", "c"]


@pytest.mark.slow
def test_keys_of_one_tenant_share_its_tasks_and_those_made_without_keys_are_of_the_tenant_default(
    service: Guarded, quick: None
) -> None:
    about = taught(service)
    second = create(service.file, tenant="a", scopes=["classify"])[1]
    default = create(service.file, tenant="default", scopes=["classify"])[1]
    wait_for(service, second, 200)
    path = f"/v1/tasks/{about['task']}"
    assert service.http.get(path, headers=bearer(second)).status_code == 200
    refused(service.http.get(path, headers=bearer(default)), 404, "task_not_found")
    open_app = create_app(
        Settings(**LIMITS),
        artifact=tiny_artifact(service.file.parent / "artifact"),
        extractor=MeanColour(),
        store=service.store,
    )
    with served(open_app) as without_keys:
        assert without_keys.put("/v1/tasks/early", files=colours("red", "blue")).status_code == 201
    assert service.http.get("/v1/tasks/early", headers=bearer(default)).status_code == 200


def wait_for(service: Guarded, token: str, status: int) -> httpx.Response:
    ends = time.monotonic() + 5
    while True:
        answer = service.http.get("/v1/tasks", headers=bearer(token))
        if answer.status_code == status or time.monotonic() > ends:
            assert answer.status_code == status, answer.text
            return answer
        time.sleep(0.01)


@pytest.mark.slow
def test_keys_are_made_and_revoked_while_the_service_runs(service: Guarded, quick: None) -> None:
    old = create(service.file, tenant="c", scopes=["classify"])[1]
    wait_for(service, old, 200)
    new = create(service.file, tenant="c", scopes=["classify"])[1]
    wait_for(service, new, 200)
    wait_for(service, old, 200)  # both are good, until the old one is not
    revoke(service.file, old.split("_")[2])
    assert "revoked" in refused(wait_for(service, old, 401), 401, "unauthorized")["detail"]
    wait_for(service, new, 200)


@pytest.mark.slow
def test_a_key_ends_when_it_says(service: Guarded, quick: None) -> None:
    brief = create(service.file, tenant="c", scopes=["classify"], expires=datetime.now(UTC) + timedelta(seconds=0.4))[1]
    wait_for(service, brief, 200)
    assert "expired" in refused(wait_for(service, brief, 401), 401, "unauthorized")["detail"]


@pytest.mark.slow
def test_a_keys_file_that_is_damaged_while_the_service_runs_locks_nobody_out(
    service: Guarded, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    whole = service.file.read_bytes()
    try:
        service.file.write_bytes(whole[:-40])
        ends = time.monotonic() + 5
        while "stay in force" not in caplog.text and time.monotonic() < ends:
            assert service.get("/v1/tasks", "a").status_code == 200
        assert service.get("/v1/tasks", "a").status_code == 200
        assert service.http.get("/v1/tasks").status_code == 401
        assert "keys.json is damaged" in caplog.text
    finally:
        service.file.write_bytes(whole)


@pytest.mark.slow
def test_no_key_is_in_any_log_answer_or_metric(service: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    wrong = "fsk_live_" + "a" * 12 + "_" + "Canary" * 7 + "x"
    seen = ""
    with caplog.at_level(logging.DEBUG):
        for token in (wrong, service.keys["b"], service.keys["b classify"]):
            for operation in service.operations:
                name = next(names)
                about = {"task": name, "name": name, "example": "ex_1", "label": "red", "version": "1"}
                answer = operation.ask(service.http, token, about)
                seen += answer.text + str(answer.headers)
    assert "/metrics" in {operation.path for operation in service.operations}
    assert "fewshot_requests_total" in seen
    # The client logs in this process too; what it sends is no secret to it.
    ours = "".join(str(vars(r)) for r in caplog.records if not r.name.startswith(("httpx", "httpcore")))
    assert "'status': 401" in ours
    for token in (wrong, service.keys["b"], service.keys["b classify"]):
        assert token.rsplit("_", 1)[1] not in seen + ours


# Quotas.


def rate(answer: httpx.Response) -> tuple[int, int]:
    """What is left, and the seconds until all is there again."""
    found = re.fullmatch(r'"default";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert found
    return int(found[1]), int(found[2])


def limited(service: Guarded, quota: int, tenant: str = "a") -> str:
    token = create(service.file, tenant=tenant, scopes=SCOPES, quota=quota)[1]
    wait_for(service, token, 200)
    return token


@pytest.mark.slow
def test_every_route_that_takes_images_counts_them(service: Guarded, quick: None) -> None:
    token = limited(service, 10_000, tenant="counted")
    free = create(service.file, tenant="counted", scopes=["adapt", "classify"])[1]
    wait_for(service, free, 200)
    left = 10_000
    counted = set()
    for operation in service.operations:
        answer = operation.ask(service.http, token, taught(service, free))
        before, (left, seconds) = left, rate(answer)
        assert answer.headers["ratelimit-policy"] == '"default";q=10000;w=60'
        assert 1 <= seconds <= 60
        assert before - left == (IMAGES if operation.sends else 0), operation.name
        counted.add(operation.path) if before > left else None
    assert {
        "/v1/tasks",
        "/v1/classify",
        "/v1/embed",
        "/v1/tasks/{task}/classify",
        "/v1/tasks/{task}/examples",
    } <= counted


@pytest.mark.slow
def test_over_its_quota_a_key_is_told_how_long_to_wait_and_others_are_not_affected(
    service: Guarded, quick: None
) -> None:
    token = limited(service, 10)
    other = limited(service, 10)
    path = f"/v1/tasks/{taught(service)['task']}/classify"
    png = {"Content-Type": "image/png"}
    for left in (9, 8, 7):
        answer = service.http.post(path, content=RED, headers={**bearer(token), **png})
        assert (answer.status_code, rate(answer)[0]) == (200, left)
    for files in ([("i", RED)] * 8, [("i", RED)] * 8):
        over = service.http.post(path, files=files, headers=bearer(token))
        refused(over, 429, "over_quota", "7 are left")
        left, seconds = rate(over)
        assert (left, over.headers["retry-after"]) == (7, str(seconds))
    assert service.http.post(path, files=[("i", RED)] * 7, headers=bearer(token)).status_code == 200
    lean = service.http.post(path, content=RED, headers={**bearer(token), **png})
    refused(lean, 429, "over_quota", "0 are left")
    assert lean.headers["retry-after"] == str(rate(lean)[1])
    assert rate(service.http.get("/v1/tasks", headers=bearer(token)))[0] == 0
    assert rate(service.http.post(path, content=RED, headers={**bearer(other), **png}))[0] == 9
    assert "ratelimit" not in service.get("/v1/tasks", "a").headers


def test_a_quota_that_is_changed_in_the_file_counts_from_then_on(tmp_path: Path) -> None:
    key, _ = create(tmp_path / "keys.json", tenant="a", scopes=SCOPES, quota=10)
    layer = access.Access(None, MemoryStore())  # type: ignore[arg-type]
    before = layer._allowance(key)
    assert before is not None
    before.spend(4)
    assert layer._allowance(key) is before
    after = layer._allowance(key.model_copy(update={"quota": 20}))
    assert after is not None
    assert after.left()[0] == 20
    assert layer._allowance(key.model_copy(update={"quota": None})) is None


@pytest.mark.slow
def test_nothing_is_stored_over_quota_and_a_retry_of_what_is_there_costs_nothing(service: Guarded, quick: None) -> None:
    token = limited(service, IMAGES, tenant="q")
    for _ in range(2):
        answer = service.http.put("/v1/tasks/first", files=SUPPORT, headers=bearer(token))
        assert (answer.status_code in (200, 201), rate(answer)[0]) == (True, 0)
    refused(service.http.put("/v1/tasks/second", files=SUPPORT, headers=bearer(token)), 429, "over_quota")
    assert [item["task"] for item in service.http.get("/v1/tasks", headers=bearer(token)).json()["items"]] == ["first"]


def test_what_a_request_is_refused_for_before_work_is_done_costs_nothing(service: Guarded, quick: None) -> None:
    token = limited(service, 100)
    nobody = service.http.post("/v1/tasks/nobody/classify", files=SUPPORT, headers=bearer(token))
    refused(nobody, 404, "task_not_found")
    alone = service.http.post("/v1/tasks", files=colours("red"), headers=bearer(token))
    refused(alone, 422, "invalid_support")
    assert rate(alone)[0] == rate(nobody)[0] == 100


# The start.


def test_the_service_does_not_start_without_the_keys_that_it_was_told_of(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.json cannot be read"):
        create_app(Settings(keys_file=tmp_path / "none.json"), store=MemoryStore(), extractor=MeanColour())


@pytest.mark.slow
def test_a_start_that_fails_for_its_keys_is_one_line_with_the_file(tmp_path: Path) -> None:
    said = start_refused(tmp_path, KEYS_FILE=str(tmp_path / "none.json"))
    assert said.count("\n") == 1
    assert "none.json cannot be read" in said
    (tmp_path / "keys.json").write_text("{")
    assert "keys.json is damaged" in start_refused(tmp_path, KEYS_FILE=str(tmp_path / "keys.json"))


@pytest.mark.slow
def test_the_log_says_for_whom_the_tasks_are_open_where_no_keys_are_configured(tmp_path: Path) -> None:
    create(tmp_path / "keys.json", tenant="a", scopes=["adapt"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "open to this computer" in start_refused(tmp_path, PORT=port)
        assert "No keys" not in start_refused(tmp_path, PORT=port, KEYS_FILE=str(tmp_path / "keys.json"))
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = start_refused(tmp_path, PORT=port, HOST="0.0.0.0")
        assert '"level": "warning"' in said
        assert "open to everybody who reaches 0.0.0.0" in said
