from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from models.learners.prototype import Prototype
from models.learners.ridge import Ridge
from tests.fakes import MeanColour, tiny_artifact
from training import data, evaluate, semi
from training.config import EvaluateConfig
from training.episodes import Pool, frozen
from training.folders import DataError

CLASSES, IMAGES = 12, 40
PROTOTYPE = Prototype(np.float32(2.0))


def clouds(noise: float = 0.35) -> tuple[np.ndarray, Pool]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), IMAGES)
    centres = rng.standard_normal((CLASSES, 16))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    features = centres[labels] + noise * rng.standard_normal((len(labels), 16))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), Pool.of(labels)


def config(**given: object) -> EvaluateConfig:
    defaults = {"artifact": Path("a"), "data": Path("d"), "way": "4", "shot": "1", "queries": 10, "episodes": 60}
    return EvaluateConfig(**{**defaults, "unlabelled": 15, "distractors": 4, **given})


@pytest.mark.parametrize("only", [False, True])
def test_an_episode_falls_into_examples_questions_and_unlabelled_images(only: bool) -> None:
    _, pool = clouds()
    (episode,) = frozen(pool, way=6, shot=2, queries=25, count=1, seed=0)
    own, extra = semi.split(episode, 4, 10, np.arange(CLASSES * IMAGES), only_distractors=only)
    classes = episode.support[::2] // IMAGES
    assert own.way == 4
    assert np.array_equal(own.support // IMAGES, np.repeat(classes[:4], 2))
    assert np.array_equal(own.query // IMAGES, classes[own.answers])
    assert np.bincount(own.answers).tolist() == [10] * 4
    shown = {int(number): 15 for number in (classes[4:] if only else classes)}
    assert dict(zip(*np.unique(extra // IMAGES, return_counts=True), strict=True)) == shown
    assert len({*own.support, *own.query, *extra}) == len(own.support) + len(own.query) + len(extra)


def test_where_a_share_is_labelled_examples_and_questions_come_from_it_and_the_unlabelled_from_the_rest() -> None:
    labels = np.repeat(np.arange(CLASSES), IMAGES)
    labelled = np.zeros(len(labels), bool)
    labelled[[IMAGES * label + row for label in range(CLASSES) for row in data.dealt(IMAGES, 0.4, label)]] = True
    pool, rest = (Pool.of(np.where(mine, labels, -1)) for mine in (labelled, ~labelled))
    given = config(episodes=5, labelled=0.4)
    episodes = semi.drawn(pool, rest, 6, 2, given)
    assert [e.query.tolist() for e in semi.drawn(pool, rest, 6, 2, given)] == [e.query.tolist() for e in episodes]
    for episode in episodes:
        own, extra = semi.split(episode, 4, 10, np.arange(CLASSES * IMAGES))
        assert labelled[own.support].all()
        assert labelled[own.query].all()
        assert np.bincount(own.answers).tolist() == [10] * 4
        assert not labelled[extra].any()
        classes = episode.support[::2] // IMAGES
        assert np.array_equal(extra // IMAGES, np.repeat(classes, 15))
        assert len(set(extra)) == len(extra)


def test_what_is_asked_about_is_not_shown_again_among_the_unlabelled() -> None:
    """Another frame of the very thing would be no example of what else there is."""
    labels = np.repeat(np.arange(CLASSES), IMAGES)
    things = np.arange(len(labels)) // 5
    pool = Pool.of(labels, things)
    shown = semi._things(len(labels), pool.classes)
    met = 0
    for episode in frozen(pool, way=6, shot=2, queries=25, count=20, seed=0):
        own, extra = semi.split(episode, 4, 10, shown)
        assert not set(things[extra]) & set(things[own.query])
        met += len(extra)
    assert met > 20 * 40


def test_more_questions_than_are_labelled_are_refused() -> None:
    """Unlabelled images would be asked about in their place."""
    labels = np.repeat(np.arange(CLASSES), IMAGES)
    labelled = np.arange(len(labels)) % 10 == 0
    pool, rest = (Pool.of(np.where(mine, labels, -1)) for mine in (labelled, ~labelled))
    with pytest.raises(DataError, match="leaves 3 images of a class to ask about: --queries 10"):
        semi.drawn(pool, rest, 6, 1, config(labelled=0.1))


def test_unlabelled_images_help_and_foreign_ones_alone_do_not_harm() -> None:
    features, pool = clouds()
    (row,) = semi.measure({"prototype": PROTOTYPE}, features, pool, config())
    assert row.gain - row.gain_interval > 3
    assert row.accuracy == pytest.approx(row.supervised + row.gain, abs=0.011)
    assert row.worst_tenth <= row.tenth <= row.gain
    (strange,) = semi.measure({"prototype": PROTOTYPE}, features, pool, config(only_distractors=True))
    assert strange.supervised == row.supervised
    assert strange.gain > -1


def test_without_the_doubt_foreign_ones_would_do_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    features, pool = clouds()
    monkeypatch.setattr("models.learners.prototype.trust", lambda examples, unlabelled: 1.0)
    (row,) = semi.measure({"prototype": PROTOTYPE}, features, pool, config(only_distractors=True))
    assert row.gain < -2


def test_a_row_for_whoever_is_moved_by_them() -> None:
    features, pool = clouds()
    learners = {"prototype": PROTOTYPE, "ridge": Ridge(np.float32(2.0), np.float32(0.0))}
    rows = semi.measure(learners, features, pool, config(way="3,5", shot="1,2", episodes=5, distractors=99))
    assert [(row.method, row.way, row.shot) for row in rows] == [
        ("prototype", way, shot) for way in (3, 5) for shot in (1, 2)
    ]
    assert [row.distractors for row in rows] == [9, 9, 7, 7]  # as many as there are


def test_the_worst_tenth_is_that_of_the_gains() -> None:
    without, with_them = np.full(20, 0.5), np.linspace(0.31, 0.69, 20)
    row = semi._row(config(), "prototype", 4, 1, 4, without, with_them, "x")
    assert row.worst_tenth == pytest.approx(100 * (0.31 + 0.33) / 2 - 50)
    assert row.tenth == pytest.approx(100 * np.quantile(with_them, 0.1) - 50, abs=0.01)
    assert row.gain == pytest.approx(0, abs=0.01)


def test_the_command_prints_and_writes_them(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, out = tiny_artifact(tmp_path / "artifact"), tmp_path / "rows.jsonl"
    monkeypatch.setattr(evaluate.Artifact, "load", lambda path: artifact)
    monkeypatch.setattr(evaluate, "load_extractor", lambda artifact, *, precision: MeanColour())
    asked = config(data=shapes, split="train", way="3", queries=3, unlabelled=4, distractors=2, json_out=out)
    evaluate.main(asked)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("experiment") == "semi-supervised"]
    row = semi.SemiRow(**{name: line[name] for name in asdict(semi._row(asked, "", 2, 1, 0, *np.ones((2, 2)), ""))})
    assert semi.table([row]) in printed
    assert (row.method, row.unlabelled, row.distractors) == ("prototype", 4, 2)
    assert line["command"].startswith("python -m training evaluate --artifact a --data DATA/shapes")
    assert "--unlabelled 4 --distractors 2" in line["command"]
