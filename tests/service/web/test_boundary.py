"""What every request passes: bodies bounded together, and work that nobody waits for any more."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from models.errors import Overloaded
from service.metrics import Metrics
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from service.web.boundary import Boundary
from tests.fakes import Gated, picture, tiny_artifact
from tests.service.live import served
from tests.service.web.asks import colours, refused

EXTRACTOR = Gated()
RED = picture("red")


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service with one lane, whose extractor waits for a gate, and room for three bodies of the largest size."""
    settings = Settings(lanes=1, max_body_bytes=100_000, max_bodies_bytes=300_000)
    artifact = tiny_artifact(tmp_path_factory.mktemp("artifact"))
    EXTRACTOR.gate.set()
    with served(create_app(settings, artifact=artifact, extractor=EXTRACTOR, store=MemoryStore())) as client:
        assert client.put("/v1/tasks/colours", files=colours("red", "blue")).status_code == 201
        yield client
        EXTRACTOR.gate.set()


def connected(http: httpx.Client, words: bytes) -> socket.socket:
    client = socket.create_connection((http.base_url.host, http.base_url.port or 0))
    client.settimeout(5)
    client.sendall(words)
    return client


def asking(path: str, body: bytes, *, length: int = 0, kind: str = "image/png") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/tasks/colours", 200),
        ("POST", "/v1/tasks/colours/classify", 200),
        ("GET", "/v1/tasks/none", 404),
        ("GET", "/nowhere", 404),
        ("PATCH", "/healthz", 405),
    ],
)
def test_no_answer_is_kept_by_who_passes_it_on_or_taken_for_something_else(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(
        method, path, content=RED if method == "POST" else None, headers={"Content-Type": "image/png"}
    )
    assert answer.status_code == status
    told = [answer.headers.get_list(name) for name in ("cache-control", "x-content-type-options")]
    assert told == [["no-store"], ["nosniff"]]


def abandoned(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("fewshot_abandoned_images_total")))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/tasks/colours/classify", "/v1/tasks/colours/classify?explain=true"])
def test_an_image_whose_caller_has_hung_up_is_not_looked_at(http: httpx.Client, path: str) -> None:
    before, batches = abandoned(http), sum(EXTRACTOR.batches)
    EXTRACTOR.gate.clear()
    EXTRACTOR.begun.clear()
    first = connected(http, asking(path, RED))
    assert EXTRACTOR.begun.wait(5)
    leavers = [connected(http, asking(path, RED)) for _ in range(10)]
    time.sleep(0.3)  # they are in the queue
    for leaver in leavers:
        leaver.close()
    time.sleep(0.3)
    EXTRACTOR.gate.set()
    with closing(first):
        assert first.recv(10_000).startswith(b"HTTP/1.1 200 ")
    assert http.post(path, content=RED, headers={"Content-Type": "image/png"}).status_code == 200
    assert abandoned(http) == before + 10
    assert sum(EXTRACTOR.batches) == batches + 2
    assert 'status="499"' in http.get("/metrics").text


