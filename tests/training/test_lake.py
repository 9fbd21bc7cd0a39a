from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import pytest

from tests.fakes import MeanColour, picture, tiny_artifact
from training import lake
from training.config import LakeConfig
from training.data import load
from training.folders import DataError

COLOURS = ("red", "green", "blue", "yellow")
ALPHABETS = {"background": ["Greek", "Latin", "Tagalog"], "evaluation": ["ULOG", "Keble"]}


def omniglot(folder: Path, *, swapped: int = 0) -> Path:
    """Laid out like Omniglot, with two one-shot runs of four colours; in the second `swapped` answers are wrong."""
    folder.mkdir()
    with zipfile.ZipFile(folder / lake.RUNS, "w") as file:
        for run, wrong in (("run01", 0), ("run02", swapped)):
            pairs = []
            for k, colour in enumerate(COLOURS):
                file.writestr(f"{run}/training/class{k:02d}.png", picture(colour, seed=k))
                file.writestr(f"{run}/test/item{k:02d}.png", picture(colour, seed=k + 10))
                right = (k + 1) % len(COLOURS) if k < wrong else k
                pairs.append(f"{run}/test/item{k:02d}.png {run}/training/class{right:02d}.png")
            file.writestr(f"{run}/class_labels.txt", "\n".join(reversed(pairs)) + "\n")
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        for alphabets in ALPHABETS.values():
            for alphabet in alphabets:
                for character in (1, 2):
                    file.writestr(f"{alphabet}/character{character:02d}/1.png", picture("red"))
    names = {"train": ["Greek/character01", "ULOG/character01", "ULOG/character02"], "val": [], "test": []}
    (folder / "splits.json").write_text(json.dumps({**names, "lake_alphabets": ALPHABETS}))
    return folder


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    training = {"data": "letters", "split": "train", "labels_used": False, "seed": 3}
    artifact = dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, training=training))
    monkeypatch.setattr(lake.Artifact, "load", lambda path: artifact)
    monkeypatch.setattr(lake, "load_extractor", lambda artifact: MeanColour())


def test_the_error_is_over_all_questions_and_what_was_seen_is_said(
    tmp_path: Path, fake: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lake.jsonl"
    asked = LakeConfig(artifact=Path("a"), data=omniglot(tmp_path / "letters", swapped=2), json_out=out)
    lines = lake.main(asked)
    assert [json.loads(text) for text in out.read_text().splitlines()] == lines
    assert [line["method"] for line in lines] == ["prototype", "ridge"]
    for line in lines:
        assert line["error"] == 25.0  # two of eight
        assert line["interval"] == pytest.approx(1271 * (0.5**2 / 2) ** 0.5 / 2**0.5)  # runs of 100 and 50 per cent
        assert (line["way"], line["episodes"], line["questions"]) == (4, 2, 8)
        assert (line["seen_characters"], line["seen_alphabets"], line["labels"]) == (2, 1, "none")
    printed = capsys.readouterr().out
    assert "| ridge | 25.00 ± 317.75 |" in printed
    assert "2 characters of 1 of the alphabets" in printed


@pytest.mark.parametrize(("split", "count"), [("background30", 6), ("background5", 4), ("evaluation20", 4)])
def test_alphabets_are_splits(tmp_path: Path, split: str, count: int) -> None:
    folder = omniglot(tmp_path / "letters")
    found = load(folder, split, tiny_artifact(tmp_path / "artifact").decoder())
    assert len(found.classes) == count
    assert all((name.split("/")[0] in ALPHABETS["evaluation"]) == (split == "evaluation20") for name in found.classes)
    assert split != "background5" or "Tagalog/character01" not in found.classes


def test_a_split_by_alphabet_needs_alphabets(tmp_path: Path, shapes: Path) -> None:
    with pytest.raises(DataError, match="'background5' needs lake_alphabets"):
        load(shapes, "background5", tiny_artifact(tmp_path / "artifact").decoder())


@pytest.mark.parametrize(("labels", "said"), [(None, "has no runs"), ("nothing of use", "no line with a question")])
def test_an_archive_without_runs_is_named(tmp_path: Path, labels: str | None, said: str) -> None:
    decoder = tiny_artifact(tmp_path / "artifact").decoder()
    with pytest.raises(DataError, match="does not exist"):
        lake.runs(tmp_path / "none.zip", decoder)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        file.writestr("readme.txt" if labels is None else "run01/class_labels.txt", labels or "")
    (tmp_path / "some.zip").write_bytes(written.getvalue())
    with pytest.raises(DataError, match=said):
        lake.runs(tmp_path / "some.zip", decoder)
