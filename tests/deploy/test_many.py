"""Tasks that deploy/filled.py writes are those that the service would write; a small run of deploy/many.py itself."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from deploy import filled, many
from models.artifact import Artifact
from service.stores.sqlite import SqliteStore
from service.support import learn, record_id
from tests.deploy import ROOT
from tests.redis_server import program

CHARACTERS = ROOT / "models" / "pretrained" / "characters"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filled, "TEMPLATES", 3)


def test_what_is_written_is_what_the_service_would_write(tmp_path: Path) -> None:
    artifact = Artifact.load(CHARACTERS)
    manifest = artifact.manifest
    method = manifest.default
    learner = artifact.learners()[method]

    async def work() -> None:
        store = SqliteStore(tmp_path)
        await store.open()
        written = filled.Filled(store, filled.templates(artifact, way=5, shots=2), tasks=10)
        await written.fill(10)
        scope = store.scope(filled.TENANT)
        listed = await scope.tasks(limit=100)
        assert [name for name, _ in listed] == [filled.name_of(number) for number in range(10)]
        assert len({pointer.head for _, pointer in listed}) == 10
        for name, pointer in listed:
            found = await scope.record(name)
            assert found is not None
            record = found[1]
            assert pointer.head == record_id(record)
            assert (record.features.shape, len(set(record.ids))) == ((10, manifest.dim), 10)
            made = learn(record, learner, manifest.methods[method], manifest.rejections.get(method), device="cpu").head
            kept = await scope.head(pointer.head)
            assert kept is not None
            assert kept.to_bytes() == made.to_bytes()
        await store.close()

    asyncio.run(work())


def test_each_case_asks_about_its_tasks() -> None:
    drawn = {case: Counter(task for _, task in itertools.islice(many.draws(case, 5000), 30_000)) for case in many.CASES}
    assert set(drawn["one task"]) == {0}
    assert set(drawn["64 tasks"]) == set(range(64))
    assert len(drawn["all, evenly"]) > 4900
    (_, first), (_, second) = drawn["all, by Zipf"].most_common(2)
    assert 0.12 < first / 30_000 < 0.2  # 1 / sum of 1 / k ** 1.1 up to 5000
    assert 1.8 < first / second < 2.6  # 2 ** 1.1
    assert max(drawn["all, by Zipf"]) > 2500


def test_cases_are_mixed_in_equal_parts_until_one_has_no_more() -> None:
    mixed = list(many.mixed([many.draws("one task", 9), iter([("gone", 7), ("gone", 8)])]))
    assert Counter(mixed) == {("one task", 0): 2, ("gone", 7): 1, ("gone", 8): 1}


@pytest.mark.slow
@pytest.mark.parametrize("store", [pytest.param("redis", marks=pytest.mark.redis), "sqlite"])
def test_a_small_run_measures_every_case(store: str, tmp_path: Path) -> None:
    if store == "redis":
        program()
    options = ["--tasks", "600", "--seconds", "1", "--rounds", "1", "--stores", store, "--folder", str(tmp_path)]
    command = [sys.executable, str(ROOT / "deploy" / "many.py"), *options, "--artifact", str(CHARACTERS)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["results"][0]
    alone = {row["case"] for row in result["rows"] if row["connections"] == 1}
    together = {row["case"] for row in result["rows"] if row["connections"] == 64}
    assert alone == {*many.CASES, many.WIPED}
    assert together == {*many.CASES, many.FIRST, many.AGAIN}
    assert result["bytes"]["memory" if store == "redis" else "disk"] > 0.8 * sum(result["parts"].values())
    assert result["parts"]["record"] > 2 * 25 * 128 > result["parts"]["head"]
    assert not list(tmp_path.iterdir())
