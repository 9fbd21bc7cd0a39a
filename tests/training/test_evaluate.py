from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.errors import ArtifactInvalid
from models.head import Affine
from models.learners import LEARNERS
from models.learners.prototype import Prototype
from models.learners.ridge import Ridge
from tests.fakes import MeanColour, tiny_artifact
from tests.training.conftest import noise
from training import data, evaluate, paired, splits
from training.config import EvaluateConfig
from training.episodes import Pool, digest, frozen
from training.folders import DataError
from training.intervals import interval

PROTOTYPE = Prototype(np.float32(2.0))
RIDGE = Ridge(np.float32(2.0), np.float32(0.0))
CLASSES, IMAGES = 10, 20


def labels() -> np.ndarray:
    return np.repeat(np.arange(CLASSES), IMAGES)


def random_features(dim: int = 16) -> np.ndarray:
    features = np.random.default_rng(0).normal(size=(CLASSES * IMAGES, dim))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def config(**given: object) -> EvaluateConfig:
    return EvaluateConfig(**{"artifact": Path("a"), "data": Path("d"), "episodes": 50, **given})


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.array([0.2, 0.4, 0.9, 0.5])
    mean = sum(values) / 4
    deviation = (sum((value - mean) ** 2 for value in values) / 3) ** 0.5
    assert interval(values) == pytest.approx(3.18 * deviation / 2)


def test_the_interval_holds_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    draws = rng.random((2000, 100))
    held = [abs(values.mean() - 0.5) <= interval(values) for values in draws]
    assert 0.93 < np.mean(held) < 0.97


def test_accuracy_counts_the_questions_whose_own_class_is_highest() -> None:
    (episode,) = frozen(Pool.of(labels()), way=4, shot=1, queries=5, count=1, seed=0)
    features = np.eye(CLASSES, dtype=np.float32)[labels()]
    classes = labels()[episode.support]
    right = Affine(np.eye(CLASSES, dtype=np.float32)[classes], np.zeros(4, np.float32))
    assert evaluate.accuracy(right, features, episode) == 1
    swapped = Affine(right.weight[[1, 0, 2, 3]], right.bias)
    assert evaluate.accuracy(swapped, features, episode) == 0.5
    always_last = Affine(right.weight, np.array([0, 0, 0, 9], np.float32))
    assert evaluate.accuracy(always_last, features, episode) == 0.25
    few = dataclasses.replace(episode, query=episode.query[:-4], answers=episode.answers[:-4])  # one of the last class
    assert evaluate.accuracy(always_last, features, few) == 0.25


@pytest.mark.parametrize("learner", [PROTOTYPE, RIDGE], ids=["prototype", "ridge"])
def test_features_that_name_their_class_are_always_right(learner: Prototype | Ridge) -> None:
    features = np.eye(CLASSES, dtype=np.float32)[labels()]
    values = evaluate.run(learner, features, frozen(Pool.of(labels()), way=5, shot=1, queries=3, count=20, seed=0))
    assert values.tolist() == [1.0] * 20
    assert interval(values) == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", [2, 5])
def test_features_that_know_nothing_are_right_by_chance(way: int) -> None:
    episodes = frozen(Pool.of(labels()), way=way, shot=3, queries=5, count=800, seed=0)
    values = evaluate.run(PROTOTYPE, random_features(), episodes)
    assert interval(values) < 0.03
    assert abs(values.mean() - 1 / way) < 2 * interval(values)


def test_questions_are_answered_alone() -> None:
    """The accuracy is that of one question at a time: nothing is learned from the others."""
    features = random_features()
    (episode,) = frozen(Pool.of(labels()), way=5, shot=2, queries=6, count=1, seed=0)
    affine = PROTOTYPE.adapt(evaluate.support_of(features, episode))
    single = [
        (features[row] @ affine.weight.T + affine.bias).argmax() == answer
        for row, answer in zip(episode.query, episode.answers, strict=True)
    ]
    assert evaluate.run(PROTOTYPE, features, [episode])[0] == pytest.approx(np.mean(single))


