from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch", "onnx", "onnxruntime", "onnxscript")

from models.artifact import Artifact
from training import synthetic, text_demo
from training.config import TextDemoConfig


def library(folder: Path, *, modules: int, lines: int = 400) -> Path:
    """Sources of some modules, each in a made-up language, and what is none of them."""
    rng = random.Random(0)
    for label in range(modules):
        words = synthetic.language(label)
        text = "\n".join(" ".join(rng.choices(words, k=8)) for _ in range(lines))
        path = folder / (f"module{label}.py" if label % 2 else f"module{label}/inner/part.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (folder / "module1.pyc").write_bytes(b"\0")
    for left_out in ("test/module1.py", "module0/tests/part.py", "site-packages/other.py"):
        (folder / left_out).parent.mkdir(parents=True, exist_ok=True)
        (folder / left_out).write_text("not this\n" * 2000)
    (folder / "short.py").write_text("too short\n")
    return folder


def test_the_corpus_is_passages_by_module_and_nothing_twice(tmp_path: Path) -> None:
    file = tmp_path / "corpus" / "modules.jsonl"
    assert text_demo.write(file, library(tmp_path / "lib", modules=4)) == 4
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    counts = {label: sum(row["label"] == label for row in rows) for label in {row["label"] for row in rows}}
    assert set(counts) == {f"module{label}" for label in range(4)}
    assert all(text_demo.FEWEST <= count <= text_demo.MOST for count in counts.values())
    assert not any("not this" in row["text"] for row in rows)
    assert all(text_demo.LENGTH // 2 <= len(row["text"].encode()) <= text_demo.LENGTH for row in rows)
    again = tmp_path / "again.jsonl"
    text_demo.write(again, tmp_path / "lib")
    assert again.read_bytes() == file.read_bytes()


def test_a_bag_counts_runs_and_not_what_is_behind_the_end() -> None:
    given = np.zeros((2, 6), np.uint8)
    given[0, :4] = list(b"abab")
    given[1, :3] = list(b"bab")
    single = text_demo.bag(given, 1)
    assert (single[0, ord("a")], single[0, ord("b")], single[0].sum()) == (0.5, 0.5, 1.0)
    runs = text_demo.bag(given, 3)
    assert sorted(runs[0][runs[0] > 0]) == [0.5, 0.5]  # aba and bab
    assert runs[0][runs[1] > 0] == [0.5]


def test_untrained_features_have_unit_length() -> None:
    given = np.random.default_rng(0).integers(1, 200, (9, 40), dtype=np.uint8)
    for run in (1, 3):
        assert np.linalg.norm(text_demo.untrained(given, given[:3], run), axis=1) == pytest.approx(np.ones(9))


def test_the_demo_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = library(tmp_path / "lib", modules=10)
    monkeypatch.setattr(text_demo.sysconfig, "get_paths", lambda: {"stdlib": str(sources)})
    out, rows_file = tmp_path / "demo", tmp_path / "rows.jsonl"
    rows = text_demo.main(TextDemoConfig(out=out, epochs=1, episodes=20, json_out=rows_file))
    assert Artifact.load(out / "artifact").kind == "text"
    assert [json.loads(line) for line in rows_file.read_text().splitlines()] == rows
    assert {(row["features"], row["method"], row["shot"]) for row in rows} == {
        (features, method, shot)
        for shot in (1, 5)
        for features, method in (
            ("trunk", "prototype"),
            ("trunk", "ridge"),
            ("trunk", "whitened"),
            ("bag of bytes", "prototype"),
            ("bag of three bytes", "prototype"),
        )
    }
    assert all(row["accuracy"] > 70 for row in rows if row["shot"] == 5)  # two languages of other syllables
    assert "| bag of bytes | prototype |" in capsys.readouterr().out
