"""deploy/smoke.py tells a service that is well from one that is not: with keys or without, of pictures or of texts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import smoke
from models.artifact import Artifact
from models.extractor import Extractor
from service import keys
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.deploy import ROOT
from tests.fakes import Letters, MeanColour, tiny_artifact, tiny_text_artifact
from tests.service.live import served

pytestmark = pytest.mark.slow


def smoked(
    artifact: Artifact, extractor: Extractor, *steps: tuple[str, ...], key: str = "", keys_file: Path | None = None
) -> list[str]:
    """What the script says with each of these arguments, one after the other."""
    app = create_app(Settings(keys_file=keys_file), artifact=artifact, extractor=extractor, store=MemoryStore())
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
    with served(app) as http:
        command = [sys.executable, str(ROOT / "deploy" / "smoke.py"), str(http.base_url), "--wait", "10"]
        return [
            subprocess.run(
                [*command, *step], env={**clean, "FEWSHOT_KEY": key}, text=True, capture_output=True, timeout=60
            ).stdout
            for step in steps
        ]


def test_with_keys_it_presents_the_one_that_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, token = keys.create(file, tenant="acme", scopes=("adapt",))
    kept, checked, whole = smoked(
        *(tiny_artifact(tmp_path), MeanColour(), ("--keep", "watchdog"), ("--check", "watchdog"), ()),
        key=token,
        keys_file=file,
    )
    assert "8 of 8 right" in kept
    assert "8 of 8 right" in checked
    assert "forget" in whole
    assert "FAILED" not in kept + checked + whole
    (without,) = smoked(tiny_artifact(tmp_path), MeanColour(), (), keys_file=file)
    assert "status 401" in without


def test_where_the_artifact_reads_texts_it_sends_texts(tmp_path: Path) -> None:
    kept, checked = smoked(tiny_text_artifact(tmp_path), Letters(), ("--keep", "watchdog"), ("--check", "watchdog"))
    assert "2 classes of 5" in kept
    assert "8 of 8 right" in checked


def test_its_texts_are_others_for_each_seed() -> None:
    assert len({smoke.text(kind, seed) for kind in smoke.TEXTS for seed in [*range(5), *range(1000, 1004)]}) == 18


class Told(smoke.Service):
    """Answers what it is given, one after the other."""

    def __init__(self, *answers: tuple[int, Any]):
        super().__init__("http://nowhere")
        self.answers = list(answers)

    def call(self, method: str, path: str, files: list[tuple[str, bytes]] | None = None) -> tuple[int, Any]:
        return self.answers.pop(0)


def test_a_wrong_answer_one_from_memory_and_a_task_that_stays_are_failures() -> None:
    rows = [{"label": label} for label in smoke.COLOURS for _ in range(smoke.QUERIES)]
    right = {"predictions": rows, "stale": False, "version": 3}
    assert smoke.classify(Told((200, right)), "t") == "8 of 8 right, version 3"
    with pytest.raises(smoke.Failed, match="from memory"):
        smoke.classify(Told((200, {**right, "stale": True})), "t")
    with pytest.raises(smoke.Failed, match="blue instead of red"):
        smoke.classify(Told((200, {**right, "predictions": rows[::-1]})), "t")
    assert smoke.forget(Told((204, None), (404, {})), "t") == "t"
    with pytest.raises(smoke.Failed, match="GET /v1/tasks/t: status 200"):
        smoke.forget(Told((204, None), (200, {})), "t")