def test_turned_images_are_four_times_as_many_classes() -> None:
    images = noise(3, 2, size=8)
    images = data.Images(images.pixels, images.labels, images.classes, np.array([0, -1, 1, 1, -1, -1]))
    turned = evaluate.turned(images)
    assert len(turned) == 4 * 6
    assert turned.classes[:5] == ("class0@0", "class0@90", "class0@180", "class0@270", "class1@0")
    assert np.bincount(turned.labels).tolist() == [2] * 12
    for index in range(24):
        label, turn = divmod(int(turned.labels[index]), 4)
        source = index % 6
        assert label == images.labels[source]
        assert np.array_equal(turned.pixels[index], np.rot90(images.pixels[source], turn))
        assert turned.groups[index] == images.groups[source]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_features_keep_the_order_of_the_images(batch: int) -> None:
    pixels = noise(5, 4).pixels
    extractor = MeanColour()
    found = evaluate.embed(extractor, pixels, batch=batch)
    assert np.array_equal(found, MeanColour()(pixels))
    assert sum(extractor.batches) == 20
    assert max(extractor.batches) <= batch


def test_a_row_for_every_learner_way_and_shot_on_the_same_episodes() -> None:
    features, pool = random_features(), Pool.of(labels())
    asked = config(way="2,5", shot="1,3", queries=4, data=Path("x/flowers"), split="val", seed=9)
    rows, single = evaluate.measure({"prototype": PROTOTYPE, "ridge": RIDGE}, features, pool, asked)
    assert [(row.way, row.shot, row.method) for row in rows] == [
        (way, shot, method) for way in (2, 5) for shot in (1, 3) for method in ("prototype", "ridge")
    ]
    for row in rows:
        values = single[row.method, row.way, row.shot]
        assert len(values) == row.episodes == 50
        assert row.accuracy == pytest.approx(100 * values.mean(), abs=0.005)
        assert row.interval == pytest.approx(100 * interval(values), abs=0.005)
        episodes = frozen(pool, way=row.way, shot=row.shot, queries=4, count=50, seed=9)
        assert row.episode_list == digest(episodes)
        learner = {"prototype": PROTOTYPE, "ridge": RIDGE}[row.method]
        assert np.array_equal(values, evaluate.run(learner, features, episodes))
        assert (row.data, row.split, row.queries, row.seed, row.precision) == ("flowers", "val", 4, 9, "float32")


def a_row(method: str, way: int, shot: int, accuracy: float) -> evaluate.Row:
    return evaluate.Row("d", "test", method, way, shot, accuracy, 0.5, 600, 15, 7, "abc", "float32")


def test_the_table_has_learners_down_and_tasks_across() -> None:
    rows = [a_row(method, 5, shot, 10 * shot + k) for shot in (10, 1) for k, method in enumerate(["ridge", "lstm"])]
    assert evaluate.table(rows).splitlines() == [
        "| learner | 5-way 1-shot | 5-way 10-shot |",
        "|---|---|---|",
        "| ridge | 10.00 ± 0.50 | 100.00 ± 0.50 |",
        "| lstm | 11.00 ± 0.50 | 101.00 ± 0.50 |",
    ]


def measured(out: Path) -> list[evaluate.Row]:
    """The rows of accuracy in a file of raw results."""
    names = [field.name for field in dataclasses.fields(evaluate.Row)]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    rows = [{name: line[name] for name in names if name in line} for line in found if line["experiment"] == "accuracy"]
    return [evaluate.Row(**row) for row in rows]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MeanColour:
    """An artifact of mean colours in place of the one on disk, at any path."""
    extractor = MeanColour()
    artifact = tiny_artifact(tmp_path / "artifact", rejects=True)
    monkeypatch.setattr(evaluate.Artifact, "load", lambda path: artifact)
    monkeypatch.setattr(evaluate, "load_extractor", lambda artifact, *, precision: extractor)
    return extractor


