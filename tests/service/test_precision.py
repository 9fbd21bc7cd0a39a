"""Which graph is served: measured accuracy decides whether int8 may be, measured speed whether it is."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models import extractor_onnx
from models.artifact import Artifact
from service import precision
from service.precision import KEPT, choose, int8_loss, seconds
from service.settings import PRETRAINED


@pytest.fixture(scope="module")
def characters() -> Artifact:
    return Artifact.load(PRETRAINED / "characters")


def losing(artifact: Artifact, **losses: float) -> Artifact:
    return replace(artifact, manifest=replace(artifact.manifest, int8=losses or None))


class Stopwatch:
    """Says how long each precision takes, and counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **times: float):
        self.asked = 0
        self.times = times
        monkeypatch.setattr(precision, "seconds", self)

    def __call__(self, artifact: Artifact) -> dict[str, float]:
        self.asked += 1
        return self.times


@pytest.mark.parametrize(
    ("int8", "chosen"),
    [(0.001, "int8"), (0.0083, "int8"), (0.0084, "float32"), (0.03, "float32")],
)
def test_int8_is_served_where_it_is_clearly_faster(
    characters: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, int8: float, chosen: str
) -> None:
    Stopwatch(monkeypatch, float32=0.01, int8=int8)
    assert choose(losing(characters, loss_5w1s=0.1), tmp_path) == chosen


def test_int8_may_lose_half_a_point(characters: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Stopwatch(monkeypatch, float32=0.01, int8=0.001)
    assert choose(losing(characters, loss_5w1s=0.5), tmp_path) == "int8"


@pytest.mark.parametrize("losses", [{}, {"loss_5w1s": 0.1, "loss_5w5s": 0.51}])
def test_int8_that_loses_too_much_or_was_not_measured_is_not_even_timed(
    characters: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, losses: dict[str, float]
) -> None:
    watch = Stopwatch(monkeypatch, float32=0.01, int8=0.001)
    assert choose(losing(characters, **losses), tmp_path) == "float32"
    assert watch.asked == 0


def test_the_loss_is_the_largest_that_was_measured(characters: Artifact) -> None:
    assert int8_loss(losing(characters, loss_5w1s=-0.2, loss_5w5s=0.3, interval_5w1s=0.9)) == 0.3
    assert int8_loss(losing(characters)) is None


def test_the_choice_is_told_and_kept_for_the_next_start(
    characters: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "data"
    Stopwatch(monkeypatch, float32=0.004, int8=0.001)
    assert choose(characters, folder) == "int8"
    assert "precision int8: an image takes 4.00 ms with float32 and 1.00 ms with int8 here" in caplog.text
    now_slow = Stopwatch(monkeypatch, float32=0.001, int8=0.004)
    assert choose(characters, folder) == "int8"
    assert now_slow.asked == 0


@pytest.mark.parametrize("damage", ["another computer", "no JSON", "no such precision", "a list"])
def test_what_was_kept_elsewhere_or_is_damaged_is_timed_again(
    characters: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    Stopwatch(monkeypatch, float32=0.004, int8=0.001)
    choose(characters, tmp_path)
    kept = json.loads((tmp_path / KEPT).read_text())
    text = {
        "another computer": json.dumps(kept | {"here": "elsewhere"}),
        "no JSON": "int8",
        "no such precision": json.dumps(kept | {"precision": "int4"}),
        "a list": "[]",
    }[damage]
    (tmp_path / KEPT).write_text(text)
    Stopwatch(monkeypatch, float32=0.001, int8=0.004)
    assert choose(characters, tmp_path) == "float32"


def test_a_folder_that_cannot_be_written_and_a_visit_leave_no_trace(
    characters: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Stopwatch(monkeypatch, float32=0.004, int8=0.001)
    file = tmp_path / "file"
    file.write_text("in the way")
    assert choose(characters, file / "data") == "int8"
    assert choose(characters, tmp_path / "visited", keep=False) == "int8"
    assert not (tmp_path / "visited").exists()


class Busy:
    """An extractor on a computer that does something else as well: most calls take far longer than they need."""

    def __init__(self, artifact: Artifact, *, precision: str):
        self.needs = {"float32": 0.012, "int8": 0.004}[precision]
        self.calls = 0

    def __call__(self, batch: np.ndarray) -> None:
        self.calls += 1
        time.sleep(self.needs if self.calls == 4 else 0.06)


@pytest.mark.slow
def test_a_busy_computer_chooses_as_one_at_rest(characters: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor_onnx, "OnnxExtractor", Busy)
    found = seconds(characters)
    assert 0.012 <= precision.BATCH * found["float32"] < 0.06
    assert 0.004 <= precision.BATCH * found["int8"] < 0.012


def test_both_graphs_of_the_artifact_can_be_timed(characters: Artifact) -> None:
    found = seconds(characters, rounds=1)
    assert found.keys() == {"float32", "int8"}
    assert all(0 < value < 1 for value in found.values())


def test_two_processes_that_start_at_once_choose_the_same(
    characters: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While the one times the precisions, the other has already kept what it found."""

    class Meanwhile(Stopwatch):
        def __call__(self, artifact: Artifact) -> dict[str, float]:
            Stopwatch(monkeypatch, float32=0.004, int8=0.001)
            assert choose(artifact, tmp_path) == "int8"
            return super().__call__(artifact)

    Meanwhile(monkeypatch, float32=0.001, int8=0.004)
    assert choose(characters, tmp_path) == "int8"
    assert [file.name for file in tmp_path.iterdir()] == [KEPT]
