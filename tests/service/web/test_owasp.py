"""Every operation of the service against whoever should not get through, and every limit at one less, itself, one more.

Made from the routes that the app has: one that is new, and without an entry here, fails the first test. What another
tenant sees is in test_access.py, which this borrows its requests from.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from models.images import MAX_ASPECT, MIN_EDGE
from service.keys import create
from service.settings import Settings
from service.stores import Pointer
from service.stores.memory import MemoryScope, MemoryStore
from service.web import schemas
from service.web.app import create_app
from tests.fakes import Gated, MeanColour, picture, tiny_artifact
from tests.models import corpus
from tests.service.live import served
from tests.service.web.asks import colours, refused, support_json, text
from tests.service.web.conftest import LIMITS
from tests.service.web.test_access import Guarded, Operation, bearer, guarded, operations, taught, told

PUBLIC, CLASSIFY, ADAPT, ADMIN = "public", "classify", "adapt", "admin"
# Each operation, and the scope that it needs. Pages and their files are public and not part of the API.
ENTRIES = {
    "GET /healthz": PUBLIC,
    "GET /readyz": PUBLIC,
    "GET /v2/health/live": PUBLIC,
    "GET /v2/health/ready": PUBLIC,
    "GET /metrics": ADMIN,
    "GET /v1/artifact": CLASSIFY,
    "GET /v1/limits": CLASSIFY,
    "POST /v1/classify": CLASSIFY,
    "POST /v1/embed": CLASSIFY,
    "GET /v1/tasks": CLASSIFY,
    "POST /v1/tasks": ADAPT,
    "GET /v1/tasks/{task}": CLASSIFY,
    "PUT /v1/tasks/{task}": ADAPT,
    "PATCH /v1/tasks/{task}": ADAPT,
    "DELETE /v1/tasks/{task}": ADAPT,
    "POST /v1/tasks/{task}/classify": CLASSIFY,
    "POST /v1/tasks/{task}/examples": ADAPT,
    "DELETE /v1/tasks/{task}/examples/{example}": ADAPT,
    "GET /v1/tasks/{task}/examples/{example}/image": CLASSIFY,
    "DELETE /v1/tasks/{task}/classes/{label}": ADAPT,
    "GET /v1/tasks/{task}/versions": CLASSIFY,
    "POST /v1/tasks/{task}/rollback": ADAPT,
    "GET /v1/tasks/{task}/support": CLASSIFY,
    "GET /v1/tasks/{task}/export": CLASSIFY,
    "GET /v2": CLASSIFY,
    "GET /v2/": CLASSIFY,
    "GET /v2/models/{name}": CLASSIFY,
    "GET /v2/models/{name}/ready": CLASSIFY,
    "GET /v2/models/{name}/versions/{version}": CLASSIFY,
    "GET /v2/models/{name}/versions/{version}/ready": CLASSIFY,
    "POST /v2/models/{name}/infer": CLASSIFY,
    "POST /v2/models/{name}/versions/{version}/infer": CLASSIFY,
    "POST /v2/repository/index": CLASSIFY,
}
GUARDED = [name for name, need in ENTRIES.items() if need != PUBLIC]
PATHS = sorted({name.split()[1] for name in ENTRIES})
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
PATIENCE_S = 20.0  # for a body
NOT_ENOUGH = {CLASSIFY: ADMIN, ADAPT: CLASSIFY, ADMIN: ADAPT}  # a scope that does not do in its place
OVERRIDES = {
    "X-HTTP-Method-Override": "DELETE",
    "X-HTTP-Method": "DELETE",
    "X-Method-Override": "DELETE",
    "X-Original-Method": "DELETE",
    "X-Original-URL": "/healthz",
    "X-Rewrite-URL": "/healthz",
    "X-Forwarded-Prefix": "/healthz",
    "X-Forwarded-Path": "/healthz",
    "X-Forwarded-Host": "elsewhere.invalid",
    "X-Forwarded-Proto": "gopher",
    "X-Forwarded-For": "127.0.0.1",
    "X-Real-IP": "127.0.0.1",
    "Forwarded": "for=127.0.0.1;host=elsewhere.invalid;proto=gopher",
    "X-Tenant": "a",
    "Host": "elsewhere.invalid",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(tmp_path_factory.mktemp("owasp"), body_timeout_s=PATIENCE_S) as found:
        yield found


def found(app: Any) -> set[str]:
    """All that the app answers but for pages: `operations` leaves out what is public."""
    while not isinstance(app, FastAPI):
        app = app.app
    public = {f"{method.upper()} {path}" for path, item in app.openapi()["paths"].items() for method in item}
    return public | {operation.name for operation in operations(app)} | {n for n in ENTRIES if "/v2/health" in n}


@pytest.mark.slow
def test_every_operation_has_an_entry_and_a_new_one_is_missed(service: Guarded) -> None:
    app = create_app(Settings(), extractor=MeanColour(), store=MemoryStore())
    assert found(app) == set(ENTRIES)
    inner: Any = app
    while not isinstance(inner, FastAPI):
        inner = inner.app

    async def planted() -> None: ...

    inner.add_api_route("/v1/planted", planted)
    inner.openapi_schema = None
    assert found(app) - set(ENTRIES) == {"GET /v1/planted"}


def operation(service: Guarded, name: str) -> Operation:
    return next(one for one in service.operations if one.name == name)


def filled(path: str, about: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: about[match[1]], path)


def plainly(service: Guarded, method: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and words of an answer. The path is sent as it is written; httpx would put it right."""
    connection = http.client.HTTPConnection(service.http.base_url.host, service.http.base_url.port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, str(answer.getheaders()) + answer.read().decode("latin-1")
    finally:
        connection.close()


ABOUT = {"task": "none", "name": "none", "example": "ex_1", "label": "red", "version": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", GUARDED)
def test_who_may_not_is_told_so_before_the_body_is_read(service: Guarded, name: str) -> None:
    method, path = name.split()
    cases = [("", b" 401 "), ("Authorization: Bearer fsk_live_wrong\r\n", b" 401 ")]
    cases.append((f"Authorization: Bearer {service.keys[f'b {NOT_ENOUGH[ENTRIES[name]]}']}\r\n", b" 403 "))
    for header, status in cases:
        with socket.create_connection((service.http.base_url.host, service.http.base_url.port), timeout=10) as raw:
            start = time.perf_counter()
            # Fewer bytes than the limit on bodies: what is refused is the sender, not the size.
            head = f"{method} {filled(path, ABOUT)} HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n{header}\r\n"
            raw.sendall(head.encode())
            answer = raw.recv(65536)
            seconds = time.perf_counter() - start
        assert status in answer.split(b"\r\n")[0] + b" ", answer
        assert seconds < PATIENCE_S / 2
        assert b"connection: close" in answer.lower()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GUARDED if " /v1/" in name])
