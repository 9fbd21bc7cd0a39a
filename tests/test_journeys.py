"""Three people on their first day, as scripts: an application developer, a researcher, an operator.

Each goes the whole way through real processes and prints how long each step took, as one JSON line (`pytest -rP` shows
them). The times that are asserted are generous, for a test machine does other things too.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.redis_server import RedisServer
from tests.service.test_main import started

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "service" / "sample"


class Watch:
    """A stopwatch that remembers each lap."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now

    def told(self, journey: str, **more: object) -> None:
        print(
            json.dumps({"journey": journey, **more, "seconds": self.laps, "total": round(sum(self.laps.values()), 2)})
        )


def photo(label: str, number: int) -> bytes:
    return (SAMPLE / label / f"{number}.png").read_bytes()


def saved(image: bytes, quality: int) -> bytes:
    """The same picture as a JPEG."""
    out = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(out, "JPEG", quality=quality)
    return out.getvalue()


def photos(*labels: str, shots: int = 3) -> list[tuple[str, bytes]]:
    return [(label, photo(label, number)) for label in labels for number in range(1, shots + 1)]


def python(*arguments: str, cwd: Path = ROOT, limit_s: float = 60, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**clean, **variables},
        text=True,
        capture_output=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@contextmanager
def client(address: str, key: str = "") -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=address, headers=headers, timeout=30) as http:
        yield http


def test_an_application_developer_goes_from_a_start_to_a_file_of_their_own(tmp_path: Path) -> None:
    watch = Watch()
    with started(tmp_path / "data") as (_, address, said), client(address) as http:
        watch.lap("start, until it says that it is ready")
        assert "curl" in said
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        watch.lap("the page")
        # The first answer, with nothing stored and nothing decided.
        answer = http.post("/v1/classify", files=[*photos("alpha", "theta"), ("query", photo("theta", 9))]).json()
        assert answer["predictions"][0]["label"] == "theta"
        watch.lap("first answer")
        # A task of one's own, in which one photo was given the wrong name.
        wrong = ("alpha", photo("theta", 4))
        task = http.put("/v1/tasks/letters", files=[*photos("alpha", "theta", shots=5)[:-2], wrong]).json()
        suspects = task["report"]["suspects"]
        (example,) = {row["id"] for row in task["examples"]} - {
            row["id"] for row in http.post("/v1/tasks", files=photos("alpha", "theta", shots=5)[:-2]).json()["examples"]
        }
        assert [suspects[0][name] for name in ("example", "looks_like")] == [example, "theta"]
        assert example in task["report"]["advice"]
        watch.lap("teach, and read the report")
        # The correction: take it back, and send it under its name.
        http.delete(f"/v1/tasks/letters/examples/{example}").raise_for_status()
        task = http.post("/v1/tasks/letters/examples", files=[("theta", photo("theta", 4))]).json()
        assert task["version"] == 3
        assert example not in {row["example"] for row in task["report"]["suspects"]}
        never_wrong = http.post("/v1/tasks", files=[*photos("alpha", "theta", shots=5)[:-1]]).json()
        assert task["head"] == never_wrong["head"]
        watch.lap("correct")
        row = http.post("/v1/tasks/letters/classify?explain=true", files=[("image", photo("theta", 9))]).json()
        asked = row["predictions"][0]
        assert asked["label"] == "theta"
        watch.lap("ask")
        # A hurry: one photo of each, saved three times. The report is not taken in.
        hurried = [(label, saved(photo(label, 1), quality)) for label in ("alpha", "theta") for quality in (95, 85, 75)]
        report = http.put("/v1/tasks/hurry", files=hurried).raise_for_status().json()["report"]
        assert (report["accuracy"], [len(twins) for twins in report["twins"]]) == (None, [3, 3])
        assert report["advice"].startswith("6 of 6 examples look like another of their class")
        # And a muddle: the same photos under both names.
        muddle = [(label, image) for label in ("alpha", "theta") for _, image in hurried]
        assert http.put("/v1/tasks/muddle", files=muddle).status_code == 201
        watch.lap("hurry and muddle")
        body = http.get("/v1/tasks/letters/export?format=zip").raise_for_status().content
        (tmp_path / "letters.zip").write_bytes(body)
        watch.lap("export")
    # The service is gone; the file answers alike.
    shutil.unpack_archive(tmp_path / "letters.zip", tmp_path / "letters")
    (runner,) = (tmp_path / "letters").rglob("run.py")
    printed = python(str(runner), str(SAMPLE / "theta" / "9.png"), cwd=tmp_path)
    assert re.search(r"9\.png: (.+)", printed)[1] == "theta"  # type: ignore[index]
    share = float(re.search(r"theta (\d\.\d+)", printed)[1])  # type: ignore[index]
    assert share == pytest.approx(asked["probability"], abs=1e-3)
    watch.lap("run the file")
    watch.told("application developer")
    assert sum(watch.laps[name] for name in ("first answer", "teach, and read the report", "correct", "ask")) < 10


