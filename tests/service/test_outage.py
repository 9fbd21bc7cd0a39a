"""The service over a real Redis that is killed, stays away and comes back, while clients go on asking."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.fakes import picture
from tests.redis_server import RedisServer
from tests.service.test_main import started

pytestmark = [pytest.mark.redis, pytest.mark.slow]
QUESTION = picture("red", seed=99)
RAW = {"Content-Type": "image/png"}


def support(seed: int) -> list[tuple[str, bytes]]:
    return [(label, picture(label, seed=100 * seed + k)) for label in ("red", "blue") for k in range(2)]


class Asker(threading.Thread):
    """Classifies with a warm task until told to stop; counts statuses and keeps the slowest answer."""

    def __init__(self, address: str):
        super().__init__()
        self.address = address
        self.stop = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.stale = 0
        self.times: list[float] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.address, timeout=10) as http:
            while not self.stop.is_set():
                start = time.perf_counter()
                answer = http.post("/v1/tasks/warm/classify", content=QUESTION, headers=RAW)
                self.times.append(time.perf_counter() - start)
                self.statuses[answer.status_code] += 1
                self.stale += answer.json().get("stale", False)


class Teacher(threading.Thread):
    """Teaches task after task; remembers what was acknowledged and how the rest was refused."""

    def __init__(self, address: str):
        super().__init__()
        self.address = address
        self.stop = threading.Event()
        self.acknowledged: dict[str, str] = {}
        self.refused: Counter[str] = Counter()

    def run(self) -> None:
        number = 0
        with httpx.Client(base_url=self.address, timeout=10) as http:
            while not self.stop.is_set():
                number += 1
                answer = http.put(f"/v1/tasks/n{number}", files=support(number))
                if answer.status_code == 201:
                    self.acknowledged[f"n{number}"] = answer.json()["head"]
                else:
                    assert answer.headers.get("retry-after"), answer.text
                    self.refused[f"{answer.status_code} {answer.json()['code']}"] += 1


def test_a_redis_that_dies_under_load_costs_no_acknowledged_task_and_no_known_answer(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "data").mkdir()
    with (
        RedisServer(tmp_path / "redis") as redis,
        started(tmp_path / "data", REDIS_URL=redis.url) as (_, address, _said),
        httpx.Client(base_url=address, timeout=10) as http,
    ):
        assert http.put("/v1/tasks/warm", files=support(0)).status_code == 201
        asker, teacher = Asker(address), Teacher(address)
        asker.start()
        teacher.start()
        for _ in range(3):
            time.sleep(1)
            redis.kill()
            time.sleep(1.5)
            assert http.get("/readyz").json() == {"status": "degraded", "lane": True, "store": False}
            redis.start()
        # An end to the outage is seen without a restart of ours.
        give_up = time.monotonic() + 5
        while http.get("/readyz").json()["status"] != "ok":
            assert time.monotonic() < give_up
            time.sleep(0.05)
        time.sleep(1)
        for thread in (asker, teacher):
            thread.stop.set()
            thread.join(15)
        lost = [
            task
            for task, head in teacher.acknowledged.items()
            if http.get(f"/v1/tasks/{task}").json().get("head") != head
        ]
    times = sorted(asker.times)
    figures = {
        "fault": "redis kill -9 and restart under load",
        "n": 3,
        "acknowledged": len(teacher.acknowledged),
        "lost": len(lost),
        "refused": dict(teacher.refused),
        "classified": dict(asker.statuses),
        "stale": asker.stale,
        "classify_p50_ms": round(1e3 * times[len(times) // 2], 1),
        "classify_max_ms": round(1e3 * times[-1], 1),
    }
    print(json.dumps(figures))
    assert not lost
    assert len(teacher.acknowledged) > 10
    assert set(asker.statuses) == {200}
    assert asker.stale > 0
    assert teacher.refused.keys() == {"503 store_unavailable"}
