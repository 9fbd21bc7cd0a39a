"""What /metrics tells about the process, its connections, its log and its keys."""

from __future__ import annotations

import inspect
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
import yaml
from fastapi import FastAPI

from service import keys
from service.metrics import Metrics
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web import connections
from service.web.app import create_app
from service.web.connections import Door
from tests.fakes import MeanColour, tiny_artifact
from tests.service.live import Server, running, served
from tests.service.test_main import ROOT


def value(text: str, name: str, **labels: str) -> float:
    inside = ",".join(f'{label}="{content}"' for label, content in labels.items())
    line = f"{name}{{{inside}}} " if labels else f"{name} "
    (found,) = [row.removeprefix(line) for row in text.splitlines() if row.startswith(line)]
    return float(found)


def test_the_process_is_in_it() -> None:
    text = Metrics().exposition().decode()
    assert value(text, "process_resident_memory_bytes") > 1e6
    assert 0 < value(text, "process_open_fds") < value(text, "process_max_fds")


def test_what_is_counted_elsewhere_is_asked_for_when_somebody_looks() -> None:
    metrics, lines = Metrics(), [1]
    assert value(metrics.exposition().decode(), "fewshot_log_lines_dropped_total") == 0
    metrics.elsewhere.log_lines_dropped = lambda: len(lines)
    metrics.elsewhere.connections_ended = lambda: {"left": 3 * len(lines)}
    lines.append(2)
    text = metrics.exposition().decode()
    assert value(text, "fewshot_log_lines_dropped_total") == 2
    assert value(text, "fewshot_connections_ended_total", why="left") == 6


def test_every_reason_to_end_a_connection_is_counted_from_the_start() -> None:
    named = set(re.findall(r'(?:ended\[|drop\()"([^"]+)"', inspect.getsource(connections)))
    assert named == set(Door.WHY)
    assert Door(max_connections=1, header_timeout_s=1, answer_timeout_s=1).total == dict.fromkeys(named, 0)


def until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 5
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_what_was_ended_stays_counted_when_the_log_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SWEEP_S", 0.02)
    monkeypatch.setattr(connections, "TELL_S", 0.0)
    door = Door(max_connections=10, header_timeout_s=5, answer_timeout_s=5)
    config = uvicorn.Config(FastAPI(), log_config=None, lifespan="off", http=door.protocol(), ws="none")
    listener = socket.create_server(("127.0.0.1", 0))
    with running(Server(config), listener):
        for n in (1, 2):
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(b"nonsense\r\n\r\n")
                until(lambda n=n: door.total["broke the protocol"] == n and not door.ended)  # type: ignore[misc]


@contextmanager
def app(folder: Path, **settings: Path) -> Iterator[httpx.Client]:
    made = Settings(lanes=1, **settings)  # type: ignore[arg-type]
    with served(
        create_app(made, artifact=tiny_artifact(folder), extractor=MeanColour(), store=MemoryStore())
    ) as client:
        yield client


@pytest.mark.slow
def test_whether_the_keys_can_be_read_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, token = keys.create(file, tenant="acme", scopes=("admin",))
    whole = file.read_text()
    with app(tmp_path, keys_file=file) as http:
        http.headers["Authorization"] = f"Bearer {token}"
        for text, readable in ((whole, 1), (whole[:-5], 0), (whole, 1)):
            file.write_text(text)
            assert value(http.get("/metrics").text, "fewshot_keys_file_readable") == readable
        keys.pepper_file(file).unlink()
        assert value(http.get("/metrics").text, "fewshot_keys_file_readable") == 0


@pytest.mark.slow
def test_without_keys_nothing_is_wrong_with_them(tmp_path: Path) -> None:
    with app(tmp_path) as http:
        assert value(http.get("/metrics").text, "fewshot_keys_file_readable") == 1


@pytest.mark.slow
def test_the_alert_about_changes_looks_at_every_route_that_changes_and_no_question(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    rules = {rule["alert"]: rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]}
    (routes,) = re.findall(r'route=~"([^"]*)"', rules["FewshotRefusesChanges"])
    told = re.findall(r"^### `(\w+) (/\S+)`", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    asks = {"/v1/tasks/{task}/classify", "/v1/classify", "/v1/embed"}
    change = {(method, path) for method, path in told if method != "GET" and path not in asks}

    def counted(asked: set[tuple[str, str]]) -> set[str]:
        """The routes of such requests as the metric spells them, which the reference may do otherwise."""
        with app(tmp_path) as http:
            for method, path in asked:
                http.request(method, re.sub(r"\{\w+\}", "x", path))
            found = re.findall(r'^fewshot_requests_total\{route="([^"]*)"', http.get("/metrics").text, re.MULTILINE)
        assert len(found) >= len({path for _, path in asked}) > 5
        return set(found)

    changing = counted(change)
    assert {route for route in changing | counted(set(told) - change) if re.fullmatch(routes, route)} == changing