def test_an_unknown_query_parameter_is_refused_and_nothing_done(service: Guarded, name: str) -> None:
    """Under /v2 they are passed over, as are those of /metrics: clients of those protocols may add some."""
    asked, about = operation(service, name), taught(service)
    before = service.stored("a")
    strange = Operation(asked.method, asked.path, {**asked.query, "_method": 1}, asked.sends)
    refused(strange.ask(service.http, service.keys["a"], about), 422, "invalid_request", "nknown query")
    assert service.stored("a") == before


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_another_method_is_refused_and_told_which_there_are(service: Guarded, path: str) -> None:
    about = taught(service)
    there = {name.split()[0] for name in ENTRIES if name.split()[1] == path}
    there |= {"HEAD"} if "GET" in there else set()
    before = service.stored("a")
    for method in sorted(set(METHODS) - there):
        answer = service.http.request(method, filled(path, about), headers=bearer(service.keys["a"]))
        assert answer.status_code == 405, (method, answer.text)
        assert set(answer.headers["allow"].split(", ")) == there, method
    assert service.stored("a") == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_a_path_in_another_spelling_is_none(service: Guarded, name: str) -> None:
    """And no redirect is made of it: its address would be built from what the client says the host is."""
    method, path = name.split()
    about = taught(service)
    before = service.stored("a")
    path = filled(path, about)
    others = [f"{path}/", f"{path}//", f"/{path}", path.replace("/", "//", 2), f"/.{path}", f"/x/..{path}", f"{path}/."]
    others += [path.upper(), f"{path}%00", f"{path};x=1", f"{path}%0d%0aX:y", f"{path}%20", f"{path}%2f", f"*{path}"]
    for other in others:
        if f"{method} {unquote(other)}" in ENTRIES or (other.endswith("%20") and "{label}" in name):
            continue  # that is another one, or another form of the same label
        status, said = plainly(service, method, other, Host="elsewhere.invalid", **bearer(service.keys["a"]))
        # 415, 422 and some of 404: what was added is taken for a part of a name.
        assert status in (400, 404, 405, 415, 422), (other, status)
        assert "elsewhere" not in said, other
        assert plainly(service, method, other)[0] in (400, 401), other
    assert service.stored("a") == before


