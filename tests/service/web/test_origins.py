from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web import origins
from service.web.app import create_app
from tests.fakes import MeanColour, tiny_artifact
from tests.service.live import served
from tests.service.web.asks import colours, refused

LOOPBACK, ELSEWHERE = "127.0.0.1", "172.18.0.3"


def said(method: str, at: str = LOOPBACK, allowed: str = "", **headers: str) -> str:
    given = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return origins.refusal(method, given, at, origins.of(allowed))


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "127.0.0.1:8000"},  # no browser
        {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"},
        {"host": "localhost", "origin": "http://localhost"},
        {"host": "localhost:80", "origin": "http://localhost"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
        {"host": "app.localhost:8000", "origin": "http://app.localhost:8000"},
        {"host": "box", "origin": "http://box:8000"},  # behind a proxy that leaves the port out
        {"host": "fewshot:8000", "origin": "https://photos.example", "sec_fetch_site": "same-origin"},  # behind a proxy
        {"host": "127.0.0.1:8000", "origin": "null", "sec_fetch_site": "none"},
    ],
)
def test_clients_and_the_own_page_may_change_tasks(headers: dict[str, str]) -> None:
    assert said("POST", **headers) == ""


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "https://evil.example", "sec_fetch_site": "cross-site"},
        {"origin": "http://127.0.0.1:9000", "sec_fetch_site": "same-site"},  # another program of this machine
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "null"},  # a file, or a page in a frame that hides where it is from
        {"origin": "http://["},
        {"origin": "http://"},
    ],
)
def test_a_page_of_another_origin_reads_what_it_may_and_changes_nothing(headers: dict[str, str]) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert "CORS_ORIGINS" in said(method, host="127.0.0.1:8000", **headers)
    for method in ("GET", "HEAD", "OPTIONS"):  # a browser keeps the answers from the page
        assert said(method, host="127.0.0.1:8000", **headers) == ""


@pytest.mark.parametrize("listed", ["https://app.example", " https://b.example, https://APP.example/ ", "*"])
def test_an_origin_that_is_named_may_change_tasks(listed: str) -> None:
    asked = {"host": "127.0.0.1:8000", "origin": "https://app.example", "sec_fetch_site": "cross-site"}
    assert said("PUT", allowed=listed, **asked) == ""


@pytest.mark.parametrize("host", ["host.docker.internal:8000", "pi.local", "a.test", "box", "box:8000"])
def test_names_that_nobody_can_have_registered_are_answered(host: str) -> None:
    assert said("GET", host=host) == ""


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "EVIL.example.", "127.0.0.1.nip.io"])
def test_on_loopback_a_public_name_is_answered_nothing(host: str) -> None:
    for method in ("GET", "POST"):
        assert "localhost" in said(method, host=host, origin=f"http://{host}", sec_fetch_site="same-origin")
        assert said(method, host=host, allowed="https://evil.example, https://127.0.0.1.nip.io") == ""
    assert said("GET", ELSEWHERE, host=host) == ""  # whoever listens elsewhere has a name of his own


def test_what_is_nobodys_is_answered_under_any_name(http: httpx.Client) -> None:
    for path, status in (("/healthz", 200), ("/", 200), ("/v1/tasks", 403), ("/metrics", 403)):
        assert http.get(path, headers={"Host": "evil.example"}).status_code == status


def test_a_form_on_another_page_teaches_nothing(http: httpx.Client) -> None:
    assert http.put("/v1/tasks/kept", files=colours("red", "blue")).status_code == 201
    answer = http.post(
        "/v1/tasks/kept/examples", files=colours("red", "green"), headers={"Origin": "https://a.example"}
    )
    refused(answer, 403, "forbidden")
    refused(http.delete("/v1/tasks/kept", headers={"Origin": "https://a.example"}), 403, "forbidden")
    assert http.get("/v1/tasks/kept").json()["version"] == 1


@pytest.mark.slow
def test_a_page_that_is_named_teaches(tmp_path: Path) -> None:
    app = create_app(
        Settings(cors_origins="https://app.example"),
        artifact=tiny_artifact(tmp_path),
        extractor=MeanColour(),
        store=MemoryStore(),
    )
    with served(app) as client:
        asked = {"Origin": "https://app.example"}
        assert client.put("/v1/tasks/a", files=colours("red", "blue"), headers=asked).status_code == 201
        refused(
            client.put("/v1/tasks/b", files=colours("red", "blue"), headers={"Origin": "https://b"}), 403, "forbidden"
        )
