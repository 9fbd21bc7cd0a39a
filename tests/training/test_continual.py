from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import MeanColour, tiny_artifact
from tests.models.learners.given import DIM, METHODS, learner, unit
from training import continual
from training.config import ContinualConfig
from training.episodes import Pool, frozen

CLASSES, IMAGES = 24, 10


def clouds(noise: float = 0.12) -> tuple[np.ndarray, Pool]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), IMAGES)
    features = unit(unit(rng.standard_normal((CLASSES, DIM)))[labels] + noise * rng.standard_normal((len(labels), DIM)))
    return features.astype(np.float32), Pool.of(labels)


def config(**given: object) -> ContinualConfig:
    defaults = {"artifact": Path("a"), "data": Path("d"), "classes": 20, "removed": 10, "every": 5, "shot": 3}
    return ContinualConfig(**{**defaults, "queries": 5, "orders": 2, **given})


def test_classes_come_and_go_one_at_a_time_in_another_order_each_time() -> None:
    courses = [list(continual.course(config(), order)) for order in range(2)]
    for steps in courses:
        assert [len(came) for _, came in steps] == [*range(1, 21), *range(19, 9, -1)]
        assert [phase for phase, _ in steps] == ["adding"] * 20 + ["removing"] * 10
        assert sorted(steps[19][1]) == list(range(20))
        for (_, before), (_, after) in itertools.pairwise(steps[19:]):
            assert [number for number in before if number in after] == after  # the others keep their places
    assert courses[0][19] != courses[1][19]
    assert courses[0] == list(continual.course(config(), 0))


@pytest.mark.parametrize("method", METHODS)
def test_one_at_a_time_knows_what_all_at_once_knows(method: str) -> None:
    features, pool = clouds()
    rows = continual.measure({method: learner(method)}, features, pool, config())
    own = [row for row in rows if row.method == method]
    assert [(row.phase, row.way) for row in own] == [
        ("adding", 5), ("adding", 10), ("adding", 15), ("adding", 20), ("removing", 15), ("removing", 10),
    ]  # fmt: skip
    for row in own:
        assert row.accuracy > 80
        assert row.forgotten == row.changed == 0
        assert row.difference <= 1e-9
        assert row.episodes == 2 * 5 * row.way


def test_a_head_that_is_fine_tuned_on_the_newest_class_forgets_the_first() -> None:
    features, pool = clouds()
    rows = continual.measure({"prototype": learner("prototype")}, features, pool, config(lr=0.5, steps=20))
    tuned = {(row.phase, row.way): row for row in rows if row.method == continual.FINE_TUNED}
    ours = {(row.phase, row.way): row for row in rows if row.method == "prototype"}
    assert tuned["adding", 20].early < ours["adding", 20].early - 30
    assert tuned["adding", 20].accuracy < ours["adding", 20].accuracy - 10
    assert np.isnan(tuned["adding", 20].batch)


def test_fine_tuning_teaches_the_newest_class() -> None:
    features, pool = clouds()
    (episode,) = frozen(pool, way=5, shot=3, queries=5, count=1, seed=0)
    weight = np.zeros((0, DIM), np.float32)
    for number in range(5):
        weight = continual.fine_tuned(weight, features, episode, number, config(lr=0.5, steps=50))
        given = continual.answers(continual.Affine(weight, np.zeros(number + 1)), range(number + 1), features, episode)
        assert (given == number)[episode.answers == number].mean() > 0.9
    assert weight.shape == (5, DIM)


def test_maps_are_compared_class_by_class() -> None:
    one = continual.Affine(np.arange(6.0).reshape(3, 2), np.arange(3.0))
    other = continual.Affine(one.weight[[2, 0, 1]], one.bias[[2, 0, 1]])
    assert continual.apart(one, other, [1, 2, 0]) == 0
    assert continual.apart(one, other, [0, 1, 2]) == 4


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    monkeypatch.setattr(continual.Artifact, "load", lambda path: artifact)
    monkeypatch.setattr(continual, "load_extractor", lambda artifact: MeanColour())


@pytest.mark.usefixtures("fake")
def test_the_command_prints_a_curve_and_writes_rows(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    given = {"data": shapes, "split": "train", "classes": 6, "removed": 2, "every": 2, "json_out": out}
    rows = continual.main(config(**given, learners="prototype"))
    printed = capsys.readouterr().out
    assert continual.table(rows) in printed
    assert "0.0000 points forgotten at most" in printed
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(rows) == 2 * 4
    assert {line["experiment"] for line in lines} == {"continual"}
    assert lines[0]["command"].startswith("python -m training continual --artifact a --data DATA/shapes --split train")
    assert [line["batch"] for line in lines if line["method"] == continual.FINE_TUNED] == [None] * 4


@pytest.mark.usefixtures("fake")
def test_what_cannot_be_done_is_said(shapes: Path) -> None:
    with pytest.raises(SystemExit, match=r"--classes: .* has 6 in 'train'"):
        continual.main(config(data=shapes, split="train"))
    with pytest.raises(SystemExit, match="two must be left"):
        continual.main(config(data=shapes, split="train", classes=6, removed=5, every=2))
    with pytest.raises(SystemExit, match=r"--learners: .* has prototype, ridge"):
        continual.main(config(data=shapes, split="train", classes=6, removed=2, learners="magic"))


def test_the_first_ten_stay_the_same_when_some_of_them_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others do not move up: here the first ten go before the rest."""
    features, pool = clouds()

    def course(asked: ContinualConfig, order: int) -> Iterator[tuple[str, list[int]]]:
        for count in range(1, 21):
            yield "adding", list(range(count))
        for gone in range(1, 16):
            yield "removing", list(range(gone, 20))

    monkeypatch.setattr(continual, "course", course)
    rows = continual.measure({"prototype": learner("prototype")}, features, pool, config(removed=15))
    early = {(row.phase, row.way): row.early for row in rows if row.method == "prototype"}
    assert early["removing", 15] > 80
    assert np.isnan([early["removing", 10], early["removing", 5]]).all()
    assert "– |" in continual.table(rows)
    (last,) = [row for row in rows if (row.method, row.way, row.phase) == ("prototype", 5, "removing")]
    assert continual.known(last)["early"] is None