@pytest.mark.slow
@pytest.mark.parametrize("name", GUARDED)
def test_headers_that_ask_for_another_method_path_host_or_tenant_change_nothing(service: Guarded, name: str) -> None:
    asked, key = operation(service, name), service.keys["b"]
    answers = []
    for headers in ({}, OVERRIDES):
        with httpx.Client(base_url=service.http.base_url, headers=headers, timeout=20) as http:
            about = taught(service, key)
            answer = asked.ask(http, key, about)
            kept = service.http.get(f"/v1/tasks/{about['task']}", headers=bearer(key)).status_code
            assert asked.ask(http, None, about).status_code == 401
            assert "elsewhere" not in answer.text + str(answer.headers)
            status, told_headers, body = told(answer, about)
            # Lists and counters tell of what else is there at the time.
            same = body if asked.method == "GET" and "{" in asked.path and isinstance(body, dict) else None
            answers.append(
                (200 if status == 201 else status, {header for header, _ in told_headers} - {"location"}, same, kept)
            )
    assert answers[0] == answers[1]
    assert answers[0][0] < 300 or answers[0][0] == 409  # 409: found, and not to be had in this artifact


# Limits.

SMALL = {**LIMITS, "max_pixels": 10_000, "body_timeout_s": 3.0, "max_waiting": 12, "max_wait_s": 600.0}
PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    artifact = tiny_artifact(tmp_path_factory.mktemp("artifact"))
    settings = Settings(**{name: value for name, value in SMALL.items() if name in Settings.model_fields})
    with served(create_app(settings, artifact=artifact, extractor=MeanColour(), store=MemoryStore())) as client:
        yield client


def embed(http: httpx.Client, file: bytes) -> httpx.Response:
    return http.post("/v1/embed", content=file, headers=PNG)


def plain(width: int, height: int) -> bytes:
    return corpus.encode(np.full((height, width, 3), 99, np.uint8), "PNG")


def body_bytes(http: httpx.Client, n: int) -> httpx.Response:
    body = json.dumps({"support": support_json("red", "blue"), "queries": [text(picture("red"))]}).encode()
    return http.post("/v1/classify", content=body.ljust(n), headers={"Content-Type": "application/json"})


def example_bytes(http: httpx.Client, n: int) -> httpx.Response:
    return embed(http, plain(20, 20).ljust(n, b"\0"))


