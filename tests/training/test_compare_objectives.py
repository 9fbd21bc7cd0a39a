from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import needs, noise

pytestmark = pytest.mark.torch
needs("torch")

from training import checkpoint, compare_objectives, pretrained, vision
from training.config import CompareObjectivesConfig, PretextConfig, PretrainConfig
from training.folders import DataError
from training.synthetic import write

ARMS = ["uniform", "learned", "uncertainty", "clusters", "rotation"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough classes for 5-way tasks of the test classes, enough images to hold some out."""
    return write(tmp_path_factory.mktemp("many"), classes=25, images=21, size=24)


def config(many: Path, out: Path, **given: Any) -> CompareObjectivesConfig:
    small = {"objectives": "clusters,rotation", "shape": "tiny", "size": 16, "batch": 16, "seconds": 0.01}
    fixed = {"device": "cpu", "precision": "float32", "episodes": 10, "seeds": 1}
    return CompareObjectivesConfig(
        **{"data": many, "out": out / "runs", "results": out / "rows.jsonl", **small, **fixed, **given}
    )


def test_all_together_in_three_ways_and_each_loss_alone() -> None:
    arms = compare_objectives.arms("a,b")
    assert [arm.name for arm in arms] == ["uniform", "learned", "uncertainty", "a", "b"]
    assert {arm.objectives for arm in arms[:3]} == {"a=1,b=1"}
    assert [arm.weighting for arm in arms] == ["fixed", "learned", "uncertainty", "fixed", "fixed"]


def test_every_arm_is_trained_measured_and_not_run_again(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(many, tmp_path)
    compare_objectives.main(asked)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["method"], row["shot"]) for row in rows] == [(arm, shot) for arm in ARMS for shot in (1, 5)]
    assert len({row["episode_list"] for row in rows}) == 2  # the same tasks for all
    for row in rows:
        assert row["experiment"] == "objectives"
        assert row["labels"] == "none"
        assert 0 <= row["accuracy"] <= 100
        assert row["interval"] > 0
        assert row["steps"] >= 2
        assert row["seconds"] >= 0
    assert {row["images"] for row in rows if row["method"] != "learned"} == {315}
    assert {row["images"] for row in rows if row["method"] == "learned"} == {315 - 32}
    assert rows[0]["command"].startswith(
        f"python -m training compare-objectives --data DATA/{many.name} --out {tmp_path}/runs"
    )
    extractor, settings = pretrained.load_extractor(tmp_path / "runs" / "learned-0")
    assert settings.weighting == "learned"
    assert extractor.centre.abs().max() > 0
    printed = capsys.readouterr().out
    assert all(f"\n| {arm} | " in printed for arm in ARMS)

    # One arm is missing, as after a kill: it alone is run.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(line for line in lines if '"uniform"' not in line))
    compare_objectives.main(asked)
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in again[8:]] == ["uniform", "uniform"]
    assert again[:8] == [row for row in rows if row["method"] != "uniform"]


def test_rows_go_beside_the_extractors_unless_another_file_is_asked_for(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        compare_objectives,
        "_run",
        lambda arm, *_: [{"method": arm.name, "shot": s, "seed": 0, "accuracy": 1.0, "steps": 2} for s in (1, 5)],
    )
    compare_objectives.main(config(many, tmp_path, results=None))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl")] == [Path("runs/objectives.jsonl")]


def test_a_second_run_into_one_folder_is_refused(many: Path, tmp_path: Path) -> None:
    given = config(many, tmp_path)
    with checkpoint.alone(given.out), pytest.raises(DataError, match="Another run is at work in"):
        compare_objectives.main(given)


def test_rows_of_another_device_or_precision_are_not_compared(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(compare_objectives, "_run", lambda arm, *_: asked.append(arm.name) or [])
    given = config(many, tmp_path, precision="auto")
    lines = [
        {**compare_objectives._settings(given), "method": arm, "shot": shot, "seed": 0, "accuracy": 50.0, "steps": 2}
        for arm in ARMS
        for shot in (1, 5)
    ]
    assert {(line["device"], line["precision"]) for line in lines} == {("cpu", "float32")}
    given.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare_objectives.main(given)
    assert asked == []
    for name, value in (("precision", "bfloat16"), ("device", "cuda")):
        asked.clear()
        given.results.write_text("".join(json.dumps({**line, name: value}) + "\n" for line in lines))
        compare_objectives.main(given)
        assert asked == ARMS


def test_the_time_is_kept_and_the_rate_has_fallen_when_it_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run = vision.Run(
        PretrainConfig(data=Path("d"), out=Path("o"), shape="tiny", size=16, batch=8, precision="float32"), noise(3, 20)
    )
    clock, rates = 0.0, []
    advance = run.advance

    def second() -> dict[str, float]:
        nonlocal clock
        clock += 1.0
        found = advance()
        rates.append(run.optimizer.param_groups[0]["lr"])
        return found

    monkeypatch.setattr(run, "advance", second)
    monkeypatch.setattr(compare_objectives.time, "monotonic", lambda: clock)
    assert compare_objectives.train(run, 20.0, clock="wall") == 20
    assert run.step == run.steps == 20
    assert rates[-1] < 0.05 * max(rates)


def test_the_table_has_the_mean_over_seeds() -> None:
    rows = [
        {"method": "a", "shot": shot, "accuracy": value + shot, "steps": 10, "seed": seed}
        for seed, value in enumerate((10.0, 20.0))
        for shot in (1, 5)
    ]
    assert compare_objectives.table(rows).splitlines()[2] == "| a | 16.00 (sd 7.07) | 20.00 (sd 7.07) | 10 | 2 |"


def test_gains_are_paired_by_seed() -> None:
    rows = [
        {"method": name, "shot": 1, "seed": seed, "accuracy": value}
        for name, values in {"a": (10.0, 30.0), "learned": (12.0, 31.0, 90.0)}.items()
        for seed, value in enumerate(values)
    ]
    assert compare_objectives.gains(rows) == "learned - a, 5-way 1-shot: +1.50 (sd 0.71)"
    assert compare_objectives.gains(rows[:2]) == ""


def test_unknown_objectives_end_with_a_sentence(many: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Known objectives: contrastive"):
        compare_objectives.main(config(many, tmp_path, objectives="clusters,magic"))
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_augmentation_that_does_not_fit_is_said_before_any_training(many: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--augment characters fits"):
        compare_objectives.main(config(many, tmp_path, shape="tiny-grey"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_chosen_is_chosen_on_validation_classes() -> None:
    given = {"data": Path("d"), "extractors": "a=b"}
    assert CompareObjectivesConfig(data=Path("d"), out=Path("o")).split == PretextConfig(**given).split == "val"


def test_too_few_classes_are_said_before_any_training(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(compare_objectives, "_run")
    with pytest.raises(DataError, match="2 classes in its split 'val': 5 are asked at a time"):
        compare_objectives.main(config(shapes, tmp_path))