@pytest.mark.slow
def test_a_task_is_learned_though_who_sent_it_has_hung_up(http: httpx.Client) -> None:
    form = httpx.Request("PUT", f"{http.base_url}/v1/tasks/left", files=colours("red", "blue", "green"))
    body = form.read()
    EXTRACTOR.gate.clear()
    EXTRACTOR.begun.clear()
    first = connected(http, asking("/v1/tasks/colours/classify", RED))
    assert EXTRACTOR.begun.wait(5)
    words = asking("/v1/tasks/left", body, kind=form.headers["content-type"]).replace(b"POST", b"PUT", 1)
    leaver = connected(http, words)
    time.sleep(0.3)
    leaver.close()
    time.sleep(0.3)
    EXTRACTOR.gate.set()
    with closing(first):
        assert first.recv(10_000).startswith(b"HTTP/1.1 200 ")
    give_up = time.monotonic() + 5
    while http.get("/v1/tasks/left").status_code == 404:
        assert time.monotonic() < give_up
    assert http.get("/v1/tasks/left").json()["version"] == 1


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/tasks/colours/classify", "image/png"),
        ("/v1/tasks/colours/classify", "application/json"),
        ("/v1/tasks", "application/zip"),
        ("/v1/tasks", "multipart/form-data; boundary=a"),
    ],
)
def test_who_hangs_up_within_a_body_is_no_failure_of_the_service(
    http: httpx.Client, path: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    connected(http, asking(path, bytes(500), length=1000, kind=kind)).close()
    give_up = time.monotonic() + 5
    while not any(getattr(record, "fields", {}).get("status") == 499 for record in caplog.records):
        assert time.monotonic() < give_up, caplog.text
        time.sleep(0.01)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.slow
def test_all_bodies_together_are_bounded_and_room_comes_back(http: httpx.Client) -> None:
    path, kind = "/v1/tasks/colours/classify", {"Content-Type": "image/png"}
    with ExitStack() as held:
        clients = [
            held.enter_context(closing(connected(http, asking(path, bytes(99_000), length=99_500)))) for _ in range(3)
        ]
        time.sleep(0.3)
        refused(http.post(path, content=bytes(9_000), headers=kind), 503, "overloaded", "MAX_BODIES_BYTES")
        assert http.get("/v1/tasks/colours").status_code == 200  # what brings no body is answered
        clients[0].close()
        time.sleep(0.3)
        refused(http.post(path, content=bytes(9_000), headers=kind), 422, "undecodable_example")


@pytest.mark.slow
def test_what_an_archive_unpacks_to_counts_as_if_it_had_been_sent(http: httpx.Client) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for label in "ab":
            for k in range(4):
                archive.writestr(f"{label}/{k}.png", bytes(45_000))
    small = out.getvalue()
    assert len(small) < 10_000
    kind = {"Content-Type": "application/zip"}
    with closing(connected(http, asking("/v1/tasks/colours/classify", bytes(1_000), length=2_000))):
        time.sleep(0.2)
        refused(http.post("/v1/tasks", content=small, headers=kind), 503, "overloaded", "MAX_BODIES_BYTES")
    time.sleep(0.3)
    refused(http.post("/v1/tasks", content=small, headers=kind), 422, "invalid_support")  # alone it may


@pytest.mark.slow
def test_what_a_compressed_body_unpacks_to_counts_as_if_it_had_been_sent(http: httpx.Client) -> None:
    small, path = zlib.compress(bytes(90_000)), "/v1/tasks/colours/classify"
    kind, infer = {"Content-Encoding": "deflate"}, "/v2/models/extractor/infer"
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(closing(connected(http, asking(path, bytes(80_000), length=90_000))))
        time.sleep(0.2)
        answer = http.post(infer, content=small, headers=kind)
        assert answer.status_code == 503, answer.text
        assert "MAX_BODIES_BYTES" in answer.json()["error"]
        plain = http.post(infer, content=bytes(40_000), headers={"Content-Encoding": "identity"})
        assert plain.status_code == 400, plain.text  # counted once it has room
    time.sleep(0.3)
    assert http.post(infer, content=small, headers=kind).status_code == 400  # there is room, and it is no JSON


def test_of_the_room_for_bodies_each_tenant_has_a_share() -> None:
    boundary = Boundary(print, max_body_bytes=100, max_bodies_bytes=100, body_timeout_s=1, metrics=Metrics())  # type: ignore[arg-type]
    boundary._hold("flood", 90, own=90)
    boundary._hold("calm", 30, own=30)
    with pytest.raises(Overloaded):
        boundary._hold("flood", 10, own=10)
    boundary._hold("calm", 20, own=20)
    with pytest.raises(Overloaded):
        boundary._hold("calm", 10, own=10)
    for who, size in (("flood", 100), ("calm", 60)):
        boundary._release(who, size)
    assert boundary.held == 0
    boundary._hold("flood", 150, own=150)  # whoever is alone may send as much as one may


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["at once", "after the time for a body"])
def test_once_an_answer_has_begun_what_is_missing_of_the_body_matters_no_more(
    late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Files are sent while it is asked whether the caller is still there."""
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["more_body"]
        asked = asyncio.create_task(receive())
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        heard.append((await asked)["type"])
        heard.append((await receive())["type"])
        await send({"type": "http.response.body", "body": b"whole"})

    messages: list[Message] = [{"type": "http.request", "body": b"half", "more_body": True}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.sleep(0.2 if late else 0.01)
        return {"type": "http.disconnect"}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    bounds = {"max_body_bytes": 100, "max_bodies_bytes": 100, "body_timeout_s": 0.1}
    boundary = Boundary(app, **bounds, metrics=Metrics())  # type: ignore[arg-type]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"content-length", b"9")], "query_string": b""}
    asyncio.run(boundary(scope, receive, send))
    assert heard == ["http.disconnect"] * 2
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 2]
    assert (sent[1]["body"], sent[2].get("body", b"")) == (b"whole", b"")  # nobody waits for the second
    assert not [record for record in caplog.records if record.exc_info]


def test_who_sends_the_whole_of_too_large_a_body_before_it_listens_is_told_why(http: httpx.Client) -> None:
    """As the client in Python's own library does; a close with bytes unread would cut the answer off."""
    limit = http.get("/v1/limits").json()["max_body_bytes"]
    url, headers = f"{http.base_url}/v1/tasks/any/classify", {"Content-Type": "image/png"}
    asked = urllib.request.Request(url, data=bytes(limit + 20_000_000), headers=headers)
    for declared in (True, False):
        if not declared:
            asked.data = iter([bytes(1_000_000)] * 20)
            asked.remove_header("Content-length")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(asked, timeout=20)
        with error.value:
            assert (error.value.code, json.load(error.value)["code"]) == (413, "too_large")


@pytest.mark.slow
def test_who_is_refused_and_goes_on_sending_takes_no_room_of_others_and_counts_no_time() -> None:
    metrics = Metrics()
    boundaries: list[Boundary] = []
    held: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise Overloaded("No.")

    async def receive() -> Message:
        if not held:
            held.append(0)
            return {"type": "http.request", "body": bytes(60), "more_body": True}
        held.append(boundaries[0].held)
        await asyncio.sleep(0.3)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    boundaries.append(Boundary(app, max_body_bytes=100, max_bodies_bytes=100, body_timeout_s=1, metrics=metrics))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [(b"content-length", b"90")],
        "query_string": b"",
    }
    asyncio.run(boundaries[0](scope, receive, send))
    assert held == [0, 0]
    assert boundaries[0].held == 0
    assert metrics.registry.get_sample_value("fewshot_request_duration_seconds_sum", {"route": "none"}) < 0.2  # type: ignore[operator]
