"""A service that runs is put to the test as a client would."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import keys
from service.doctor import running
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.fakes import Letters, tiny_text_artifact
from tests.service.doctor.findings import everything, fine, taken, wrong
from tests.service.live import served
from tests.service.test_client import service
from tests.service.test_main import started


def test_a_service_that_does_not_answer_or_is_another_is_told(tmp_path: Path) -> None:
    with taken() as port:
        pass
    wrong(running.service(f"http://127.0.0.1:{port}", None), "Nothing answers")
    wrong(running.service("ftp://x", None), "no address of a service")
    with service(tmp_path) as (url, faults):
        faults.next.append("404")
        wrong(running.service(url, None), "not one of a fewshot service")


@pytest.mark.slow
def test_a_service_with_keys_asks_for_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, weak = keys.create(file, tenant="acme", scopes=("admin",))
    with service(tmp_path, keys_file=file, max_body_bytes=10**6, max_example_bytes=10**6) as (url, _):
        wrong(running.service(url, None), "key")
        wrong(running.service(url, "fsk_live_000000000000_" + "0" * 43), "key")
        wrong(running.service(url, weak), "is up", status="note")


@pytest.mark.slow
def test_a_running_service_is_put_to_the_test(tmp_path: Path) -> None:
    with started(tmp_path / "data") as (process, url, _):
        environment = {"FEWSHOT_PORT": url.rsplit(":", 1)[1], "FEWSHOT_DATA_DIR": str(tmp_path / "data")}
        found = everything(environment)
        fine(found["port"], "fewshot is running")
        fine(found["data"], "in use by the running service")
        fine(found["service"], "learned two letters and knew a third in")
        process.kill()
        process.wait()
        found = everything(environment, url=url)
        fine(found["port"], "is free")
        wrong(found["service"], "Nothing answers")


@pytest.mark.slow
def test_a_running_service_that_reads_texts_is_put_to_the_test_with_texts(tmp_path: Path) -> None:
    artifact = tiny_text_artifact(tmp_path)
    app = create_app(Settings(), artifact=artifact, extractor=Letters(), store=MemoryStore())
    with served(app) as http:
        fine(running.service(str(http.base_url), None), "learned two kinds of text and knew another in")