def retained(http: httpx.Client, n: int) -> httpx.Response:
    """Half of it with the task, the rest is added to it."""
    first = [(label, plain(20, side).ljust(n // 4, b"\0")) for label, side in (("a", 20), ("b", 21))]
    assert http.put("/v1/tasks/kept?retain=images", files=first).is_success
    rest = n - 2 * (n // 4)
    more = [("a", plain(20, 22).ljust(rest // 2, b"\0")), ("b", plain(20, 23).ljust(rest - rest // 2, b"\0"))]
    return http.post("/v1/tasks/kept/examples", files=more)


def pixels(http: httpx.Client, n: int) -> httpx.Response:
    height = next(side for side in range(round(n**0.5), 0, -1) if n % side == 0)
    return embed(http, plain(n // height, height))


def edge(http: httpx.Client, n: int) -> httpx.Response:
    return embed(http, plain(n, 12))


def aspect(http: httpx.Client, n: int) -> httpx.Response:
    """In steps of a pixel: n is a multiple of the shorter side."""
    return embed(http, plain(n, MIN_EDGE))


def examples(http: httpx.Client, n: int) -> httpx.Response:
    files = [("red" if k % 2 else "blue", picture("red" if k % 2 else "blue", seed=k)) for k in range(n)]
    return http.post("/v1/tasks", files=files)


def queries(http: httpx.Client, n: int) -> httpx.Response:
    return http.post("/v1/embed", files=[("i", picture("red", seed=k)) for k in range(n)])


def way(http: httpx.Client, n: int) -> httpx.Response:
    return http.post("/v1/tasks", files=[(f"c{k}", picture("red", seed=k)) for k in range(n)])


def label(http: httpx.Client, n: int) -> httpx.Response:
    """Counted as it is kept: two code points that are one letter are one."""
    support = [{"label": "e\u0301" * n, "image": text(picture("red"))}, *support_json("blue")]
    return http.post("/v1/tasks", json={"support": support})


# Limit -> how to come so far, its value in steps of what is counted, and the answer beyond it.
AT_LIMITS: dict[str, tuple[Callable[[httpx.Client, int], httpx.Response], int, int, str]] = {
    "max_body_bytes": (body_bytes, SMALL["max_body_bytes"], 413, "too_large"),
    "max_example_bytes": (example_bytes, SMALL["max_example_bytes"], 413, "too_large"),
    "max_pixels": (pixels, SMALL["max_pixels"], 413, "too_large"),
    "min_edge": (lambda http, n: edge(http, 2 * MIN_EDGE - n), MIN_EDGE, 422, "undecodable_example"),
    "max_aspect": (aspect, MAX_ASPECT * MIN_EDGE, 422, "undecodable_example"),
    "max_examples": (examples, SMALL["max_examples"], 413, "too_large"),
    "max_retained_bytes": (retained, SMALL["max_retained_bytes"], 413, "too_large"),
    "max_queries": (queries, SMALL["max_queries"], 413, "too_large"),
    "max_way": (way, SMALL["max_way"], 413, "too_large"),
    "max_label": (label, SMALL["max_label"], 422, "invalid_support"),
}
# Each has a test of its own, below or in test_texts.py.
ELSEWHERE = {"formats", "body_timeout_s", "max_waiting", "max_text_bytes", "max_tasks"}


def test_every_limit_that_is_told_is_tested(limited: httpx.Client) -> None:
    shown = limited.get("/v1/limits").json()
    assert set(shown) == set(schemas.LimitsInfo.model_fields) == set(AT_LIMITS) | ELSEWHERE
    assert {name: shown[name] for name in SMALL if name in shown} == {n: v for n, v in SMALL.items() if n in shown}
    assert (shown["min_edge"], shown["max_aspect"]) == (MIN_EDGE, MAX_ASPECT)


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_LIMITS)
def test_a_limit_lets_through_what_it_names_and_no_more(limited: httpx.Client, name: str) -> None:
    come, limit, status, code = AT_LIMITS[name]
    for n in (limit - 1, limit):
        answer = come(limited, n)
        assert answer.status_code in (200, 201), (n, answer.text)
    problem = refused(come(limited, limit + 1), status, code)
    # A person can see which limit it was, and how much it is: its variable, or a word.
    assert re.search(rf"{name.upper()}|pixels|times", problem["detail"]), problem


@pytest.mark.slow
def test_one_tenant_cannot_fill_the_store(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    own, other = ({"headers": bearer(create(file, tenant=name, scopes=["adapt"])[1])} for name in ("a", "b"))
    settings = Settings(max_tasks=3, keys_file=file)
    app = create_app(settings, artifact=tiny_artifact(tmp_path / "tiny"), extractor=MeanColour(), store=MemoryStore())
    with served(app) as http:
        for name in ("one", "two", "three"):
            assert http.put(f"/v1/tasks/{name}", files=colours("red", "blue"), **own).status_code == 201
        for ask in (partial(http.put, "/v1/tasks/four"), partial(http.post, "/v1/tasks")):
            problem = refused(ask(files=colours("red", "lime"), **own), 413, "too_large")
            assert "MAX_TASKS" in problem["detail"]
        # What is there can be used, changed and taught anew, others have room of their own, and who deletes has room.
        assert http.put("/v1/tasks/one", files=colours("red", "lime"), **own).status_code == 200
        assert http.post("/v1/tasks/two/examples", files=colours("lime"), **own).status_code == 200
        assert http.put("/v1/tasks/four", files=colours("red", "blue"), **other).status_code == 201
        assert http.delete("/v1/tasks/three", **own).status_code == 204
        assert http.put("/v1/tasks/four", files=colours("red", "blue"), **own).status_code == 201


@pytest.mark.slow
def test_a_tenant_that_comes_with_many_new_tasks_at_once_gets_no_more_in(tmp_path: Path) -> None:
    settings = Settings(max_tasks=3, max_wait_s=60)
    app = create_app(settings, artifact=tiny_artifact(tmp_path / "tiny"), extractor=MeanColour(), store=MemoryStore())

    def put(number: int) -> int:
        return http.put(f"/v1/tasks/task-{number}", files=colours("red", "blue")).status_code

    with served(app) as http, ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(put, range(60)))
        assert set(answers) == {201, 413}
        assert len(http.get("/v1/tasks").json()["items"]) == answers.count(201) <= 3
        late = [put(number) for number in range(60, 64)]  # the places that were kept for who was refused are free again
        assert answers.count(201) + late.count(201) == 3


class SlowStore(MemoryStore):
    """Waits before it tells where a task is, and whether there are too many, as a store elsewhere does."""

    def scope(self, tenant: str) -> Any:
        class Scope(MemoryScope):
            async def pointer(self, task: str) -> Pointer | None:
                await asyncio.sleep(0.003)
                return await super().pointer(task)

            async def full(self, most: int) -> bool:
                await asyncio.sleep(0.003)
                return await super().full(most)

        return Scope(self, tenant)


@pytest.mark.slow
def test_a_bound_on_tasks_is_no_trouble_for_who_comes_twice_or_last(tmp_path: Path) -> None:
    settings = Settings(max_tasks=2, max_wait_s=60)
    app = create_app(settings, artifact=tiny_artifact(tmp_path / "tiny"), extractor=MeanColour(), store=SlowStore())

    def put(name: str, delay: float) -> tuple[int, int | None]:
        time.sleep(delay)
        answer = http.put(f"/v1/tasks/{name}", files=colours("red", "blue"))
        return answer.status_code, answer.json().get("version")

    with served(app) as http, ThreadPoolExecutor(2) as pool:
        for number in range(30):
            for names in (("one", "one"), ("one", "two")):
                answers = list(pool.map(put, names, (0, 0.001 * number)))
                assert {status for status, _ in answers} <= {200, 201}, (names, number)
                assert {version for _, version in answers} == {1}, (names, number)  # learned once
                for name in set(names):
                    http.delete(f"/v1/tasks/{name}").raise_for_status()


def test_the_formats_that_are_told_are_read_and_no_others(limited: httpx.Client) -> None:
    told_formats = limited.get("/v1/limits").json()["formats"]
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PCX"):
        answer = embed(limited, corpus.encode(corpus.scene(40, 40), kind))
        assert (answer.status_code == 200) == (kind in told_formats), kind


@pytest.mark.slow
def test_a_body_may_take_its_time_and_no_longer(limited: httpx.Client) -> None:
    image = plain(20, 20)
    head = f"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"
    for share, status in ((0.2, b"200"), (3.0, b"408")):
        with socket.create_connection((limited.base_url.host, limited.base_url.port), timeout=20) as raw:
            raw.sendall(head.encode() + image[:-1])
            raw.settimeout(share * SMALL["body_timeout_s"])
            try:
                first = raw.recv(65536)  # before the rest was sent: refused
            except TimeoutError:
                raw.settimeout(20)
                raw.sendall(image[-1:])
                first = raw.recv(65536)
        assert first.split()[1] == status


@pytest.mark.slow
def test_so_many_images_may_wait_and_no_more(tmp_path: Any) -> None:
    extractor, settings = Gated(), {name: value for name, value in SMALL.items() if name in Settings.model_fields}
    app = create_app(
        Settings(**{**settings, "lanes": 1}),
        artifact=tiny_artifact(tmp_path),
        extractor=extractor,
        store=MemoryStore(),
    )
    most = int(SMALL["max_waiting"])

    def waiting(http: httpx.Client) -> float:
        found = re.search(r"^fewshot_queue_depth (\S+)$", http.get("/metrics").text, re.M)
        assert found
        return float(found[1])

    with served(app) as http, ThreadPoolExecutor(4) as pool:
        try:
            asked = [pool.submit(queries, http, 1)]
            assert extractor.begun.wait(10)  # the only lane has it; what comes now waits
            for images, total in ((8, 8), (most - 9, most - 1), (1, most)):
                asked.append(pool.submit(queries, http, images))
                ends = time.monotonic() + 10
                while waiting(http) < total and time.monotonic() < ends:
                    time.sleep(0.01)
                assert waiting(http) == total
            refused(queries(http, 1), 503, "overloaded", "MAX_WAITING")
        finally:
            extractor.gate.set()
        answers = [one.result().status_code for one in asked]
    assert answers == [200] * 4


@pytest.mark.slow
def test_what_an_answer_says_of_wrong_items_does_not_grow_with_them(limited: httpx.Client) -> None:
    """Many bad items give a short answer: the first is named, and none is repeated."""
    for many, status, code in ((60, 422, "invalid_request"), (5_000, 413, "too_large")):
        support = [{"label": f"canary{k}", "image": "%%%"} for k in range(many)]
        answer = limited.post("/v1/tasks", json={"support": support})
        refused(answer, status, code)
        assert len(answer.content) < 1_000
        assert "canary" not in answer.text