@pytest.mark.torch
def test_a_researcher_goes_from_nothing_to_a_service_of_their_own_artifact(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    watch = Watch()
    printed = python("-m", "training", "demo", "--out", str(tmp_path / "demo"), limit_s=600)
    assert "| learner | 5-way 1-shot | 5-way 5-shot |" in printed
    watch.lap("demo: pretrain, metatrain, export, evaluate")
    # One wish more: the same artifact on other episodes, as a program reads it.
    figures = tmp_path / "figures.jsonl"
    artifact, shapes = tmp_path / "demo" / "artifact", tmp_path / "demo" / "shapes"
    evaluate = ["-m", "training", "evaluate", "--artifact", str(artifact), "--data", str(shapes), "--episodes", "100"]
    again = [python(*evaluate, "--shot", "5", "--json-out", str(figures), limit_s=120) for _ in range(2)]
    assert again[0] == again[1]
    first, *_ = (json.loads(line) for line in figures.read_text().splitlines())
    assert first["episodes"] == 100
    assert first["interval"] > 0
    watch.lap("measure twice, to the same figures")
    with started(tmp_path / "data", ARTIFACT=str(artifact)) as (_, address, _said), client(address) as http:
        assert http.get("/v1/artifact").json()["name"] == "demo"
        folders = sorted(shapes.iterdir())[:5]
        pictures = {folder.name: [path.read_bytes() for path in sorted(folder.glob("*.png"))] for folder in folders}
        support = [(label, image) for label, images in pictures.items() for image in images[:10]]
        task = http.put("/v1/tasks/shapes", files=support).raise_for_status().json()
        right = 0
        for label, images in pictures.items():
            asked = http.post(
                "/v1/tasks/shapes/classify?reject=off", files=[("image", image) for image in images[10:]]
            ).json()
            right += sum(row["label"] == label for row in asked["predictions"])
    watch.lap("serve it, teach it, ask it")
    watch.told("researcher", right=f"{right} of 50", method=task["method"])
    assert right >= 20  # by chance 10


def test_an_operator_loses_nothing_and_lets_nobody_in(tmp_path: Path) -> None:
    watch = Watch()
    keys = tmp_path / "keys.json"

    def key(tenant: str, scopes: str) -> str:
        return python(
            "-m", "service.keys", "--file", str(keys), "create", "--tenant", tenant, "--scopes", scopes
        ).strip()

    teacher, stranger, monitor = key("acme", "adapt,classify"), key("other", "adapt"), key("acme", "admin")
    watch.lap("three keys")
    with started(tmp_path / "data", KEYS_FILE=str(keys)) as (process, address, _), client(address, teacher) as http:
        watch.lap("start")
        assert httpx.get(address + "/v1/tasks").status_code == 401
        task = http.put("/v1/tasks/letters", files=photos("alpha", "theta")).raise_for_status().json()
        watch.lap("teach")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with started(tmp_path / "data", KEYS_FILE=str(keys)) as (process, address, _), client(address, teacher) as http:
        found = http.get("/v1/tasks/letters").raise_for_status().json()
        assert (found["head"], found["version"], found["examples"]) == (task["head"], 1, task["examples"])
        watch.lap("kill -9, start, and it is there")
        with client(address, stranger) as other:
            assert other.get("/v1/tasks/letters").status_code == 404
            assert other.get("/metrics").status_code == 403
        answer = http.post("/v1/tasks/letters/classify", files=[("image", photo("theta", 9))]).json()
        with client(address, monitor) as scraper:
            metrics = scraper.get("/metrics").raise_for_status().text
        assert 'fewshot_requests_total{route="/v1/tasks/{task}/classify",status="200"} 1.0' in metrics
        assert "letters" not in metrics
        assert "acme" not in metrics
        watch.lap("scrape")
        # Backup while it runs, with a change after it that the backup must not have.
        backup = tmp_path / "backup"
        backup.mkdir()
        code = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))"
        python("-c", code, str(tmp_path / "data" / "fewshot.sqlite3"), str(backup / "fewshot.sqlite3"))
        shutil.copy(tmp_path / "data" / "store.key", backup)
        http.delete("/v1/tasks/letters").raise_for_status()
        watch.lap("back up")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        watch.lap("stop")
    with started(backup, KEYS_FILE=str(keys)) as (_, address, _said), client(address, teacher) as http:
        assert http.get("/v1/tasks/letters").raise_for_status().json()["head"] == task["head"]
        again = http.post("/v1/tasks/letters/classify", files=[("image", photo("theta", 9))]).json()
        assert again["predictions"] == answer["predictions"]
    watch.lap("restore")
    watch.told("operator")


@pytest.mark.redis
def test_an_operator_of_redis_restores_from_a_copy_of_its_log(tmp_path: Path) -> None:
    watch = Watch()
    (tmp_path / "store-key").write_text("a key of thirty-two characters..")
    for name in ("redis", "restored", "data"):
        (tmp_path / name).mkdir()
    shared = {"STORE_KEY_FILE": str(tmp_path / "store-key")}
    with RedisServer(tmp_path / "redis") as redis:
        watch.lap("redis")
        with started(tmp_path / "data", REDIS_URL=redis.url, **shared) as (_, address, _), client(address) as http:
            task = http.put("/v1/tasks/letters", files=photos("alpha", "theta")).raise_for_status().json()
            watch.lap("start and teach")
            redis.kill()
            asked = (
                http.post("/v1/tasks/letters/classify", files=[("image", photo("theta", 9))]).raise_for_status().json()
            )
            assert asked["stale"]
            refused = http.put("/v1/tasks/another", files=photos("alpha", "theta"))
            assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
            shutil.copytree(tmp_path / "redis" / "appendonlydir", tmp_path / "restored" / "appendonlydir")
            watch.lap("copy while it is stopped")
    with (
        RedisServer(tmp_path / "restored") as redis,
        started(tmp_path / "data", REDIS_URL=redis.url, **shared) as (_, address, _said),
        client(address) as http,
    ):
        found = http.get("/v1/tasks/letters").raise_for_status().json()
        assert (found["head"], found["version"]) == (task["head"], 1)
        answer = http.post("/v1/tasks/letters/classify", files=[("image", photo("theta", 9))]).json()
        assert answer["predictions"] == asked["predictions"]
        assert not answer["stale"]
    watch.lap("restore")
    watch.told("operator of redis")
