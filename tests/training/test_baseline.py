from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from tests.training.conftest import Command, killed, needs, tree

pytestmark = pytest.mark.torch
needs("torch")

from training import baseline, checkpoint, data, splits
from training.baselines import maml
from training.config import BaselineConfig, parse
from training.episodes import Pool, digest, frozen
from training.folders import DataError

TINY = {
    "maml": "steps=2,tasks=2,train_queries=2,width=4,shrink=stride",
    "reptile": "steps=2,tasks=2,train_shots=3,batch=4,width=4,test_steps=2",
    "mann": "steps=2,tasks=2,side=4,hidden=8,slots=4,width=4",
}


def config(shapes: Path, out: Path, **given: Any) -> BaselineConfig:
    defaults = {"method": "maml", "settings": TINY["maml"], "way": 2, "queries": 3, "episodes": 6, "size": 16}
    return BaselineConfig(**{"data": shapes, "out": out, **defaults, **given})


@pytest.mark.parametrize("method", list(TINY))
def test_a_row_says_what_was_measured_and_how(
    method: str, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_out = tmp_path / "made" / "rows.jsonl"
    asked = config(shapes, tmp_path / "run", method=method, settings=TINY[method], json_out=json_out, rotations=True)
    rows = baseline.main(asked)
    assert [json.loads(line) for line in json_out.read_text().splitlines()] == rows
    assert {row["mode"] for row in rows} == ({"inductive"} if method == "mann" else {"inductive", "transductive"})
    printed = capsys.readouterr().out
    images = baseline.images_of(asked, "test", baseline.ImageDecoder(16, 16, 1))
    expected = frozen(Pool.of(images.labels), way=2, shot=1, queries=3, count=6, seed=7)
    for row in rows:
        assert (row["method"], row["data"], row["split"], row["labels"]) == (
            method, "shapes", "test", "training classes",
        )  # fmt: skip
        assert (row["way"], row["shot"], row["episodes"], row["queries"], row["seed"]) == (2, 1, 6, 3, 7)
        assert row["episode_list"] == digest(expected)
        assert 0 <= row["accuracy"] <= 100
        assert row["seconds"] > 0 < row["adapt_wall_s"]
        assert row["settings"]["steps"] == 2
        assert f"{row['accuracy']} ± {row['interval']}, 6 episodes" in printed


def test_the_command_in_a_row_makes_the_row(shapes: Path, tmp_path: Path) -> None:
    (row, *_) = baseline.main(config(shapes, tmp_path / "one", train_split="train,val", json_out=tmp_path / "rows"))
    words = row["command"].split()
    assert words[:4] == ["python", "-m", "training", "baseline"]
    words = [str(shapes) if word == "DATA/shapes" else word for word in words[4:-1]]
    (again, *_) = baseline.main(parse(BaselineConfig, [*words, str(tmp_path / "two")], prog="x"))
    for name in set(row) - {"seconds", "adapt_wall_s", "adapt_cpu_s"}:
        assert row[name] == again[name], name


def test_the_episodes_decide_the_accuracy(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a method that is always right, and one that always says the first class."""

    class Known:
        labels = "none"

        def __init__(self, settings: Any, given: Any):
            pass

        def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Any:
            return {
                "right": lambda questions: np.repeat(np.arange(way), len(questions) // way),
                "first": lambda questions: np.zeros(len(questions)),
            }

    monkeypatch.setattr(maml, "Maml", Known)
    monkeypatch.setattr(baseline, "META_TRAINED", ())
    rows = {row["mode"]: row for row in baseline.main(config(shapes, tmp_path))}
    assert (rows["right"]["accuracy"], rows["right"]["interval"]) == (100, 0)
    assert (rows["first"]["accuracy"], rows["first"]["interval"]) == (50, 0)


def test_a_longer_list_goes_on_where_a_shorter_one_ended(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = baseline.main(config(shapes, tmp_path / "whole"))
    baseline.main(config(shapes, tmp_path / "parts", episodes=2))
    adapt, count = maml.Maml.adapt, [0]

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return adapt(*arguments)

    monkeypatch.setattr(maml.Maml, "adapt", counted)
    parts = baseline.main(config(shapes, tmp_path / "parts"))
    assert count == [4]
    for one, two in zip(whole, parts, strict=True):
        assert (one["accuracy"], one["interval"], one["episode_list"]) == (
            two["accuracy"], two["interval"], two["episode_list"],
        )  # fmt: skip
    shorter = baseline.main(config(shapes, tmp_path / "parts", episodes=2))  # and nothing is taken from beyond the list
    assert {row["episodes"] for row in shorter} == {2}
    assert count == [4]


def test_a_run_stopped_by_the_clock_goes_on_to_the_same_end(shapes: Path, tmp_path: Path) -> None:
    whole = baseline.main(config(shapes, tmp_path / "whole", episodes=3))
    stops = 0
    while not (parts := baseline.main(config(shapes, tmp_path / "parts", episodes=3, minutes=1e-9))):
        stops += 1
    assert stops == 3  # after the first step, and after each of the first two episodes
    assert [row["accuracy"] for row in parts] == [row["accuracy"] for row in whole]
    one, two = (baseline.checkpoint.load(tmp_path / name / baseline.CHECKPOINT) for name in ("whole", "parts"))
    for name, value in one["method"]["network"].items():
        assert bool((two["method"]["network"][name] == value).all()), name


def test_going_on_with_other_settings_is_refused(shapes: Path, tmp_path: Path) -> None:
    baseline.main(config(shapes, tmp_path))
    for other in ({"seed": 1}, {"settings": "steps=3"}, {"way": 3}, {"train_split": "train,val"}):
        with pytest.raises(SystemExit, match="made with other settings"):
            baseline.main(config(shapes, tmp_path, **other))
    baseline.main(config(shapes, tmp_path, minutes=9, checkpoint_s=1))  # the clock is free


@pytest.mark.parametrize("text", ["magic=1", "steps=many", "steps"])
def test_settings_that_the_method_does_not_have_are_named(text: str) -> None:
    with pytest.raises(SystemExit, match=r"--settings: '.*' is none of steps \(int\), tasks \(int\)"):
        baseline.settings_of(maml.Settings, text)


def test_settings_are_of_their_type_and_the_rest_is_as_published() -> None:
    found = baseline.settings_of(maml.Settings, "steps=3,lr=1e-2,order=first")
    assert (found.steps, found.lr, found.order) == (3, 0.01, "first")
    assert found.inner_lr == maml.Settings().inner_lr == 0.4
    assert baseline.settings_of(maml.Settings, "") == maml.Settings()


def test_splits_are_joined_without_mixing_their_classes(shapes: Path, tmp_path: Path) -> None:
    asked = config(shapes, tmp_path)
    decoder = baseline.ImageDecoder(16, 16, 3)
    both = baseline.images_of(asked, "val,train", decoder)
    assert both.classes == (*data.load(shapes, "val", decoder).classes, *data.load(shapes, "train", decoder).classes)
    assert np.array_equal(np.bincount(both.labels), np.full(8, 12))
    assert np.array_equal(both.pixels[both.labels == 2], data.load(shapes, "train", decoder).pixels[:12])


@pytest.mark.slow
def test_a_run_killed_in_training_ends_like_the_unbroken_one(
    shapes: Path, tmp_path: Path, command: Callable[..., Command]
) -> None:
    settings = TINY["maml"].replace("steps=2", "steps=60")

    def asked(out: str) -> BaselineConfig:
        return config(shapes, tmp_path / out, settings=settings, checkpoint_s=0)

    path = tmp_path / "killed" / baseline.CHECKPOINT
    flags = asked("killed").model_dump(mode="json", exclude_defaults=True)
    for target in (1, 20):
        killed(
            {
                command("baseline", *[f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]): (
                    lambda target=target: tree(path).get("method", {}).get("step", 0) >= target
                )
            }
        )
    ended = baseline.main(asked("killed"))
    whole = baseline.main(asked("whole"))
    assert [row["accuracy"] for row in ended] == [row["accuracy"] for row in whole]
    one, two = (baseline.checkpoint.load(tmp_path / name / baseline.CHECKPOINT) for name in ("killed", "whole"))
    for name, value in one["method"]["network"].items():
        assert bool((two["method"]["network"][name] == value).all()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [("scratch", "steps=2"), ("finetune", "steps=2"), ("scale-shift", "steps=2"), ("head", ""), ("pixels", "")],
)
def test_all_that_start_from_an_artifact_stand_on_the_same_episodes(
    demo: Path, tmp_path: Path, method: str, settings: str
) -> None:
    """Of the artifact's own size, and the served head as `evaluate` measures it."""
    from training import evaluate
    from training.config import EvaluateConfig

    asked = config(demo / "shapes", tmp_path, method=method, settings=settings, artifact=demo / "artifact", shot=5)
    (row,) = baseline.main(asked)
    given = {"artifact": demo / "artifact", "data": demo / "shapes", "way": "2", "shot": "5", "queries": 3}
    measured = {one.method: one for one in evaluate.main(EvaluateConfig(**given, episodes=6))}
    assert {one.episode_list for one in measured.values()} == {row["episode_list"]}
    if method == "head":
        default = baseline.Artifact.load(demo / "artifact").manifest.default
        assert row["accuracy"] == measured[default].accuracy


def test_a_run_does_not_go_on_with_another_artifact_wherever_it_lies(demo: Path, tmp_path: Path) -> None:
    first = tmp_path / "artifact"
    shutil.copytree(demo / "artifact", first)
    asked = config(demo / "shapes", tmp_path, method="head", settings="", artifact=first, shot=5)
    (row,) = baseline.main(asked)
    moved = first.rename(tmp_path / "elsewhere")
    assert baseline.main(asked.model_copy(update={"artifact": moved})) == [{**row, "command": ANY}]
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "description": "another"}))
    with pytest.raises(SystemExit, match="made with other settings"):
        baseline.main(asked.model_copy(update={"artifact": moved}))


def test_too_few_classes_are_said_before_any_training(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--way: .* has only 2 classes in its split 'test'"):
        baseline.main(config(shapes, tmp_path / "run", way=3))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [checkpoint.LOCK]


def test_going_on_with_other_data_is_refused(shapes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shapes"
    shutil.copytree(shapes, copy)
    asked = config(copy, tmp_path / "run")
    baseline.main(asked)
    baseline.main(asked.model_copy(update={"data": shapes}))
    name = splits.split_classes(copy, [path.name for path in copy.iterdir()])["test"][0]
    next((copy / name).iterdir()).unlink()
    with pytest.raises(DataError, match="was trained on other data"):
        baseline.main(asked)


def test_a_second_run_into_one_folder_is_refused(shapes: Path, tmp_path: Path) -> None:
    with checkpoint.alone(tmp_path), pytest.raises(DataError, match="Another run is at work in"):
        baseline.main(BaselineConfig(method="pixels", data=shapes, out=tmp_path))