@pytest.mark.slow
def test_the_command_prints_a_table_and_adds_json_lines(
    shapes: Path, fake: MeanColour, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "figures.jsonl"
    asked = config(data=shapes, split="train", way="2,5", shot="1,4", json_out=out, queries=3)
    rows = evaluate.main(asked)
    assert len(rows) == 8
    printed = capsys.readouterr()
    assert evaluate.table(rows) in printed.out
    assert "50 episodes" in printed.out
    assert "72 images of 6 classes" in printed.err
    assert measured(out) == rows
    assert sum(fake.batches) == 72  # each image is embedded once
    again = evaluate.main(asked)
    assert again == rows
    assert len(out.read_text().splitlines()) == 16


def test_a_line_says_what_was_measured_with_what_and_by_which_command(
    shapes: Path, fake: MeanColour, tmp_path: Path
) -> None:
    out = tmp_path / "figures.jsonl"
    evaluate.main(config(data=shapes, split="train", way="3", shot="2", learners="ridge", json_out=out, group=r"^\d"))
    (line,) = [json.loads(text) for text in out.read_text().splitlines()]
    assert line["experiment"] == "accuracy"
    assert line["command"] == (
        "python -m training evaluate --artifact a --data DATA/shapes --split train --way 3 --shot 2 --episodes 50 "
        r"--learners ridge --group '^\d'"
    )
    assert (line["artifact"], line["labels"], line["seconds"], line["rotations"]) == ("tiny", "none", None, False)


@pytest.mark.slow
def test_a_line_whose_examples_are_spread_says_so_and_is_of_other_episodes(
    shapes: Path, fake: MeanColour, tmp_path: Path
) -> None:
    out = tmp_path / "figures.jsonl"
    given = {"data": shapes, "split": "train", "way": "3", "shot": "2", "learners": "prototype", "json_out": out}
    twos = r"\d(?=\.)"  # 00 and 10 are one thing, 01 and 11 another
    for spread, group in ((False, twos), (True, twos), (False, ""), (True, "")):
        evaluate.main(config(**given, group=group, spread=spread))
    packed, spread, alone, same = [json.loads(text) for text in out.read_text().splitlines()]
    assert "spread" not in packed
    assert spread["spread"] is True
    assert spread["command"].endswith("--spread")
    assert packed["episode_list"] != spread["episode_list"]
    assert alone["episode_list"] == same["episode_list"]  # each image shows another thing


def test_a_line_of_several_views_says_how_many_they_were(shapes: Path, fake: MeanColour, tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    given = {"data": shapes, "split": "train", "way": "3", "shot": "2", "learners": "prototype", "json_out": out}
    shown: list[int] = []
    for views in (1, 2):
        fake.batches.clear()
        evaluate.main(config(**given, views=views))
        shown.append(sum(fake.batches))
    one, two = [json.loads(text) for text in out.read_text().splitlines()]
    assert "views" not in one
    assert two["views"] == 2
    assert two["command"].endswith("--learners prototype --views 2")
    assert shown[1] == 2 * shown[0]


def test_of_a_share_that_is_labelled_the_line_says_so(shapes: Path, fake: MeanColour, tmp_path: Path) -> None:
    file = tmp_path / "semi.jsonl"
    more = {"way": "2", "shot": "1", "queries": 1, "unlabelled": 2, "labelled": 0.4}
    evaluate.main(config(data=shapes, episodes=5, json_out=file, **more))
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert {line["experiment"] for line in lines} == {"accuracy", "semi-supervised"}
    assert {line["labelled"] for line in lines} == {40}
    assert all("--labelled 0.4" in line["command"] for line in lines)
    with pytest.raises(SystemExit, match="--labelled is for --unlabelled"):
        evaluate.main(config(data=shapes, episodes=5, labelled=0.4))


def test_trust_and_what_int8_loses_are_lines_of_their_own(shapes: Path, fake: MeanColour, tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    given = {"data": shapes, "split": "train", "way": "3", "shot": "2", "json_out": out}
    rows = evaluate.main(config(**given, precision="int8", against_float32=True, foreign=2))
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert measured(out) == rows
    paired = [line for line in lines if line["experiment"] == "int8 against float32"]
    assert [line["method"] for line in paired] == [row.method for row in rows]
    # The fake has one precision only: the very same features, so not even the interval is other than 0.
    assert all(line["difference"] == line["difference_interval"] == 0 for line in paired)
    (trust,) = [line for line in lines if line["experiment"] == "trust"]
    assert (trust["method"], trust["foreign"], trust["default"]) == ("prototype", 2, True)


def test_a_difference_is_paired_over_the_episodes() -> None:
    rows = [a_row("ridge", 5, 1, 60.0)]
    exact, found = np.array([0.2, 0.9, 0.5]), np.array([0.1, 0.8, 0.4])
    (line,) = evaluate.against(rows, {("ridge", 5, 1): found}, {("ridge", 5, 1): exact})
    assert line["difference"] == -10.0
    assert line["difference_interval"] == pytest.approx(0, abs=1e-9)  # each episode loses as much


def test_learners_can_be_picked_and_unknown_ones_are_named(shapes: Path, fake: MeanColour) -> None:
    rows = evaluate.main(config(data=shapes, split="train", way="3", shot="1", learners="ridge"))
    assert {row.method for row in rows} == {"ridge"}
    with pytest.raises(SystemExit, match=r"--learners: .* has prototype, ridge"):
        evaluate.main(config(data=shapes, split="train", way="3", shot="1", learners="ridge,magic"))


def test_learners_are_compared_episode_by_episode(
    shapes: Path, fake: MeanColour, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "paired.jsonl"
    asked = {"data": shapes, "split": "train", "way": "3", "shot": "1,2", "queries": 3}
    rows = evaluate.main(config(**asked, paired="prototype", json_out=out))
    value = {(row.method, row.shot): row.accuracy for row in rows}
    names = [field.name for field in dataclasses.fields(paired.PairedRow)]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = [paired.PairedRow(**{k: line[k] for k in names}) for line in lines if line["experiment"] == "paired"]
    assert paired.table(found) in capsys.readouterr().out
    assert len(found) == len(rows) - 2
    for row in found:
        assert row.against == "prototype"
        assert row.difference == pytest.approx(value[row.method, row.shot] - value["prototype", row.shot], abs=0.011)
    with pytest.raises(SystemExit, match="--paired: magic is not among the learners measured"):
        evaluate.main(config(**asked, paired="magic"))


def test_turned_classes_are_counted_as_classes(shapes: Path, fake: MeanColour) -> None:
    with pytest.raises(SystemExit, match=r"--way: .* has only 2 classes in its split 'val'"):
        evaluate.main(config(data=shapes, split="val", way="5", shot="1"))
    rows = evaluate.main(config(data=shapes, split="val", way="5", shot="1", rotations=True))
    assert {row.way for row in rows} == {5}


def test_groups_and_the_limit_per_class_reach_the_episodes(shapes: Path, fake: MeanColour) -> None:
    given = {"data": shapes, "split": "train", "way": "3", "shot": "2", "queries": 2}
    plain = evaluate.main(config(**given))[0]
    grouped = evaluate.main(config(**given, group=r"^\d"))[0]  # 00 to 09 are one thing, 10 and 11 another
    fewer = evaluate.main(config(**given, per_class=5))[0]
    assert len({plain.episode_list, grouped.episode_list, fewer.episode_list}) == 3


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_artifact_from_disk_is_measured(
    demo: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.jsonl"
    rows = evaluate.main(
        EvaluateConfig(
            artifact=demo / "artifact", data=demo / "shapes", shot="5", episodes=40, precision=precision, json_out=out
        )
    )
    assert evaluate.table(rows) in capsys.readouterr().out
    assert measured(out) == rows
    assert {row.method for row in rows} == {*LEARNERS}
    assert all(row.accuracy - row.interval > 20 for row in rows)  # better than chance
    assert {row.precision for row in rows} == {precision}


def test_a_folder_that_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid, match="nothing"):
        evaluate.main(config(artifact=tmp_path / "nothing"))


def test_examples_and_questions_that_were_not_there_are_said(
    shapes: Path, fake: MeanColour, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.jsonl"
    given = {"data": shapes, "split": "train", "way": "3", "per_class": 4, "learners": "ridge", "json_out": out}
    rows = evaluate.main(config(**given, shot="1,3,5", queries=1))
    assert [(row.shots_mean, row.queries_mean) for row in rows] == [(None, None), (None, None), (3, None)]
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert ["shots_mean" in line for line in lines] == [False, False, True]
    assert all("queries_mean" not in line for line in lines)
    said = [line for line in capsys.readouterr().err.splitlines() if "-shot" in line]
    assert said == [
        "3-way 5-shot with 1 questions: there were 3 examples a class on average, for classes have too few."
    ]
    (row,) = evaluate.main(config(**given, shot="3", queries=2, paired="ridge"))
    assert (row.shots_mean, row.queries_mean) == (None, 1)
    assert "there were 1 questions a class" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"way": "2,6", "foreign": 5}, "--foreign: .* has 6 classes"),
        ({"way": "6", "unlabelled": 1, "distractors": 2}, "--distractors: .* has 6 classes"),
        ({"way": "3", "scores": True}, "--scores is for --foreign"),
        ({"way": "3", "distractors": 2}, "--distractors is for --unlabelled"),
        ({"way": "3", "unlabelled": 2, "only_distractors": True}, "--only-distractors is for --distractors"),
    ],
    ids=["foreign", "distractors", "scores", "nothing unlabelled", "no distractors"],
)
def test_what_would_measure_nothing_is_refused(
    shapes: Path, fake: MeanColour, given: dict[str, object], sentence: str
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        evaluate.main(config(data=shapes, split="train", shot="1", **given))
    assert not fake.batches


@pytest.mark.slow
def test_headers_show_the_classes_that_there_were(
    shapes: Path, fake: MeanColour, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"data": shapes, "split": "train", "shot": "1", "queries": 2}
    evaluate.main(config(**given, way="5", foreign=5, unlabelled=1, distractors=4))
    printed = capsys.readouterr().out
    assert "foreign classes an episode: 1, per cent" in printed
    assert "1 unlabelled images a class, distractor classes: 1, per cent" in printed
    evaluate.main(config(**given, way="2,5", foreign=5))
    assert "foreign classes an episode: 4 at 2-way, 1 at 5-way, per cent" in capsys.readouterr().out


def test_features_that_are_not_finite_are_refused() -> None:
    class Broken(MeanColour):
        def __call__(self, batch: np.ndarray) -> np.ndarray:
            return np.where(batch[:, :1, 0, 0] == batch[0, 0, 0, 0], np.nan, super().__call__(batch))

    with pytest.raises(DataError, match="not finite"):
        evaluate.embed(Broken(), noise(2, 2).pixels)


@pytest.mark.parametrize(
    ("trained", "split", "said"),
    [
        ({"data": "d", "split": "train"}, "test", ""),
        ({"data": "d", "split": "val"}, "val", "The artifact learned from these classes (d, val)"),
        ({"data": "d", "split": "all"}, "test", "The artifact learned from these classes (d, all)"),
        ({"data": "e", "split": "val"}, "val", ""),
        ({"data": "e", "split": "train"}, "train", "--split train is for learning. The artifact says that it learned"),
        ({}, "train", "--split train is for learning. The artifact does not say"),
    ],
)
def test_classes_that_were_learned_from_are_said_to_be(trained: dict[str, str], split: str, said: str) -> None:
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(training=trained, classes={}))
    found = evaluate.learned_from(artifact, config(split=split), ["a", "b"])
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_classes_that_the_artifact_knows_again_are_counted_wherever_they_lie() -> None:
    """By their names: neither that of the folder nor that of the split matters."""
    known = {"learned": splits.digests(["train/cat", "dog", "Latin/a"]), "calibrated": splits.digests(["fox", "hen"])}
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(training={"data": "e", "split": "train"}, classes=known))
    found = evaluate.learned_from(artifact, config(split="val"), ["cat", "dog", "fox", "Greek/a"]).splitlines()
    assert [line.split(", by their names, ")[0] for line in found] == ["Of 4 classes 2 are", "Of 4 classes 1 are"]
    assert "learned from" in found[0]
    assert "calibrated on" in found[1]
    assert evaluate.learned_from(artifact, config(split="train"), ["cow"]) == ""


def test_classes_of_which_no_digest_is_known_are_known_by_data_and_split() -> None:
    """An artifact whose practice knows its classes, and whose older pretraining does not."""
    known = {"learned": splits.digests(["dog"]), "calibrated": splits.digests(["fox"])}
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(training={"data": "d", "split": "val"}, classes=known))
    found = evaluate.learned_from(artifact, config(split="val"), ["cat", "fox"]).splitlines()
    assert found[0].startswith("The artifact learned from these classes (d, val)")
    assert found[1].startswith("Of 2 classes 1 are, by their names, among those that the artifact was calibrated on")
    assert evaluate.learned_from(artifact, config(split="val"), ["cat", "dog"]).startswith("Of 2 classes 1 are")
    assert evaluate.learned_from(artifact, config(split="test"), ["cat"]) == ""
