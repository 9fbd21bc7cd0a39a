from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import Command, killed, needs, tree

pytestmark = pytest.mark.torch
needs("torch")

import torch
from safetensors.torch import load_file

from models.images import ImageDecoder
from models.learners import LEARNERS, build
from training import checkpoint, data, evaluate, metatrain, practice, pretrain, pretrained, splits
from training.config import MetatrainConfig, PretrainConfig, parse
from training.episodes import Indices, Pool, varied
from training.folders import DataError

ALL = pytest.mark.parametrize("method", list(LEARNERS))
CPU = torch.device("cpu")


def config(**given: Any) -> MetatrainConfig:
    defaults = {"data": Path("d"), "out": Path("o"), "steps": 30, "max_way": 4, "max_shot": 3, "slots": 16, "lr": 3e-3}
    return MetatrainConfig(**{**defaults, **given})


def clouds(seed: int = 0) -> practice.Tasks:
    """Twelve classes as clouds on a sphere, wide in directions that tell classes apart badly; two rows a thing."""
    rng = np.random.default_rng([5, seed])
    labels = np.repeat(np.arange(12), 16)
    spread = np.where(np.arange(10) < 4, 0.9, 0.25)
    features = rng.normal(size=(12, 10))[labels] * 0.5 + rng.normal(size=(len(labels), 10)) * spread
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return practice.Tasks(features.astype(np.float32), labels, np.arange(len(labels)) // 2, plain=len(labels))


def few(tasks: practice.Tasks, asked: MetatrainConfig) -> list[Indices]:
    return metatrain.held_out(tasks, asked)[::25]


def training(method: str, tasks: practice.Tasks, asked: MetatrainConfig) -> metatrain.Training:
    return metatrain.Training(method, metatrain.start(method, tasks, asked), asked, CPU)


def drawn(tasks: practice.Tasks, step: int) -> list[Indices]:
    """The training episodes of a step."""
    return list(varied(tasks.pool, 0, step, count=4, max_way=4, max_shot=3, queries=3, near=tasks.near()))


def steps(one: metatrain.Training, tasks: practice.Tasks, count: int) -> list[float]:
    return [one.advance(torch.from_numpy(tasks.features), drawn(tasks, one.step)) for _ in range(count)]


def loss(arrays: dict[str, np.ndarray], method: str, tasks: practice.Tasks, episodes: list[Indices]) -> float:
    """Mean cross-entropy on the questions."""
    total = []
    for episode in episodes:
        affine = build(method, arrays).adapt(evaluate.support_of(tasks.features, episode))
        logits = tasks.features[episode.query] @ affine.weight.T + affine.bias
        logits = logits - logits.max(axis=1, keepdims=True)
        total += list(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), episode.answers])
    return float(np.mean(total))


def test_held_out_tasks_are_of_every_pool_alike() -> None:
    tasks = clouds()
    both = practice.Tasks(tasks.features, tasks.labels, None, plain=tasks.plain, others=(Pool.of(tasks.labels % 4),))
    episodes = metatrain.held_out(both, config())
    assert len(episodes) == len(metatrain.held_out(tasks, config()))
    assert [episode.way for episode in episodes].count(4) == len(episodes) // 2  # the other pool has four classes


@ALL
def test_the_start_fits_the_learner_and_is_the_same_each_time(method: str) -> None:
    tasks = clouds()
    first, second = (metatrain.start(method, tasks, config()) for _ in range(2))
    build(method, first)  # refuses what does not fit
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(value.dtype == np.float32 for value in first.values())


def test_the_lstm_starts_as_the_discriminant() -> None:
    tasks = clouds()
    lstm, plain = (build(method, metatrain.start(method, tasks, config())) for method in ("lstm", "discriminant"))
    for episode in few(tasks, config()):
        support = evaluate.support_of(tasks.features, episode)
        for found, expected in zip(lstm.adapt(support), plain.adapt(support), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_lstm_practises_without_the_scatter_of_a_task_and_is_checked_with_it() -> None:
    tasks, asked = clouds(), config()
    training = metatrain.Training("lstm", metatrain.start("lstm", tasks, asked), asked, torch.device("cpu"))
    assert training.learner().log_own == metatrain.NO_SCATTER  # type: ignore[attr-defined]
    assert training.arrays()["log_own"] == 0
    training.check(tasks, few(tasks, asked))
    assert training.best["log_own"] == 0


def test_held_out_tasks_are_fixed_and_of_two_sizes() -> None:
    tasks, asked = clouds(), config(max_shot=10, queries=4)
    episodes = metatrain.held_out(tasks, asked)
    assert {(episode.way, int(np.bincount(episode.labels).max())) for episode in episodes} == {
        (5, 1), (5, 5), (12, 1), (12, 5),
    }  # fmt: skip
    again = metatrain.held_out(tasks, asked)
    assert all(np.array_equal(a.support, b.support) for a, b in zip(episodes, again, strict=True))
    other = metatrain.held_out(tasks, config(max_shot=10, queries=4, seed=1))
    assert not all(np.array_equal(a.support, b.support) for a, b in zip(episodes, other, strict=True))


def test_the_shrinkage_that_does_best_on_held_out_tasks_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = clouds()
    episodes = few(tasks, config())
    arrays = metatrain.start("whitened", tasks, config())
    score, tried = metatrain.score, {}

    def noted(method: str, arrays: dict[str, np.ndarray], *rest: Any) -> float:
        value = score(method, arrays, *rest)
        tried[float(arrays["log_shrink"])] = value
        return value

    monkeypatch.setattr(metatrain, "score", noted)
    found = metatrain.best_shrink("whitened", arrays, tasks, episodes)
    assert len(tried) >= 3
    assert min(tried.values()) < max(tried.values()) == tried[float(found["log_shrink"])]
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays if name != "log_shrink")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name == "lstm" else []) for name in LEARNERS]
)
def test_training_never_ends_below_its_start_and_lowers_the_loss(method: str) -> None:
    tasks, unseen, asked = clouds(), clouds(1), config()
    episodes = few(unseen, asked)
    one = training(method, tasks, asked)
    before = one.arrays()
    start = one.check(unseen, episodes)
    for _ in range(3):
        steps(one, tasks, 10)
        one.check(unseen, episodes)
    assert metatrain.score(method, before, unseen, episodes) == start
    assert metatrain.score(method, one.best, unseen, episodes) == one.best_score >= start
    own = [episode for step in range(30) for episode in drawn(tasks, step)]
    assert loss(one.arrays(), method, tasks, own) < loss(before, method, tasks, own)


def test_a_training_that_goes_wrong_keeps_its_start() -> None:
    tasks, asked = clouds(), config(lr=10)
    episodes = few(tasks, asked)
    one = training("lstm", tasks, asked)
    before = one.arrays()
    start = one.check(tasks, episodes)
    steps(one, tasks, 5)
    assert one.check(tasks, episodes) < start
    assert one.best_score == start
    assert all(np.array_equal(one.best[name], before[name]) for name in before)


@ALL
def test_what_is_remembered_stays_and_what_is_learned_moves(method: str) -> None:
    tasks = clouds()
    one = training(method, tasks, config())
    before = one.arrays()
    assert set(before) == {field.name for field in dataclasses.fields(LEARNERS[method])}
    steps(one, tasks, 3)
    moved = {name for name, value in one.arrays().items() if not np.array_equal(value, before[name])}
    assert moved == set(before) - {"basis", "spectrum", "slots", "log_shrink", "log_own"}


def test_a_step_reads_only_the_slots_that_are_kept() -> None:
    tasks = clouds()
    features, episodes = torch.from_numpy(tasks.features), drawn(tasks, 0)
    losses = []
    for keep in (None, [True] * 12, [True] * 6 + [False] * 6):
        one = training("lstm", tasks, config(slots=12))
        with torch.no_grad():
            one.learned["each"].fill_(0.3)  # as if it had learned to go by the memory
        losses.append(one.advance(features, episodes, None if keep is None else [np.array(keep)] * len(episodes)))
    assert losses[0] == losses[1] != losses[2]


@ALL
def test_the_learning_rate_falls_to_nothing(method: str) -> None:
    one = training(method, clouds(), config(steps=4, lr=0.01))
    rates = []
    for _ in range(4):
        steps(one, clouds(), 1)
        rates.append([group["lr"] for group in one.optimizer.param_groups])
    np.testing.assert_allclose(rates, np.array([0.1, 0.01]) * np.array([1, 0.75, 0.5, 0.25])[:, None])


@ALL
def test_a_training_that_goes_on_from_a_checkpoint_is_the_unbroken_one(method: str, tmp_path: Path) -> None:
    tasks, asked = clouds(), config()
    episodes = few(tasks, asked)[:5]
    unbroken, broken = training(method, tasks, asked), training(method, tasks, asked)
    for one in (unbroken, broken):
        one.check(tasks, episodes)
        steps(one, tasks, 3)
    checkpoint.save(tmp_path / "state.safetensors", broken.state())
    broken = training(method, tasks, asked)
    broken.restore(checkpoint.load(tmp_path / "state.safetensors"))
    assert steps(unbroken, tasks, 3) == steps(broken, tasks, 3)
    assert unbroken.check(tasks, episodes) == broken.check(tasks, episodes)
    assert unbroken.best_score == broken.best_score
    for name, one in (("unbroken", unbroken), ("broken", broken)):
        checkpoint.save(tmp_path / name, one.state())
    assert (tmp_path / "unbroken").read_bytes() == (tmp_path / "broken").read_bytes()


def test_reptile_moves_from_the_start_towards_where_each_episode_ends() -> None:
    """By hand: each episode trained from the same start, and the mean of the ends taken in by a share that falls."""
    tasks, asked = clouds(), config(outer="reptile", steps=4)
    one, by_hand = (training("gradient", tasks, asked) for _ in range(2))
    features = torch.from_numpy(tasks.features)
    for step, share in enumerate((1.0, 0.75)):
        episodes = drawn(tasks, step)
        start = by_hand.arrays()
        ends = []
        for episode in episodes:
            with torch.no_grad():
                for name, value in by_hand.learned.items():
                    value.copy_(torch.from_numpy(start[name]))
            for _ in range(metatrain.INNER):
                by_hand.descend(by_hand.loss(features, episode))
            ends.append(by_hand.arrays())
        with torch.no_grad():
            for name, value in by_hand.learned.items():
                mean = np.mean([end[name] for end in ends], axis=0)
                value.copy_(torch.as_tensor(start[name] + share * (mean - start[name])))
        one.advance(features, episodes)
        for name, value in one.arrays().items():
            np.testing.assert_allclose(value, by_hand.arrays()[name], rtol=1e-4, atol=1e-4)
    assert np.abs(one.arrays()["log_steps"] - metatrain.start("gradient", tasks, asked)["log_steps"]).max() > 1e-3


def test_reptile_lowers_the_loss_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    tasks, asked = clouds(), config(outer="reptile", steps=20)
    unbroken, broken = (training("gradient", tasks, asked) for _ in range(2))
    before = unbroken.arrays()
    steps(unbroken, tasks, 10)
    steps(broken, tasks, 10)
    checkpoint.save(tmp_path / "state", broken.state())
    broken = training("gradient", tasks, asked)
    broken.restore(checkpoint.load(tmp_path / "state"))
    assert steps(unbroken, tasks, 10) == steps(broken, tasks, 10)
    own = [episode for step in range(20) for episode in drawn(tasks, step)]
    assert loss(unbroken.arrays(), "gradient", tasks, own) < loss(before, "gradient", tasks, own)


# The command


@pytest.fixture(scope="module")
def trunk(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short pretraining."""
    out = tmp_path_factory.mktemp("trunk")
    given = {"shape": "tiny", "size": 32, "batch": 24, "epochs": 1, "precision": "float32", "device": "cpu"}
    return pretrain.main(PretrainConfig(data=shapes, out=out, **given))


@pytest.fixture
def folder(trunk: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes folders that hold it."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / trunk.name).symlink_to(trunk)
        return tmp_path / name

    return make


@pytest.fixture
def few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out tasks are most of the work of a training this short: a few will do."""
    held_out = metatrain.held_out
    monkeypatch.setattr(metatrain, "held_out", lambda tasks, asked: held_out(tasks, asked)[::25])


SHORT = {
    "steps": 4,
    "check_steps": 2,
    "max_way": 4,
    "max_shot": 2,
    "queries": 1,
    "views": 1,
    "slots": 8,
    "device": "cpu",
}


def same(first: Path, second: Path) -> bool:
    one, two = (load_file(folder / metatrain.CHECKPOINT) for folder in (first, second))
    return len(one) > 3 and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("few_looks")
def test_a_run_stopped_by_the_clock_goes_on_to_the_same_end(shapes: Path, folder: Callable[[str], Path]) -> None:
    unbroken, broken = folder("unbroken"), folder("broken")
    given = {"data": shapes, **SHORT, "steps": 2, "learners": "ridge,lstm"}
    metatrain.main(MetatrainConfig(**given, out=unbroken))
    for stopped in range(3):
        metatrain.main(MetatrainConfig(**given, out=broken, minutes=1e-9))
        found = tree(broken / metatrain.CHECKPOINT)["learners"]
        assert sum(one["step"] for one in found.values()) == stopped + 1
        with pytest.raises(DataError, match="not finished: run the same `metatrain` command again"):
            metatrain.load_learners(broken)
    metatrain.main(MetatrainConfig(**given, out=broken))
    assert same(unbroken, broken)
    assert set(metatrain.load_learners(broken)) == {"ridge", "lstm"}
    metatrain.main(MetatrainConfig(**given, out=broken))  # once more changes nothing
    assert same(unbroken, broken)


@pytest.mark.usefixtures("few_looks")
def test_going_on_with_other_settings_is_refused(shapes: Path, folder: Callable[[str], Path]) -> None:
    out = folder("run")
    given = {"data": shapes, "out": out, **SHORT, "learners": "prototype"}
    metatrain.main(MetatrainConfig(**given))
    before = (out / metatrain.CHECKPOINT).read_bytes()
    for other in ({"seed": 1}, {"learners": "ridge"}, {"tasks": "pseudo"}, {"steps": 5}, {"views": 2}):
        with pytest.raises(SystemExit, match="made with other settings"):
            metatrain.main(MetatrainConfig(**{**given, **other}))
    assert (out / metatrain.CHECKPOINT).read_bytes() == before
    metatrain.main(MetatrainConfig(**given, minutes=9, checkpoint_s=1))  # the clock is free


@pytest.mark.usefixtures("few_looks")
def test_which_step_is_kept_is_told_by_the_classes_named_for_it(
    shapes: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    load = data.load
    monkeypatch.setattr(
        data, "load", lambda path, split, *rest, **more: asked.append(split) or load(path, split, *rest, **more)
    )
    given = {"data": shapes, **SHORT, "learners": "prototype"}
    metatrain.main(MetatrainConfig(**given, out=folder("usual")))
    metatrain.main(MetatrainConfig(**given, out=folder("named"), check_split="train"))
    assert asked == ["train", "val", "train", "train"]


@pytest.mark.usefixtures("few_looks")
def test_the_best_of_every_learner_is_kept_and_can_be_built(shapes: Path, folder: Callable[[str], Path]) -> None:
    out = folder("run")
    metatrain.main(MetatrainConfig(data=shapes, out=out, **SHORT))
    found = metatrain.load_learners(out)
    assert list(found) == list(LEARNERS)
    for method, arrays in found.items():
        build(method, arrays)
    state = checkpoint.load(out / metatrain.CHECKPOINT)
    lines = [json.loads(line) for line in (out / "metatrain.jsonl").read_text().splitlines()]
    for method in LEARNERS:
        checks = {line["step"]: line["check"] for line in lines if line["learner"] == method}
        assert list(checks) == [0, 2]
        assert state["learners"][method]["best_score"] >= max(checks.values()) - 1e-5


@pytest.mark.usefixtures("few_looks")
@pytest.mark.parametrize(
    ("tasks", "reads"), [("pseudo", False), ("clusters", False), ("mixed", False), ("labels", True)]
)
def test_pseudo_tasks_read_no_label(
    tasks: str, reads: bool, shapes: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"data": shapes, **SHORT, "tasks": tasks, "learners": "prototype,whitened", "rotations": True, "views": 2}
    plain, permuted = folder("plain"), folder("permuted")
    metatrain.main(MetatrainConfig(**given, out=plain))
    load = data.load

    def shuffled(*arguments: Any, **options: Any) -> data.Images:
        images = load(*arguments, **options)
        labels = np.random.default_rng(0).permutation(images.labels)
        assert not np.array_equal(labels, images.labels)
        return data.Images(images.pixels, labels, images.classes, images.groups)

    monkeypatch.setattr(data, "load", shuffled)
    metatrain.main(MetatrainConfig(**given, out=permuted))
    assert same(plain, permuted) == (not reads)


def test_an_unknown_learner_is_refused_with_those_that_are_known(shapes: Path, folder: Callable[[str], Path]) -> None:
    with pytest.raises(SystemExit, match="--learners: known learners are prototype, ridge"):
        metatrain.main(MetatrainConfig(data=shapes, out=folder("run"), learners="prototype,magic"))


def test_what_must_come_first_is_named(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"run `python -m training pretrain --out {tmp_path}` first"):
        metatrain.main(MetatrainConfig(data=shapes, out=tmp_path))
    with pytest.raises(DataError, match=f"run `python -m training metatrain --out {tmp_path}` first"):
        metatrain.load_learners(tmp_path)


@pytest.mark.usefixtures("few_looks")
def test_a_cell_goes_on_to_another_extractor(shapes: Path, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Of other data and another network: the cell comes along, the memory does not."""
    first = folder("first")
    metatrain.main(MetatrainConfig(data=shapes, out=first, **{**SHORT, "lr": 0.05}, learners="lstm"))
    other = tmp_path / "other"
    given = {"shape": "tiny-grey", "augment": "characters", "size": 16, "batch": 24, "epochs": 1, "device": "cpu"}
    pretrain.main(PretrainConfig(data=shapes, out=other, **given))
    asked = MetatrainConfig(data=shapes, out=other, **SHORT, learners="lstm", cell=first)
    tasks, _ = practice.practice(
        *pretrained.load_extractor(other)[:1],
        ImageDecoder(16, 16, 1),
        asked,
        PretrainConfig(data=shapes, out=other, **given),
    )
    learned = metatrain.load_learners(first)["lstm"]
    begun = metatrain.start("lstm", tasks, asked)
    assert all(np.array_equal(begun[name], learned[name]) for name in metatrain.CELL)
    assert not np.array_equal(begun["basis"], learned["basis"])
    metatrain.main(asked)
    assert set(metatrain.load_learners(other)["lstm"]) == set(begun)


def test_the_cell_that_comes_along_serves_an_extractor_of_any_size() -> None:
    tasks = clouds()
    asked = config(cell=Path(metatrain.__file__).parent / "cells/lstm")
    given, new = (metatrain.start("lstm", tasks, one) for one in (asked, config()))
    assert {name for name in new if not np.array_equal(given[name], new[name])} == set(metatrain.CELL)
    (episode, *_) = few(tasks, asked)
    support = evaluate.support_of(tasks.features, episode)
    answers = [build("lstm", arrays).adapt(support).weight for arrays in (given, new)]
    assert np.isfinite(answers[0]).all()
    assert not np.allclose(*answers)


def test_a_folder_without_a_cell_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / metatrain.CHECKPOINT, {"done": True, "learners": {}})
    with pytest.raises(DataError, match=r"--cell: .* holds no cell"):
        metatrain.start("lstm", clouds(), config(cell=tmp_path))


@pytest.mark.slow
def test_a_run_killed_three_times_ends_bit_for_bit_like_the_unbroken_one(
    shapes: Path, folder: Callable[[str], Path], command: Callable[..., Command]
) -> None:
    flags = {**SHORT, "steps": 60, "check_steps": 20, "learners": "whitened,gradient", "episodes": 4, "checkpoint-s": 0}
    out, unbroken = folder("killed"), folder("unbroken")

    def arguments(out: Path) -> list[str]:
        return [f"--{flag.replace('_', '-')}={value}" for flag, value in {"data": shapes, "out": out, **flags}.items()]

    def step() -> int:
        return sum(one["step"] for one in tree(out / metatrain.CHECKPOINT).get("learners", {}).values())

    reached = [0]
    for target in (1, 30, 75):  # twice within the first learner, once within the second
        killed({command("metatrain", *arguments(out)): lambda target=target: step() >= target})
        assert max(reached[-1], target - 1) < step() < 120
        reached.append(step())
    metatrain.main(parse(MetatrainConfig, arguments(out), prog="x"))
    metatrain.main(parse(MetatrainConfig, arguments(unbroken), prog="x"))
    assert step() == 120
    assert same(out, unbroken)


@pytest.mark.usefixtures("few_looks")
def test_learners_of_another_extractor_are_refused(shapes: Path, folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = folder("run")
    given = MetatrainConfig(data=shapes, out=out, **SHORT, learners="prototype")
    metatrain.main(given)
    (out / pretrained.CHECKPOINT).unlink()
    small = {"shape": "tiny", "size": 32, "batch": 24, "precision": "float32", "device": "cpu"}
    pretrain.main(PretrainConfig(data=shapes, out=out, **small, epochs=1, seed=1))
    before = (out / metatrain.CHECKPOINT).read_bytes()
    with pytest.raises(DataError, match="holds learners of another extractor"):
        metatrain.main(given)
    from training import export  # onnx may be absent
    from training.config import ExportConfig

    with pytest.raises(DataError, match="holds learners of another extractor"):
        export.main(ExportConfig(checkpoint=out, data=shapes, out=tmp_path / "artifact", name="x"))
    assert (out / metatrain.CHECKPOINT).read_bytes() == before
    state = checkpoint.load(out / metatrain.CHECKPOINT)
    del state["extractor"]
    checkpoint.save(out / metatrain.CHECKPOINT, state)
    metatrain.main(given)  # of an older one nothing is known


def fewer(shapes: Path, copy: Path) -> Path:
    """The same data under another path, without one image of a training class."""
    shutil.copytree(shapes, copy)
    name = splits.split_classes(copy, [path.name for path in copy.iterdir()])["train"][0]
    next((copy / name).iterdir()).unlink()
    return copy


@pytest.mark.usefixtures("few_looks")
def test_going_on_with_other_data_is_refused(shapes: Path, folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = folder("run")
    given = MetatrainConfig(data=shapes, out=out, **SHORT, learners="prototype")
    metatrain.main(given)
    moved = tmp_path / "moved"
    moved.symlink_to(shapes)
    metatrain.main(given.model_copy(update={"data": moved}))
    other = given.model_copy(update={"data": fewer(shapes, tmp_path / "fewer")})
    with pytest.raises(DataError, match="was trained on other data: 96 examples of 8 classes"):
        metatrain.main(other)
    state = checkpoint.load(out / metatrain.CHECKPOINT)
    del state["trained_on"]
    checkpoint.save(out / metatrain.CHECKPOINT, state)
    metatrain.main(other)


def test_one_class_is_refused_with_what_it_takes(tmp_path: Path) -> None:
    tasks = practice.Tasks(np.eye(4, dtype=np.float32), np.zeros(4, int), None, plain=4)
    with pytest.raises(DataError, match="--tasks pseudo"):
        metatrain.train(config(out=tmp_path), tasks, [practice.Source(tasks)], clouds(), CPU)
    with pytest.raises(DataError, match="one to validate on"):
        metatrain.train(config(out=tmp_path), clouds(), [practice.Source(clouds())], tasks, CPU)


@pytest.mark.usefixtures("few_looks")
def test_a_log_holds_each_step_once_after_a_kill(shapes: Path, folder: Callable[[str], Path]) -> None:
    unbroken, broken = folder("unbroken"), folder("broken")
    given = {"data": shapes, **SHORT, "steps": 21, "learners": "prototype"}
    metatrain.main(MetatrainConfig(**given, out=unbroken))
    metatrain.main(MetatrainConfig(**given, out=broken, minutes=1e-9))
    with (broken / "metatrain.jsonl").open("a") as log:  # what came after the checkpoint, and half a line
        log.write('{"learner": "prototype", "step": 2, "check": 0.5}\n{"learner": "prototype", "st')
    metatrain.main(MetatrainConfig(**given, out=broken))
    assert (broken / "metatrain.jsonl").read_text() == (unbroken / "metatrain.jsonl").read_text()


@pytest.mark.usefixtures("few_looks")
def test_a_checkpoint_finds_every_line_before_it_on_disk(
    shapes: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = folder("run"), checkpoint.save
    lines: dict[int, str] = {}

    def noted(path: Path, state: dict[str, Any]) -> None:
        lines[state["learners"]["prototype"]["step"]] = (out / "metatrain.jsonl").read_text().splitlines()[-1]
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", noted)
    given = {**SHORT, "steps": 21, "check_steps": 7, "learners": "prototype", "checkpoint_s": -1.0}
    metatrain.main(MetatrainConfig(data=shapes, out=out, **given))
    assert [json.loads(lines[step])["step"] for step in (13, 20)] == [7, 20]


def test_a_second_run_into_one_folder_is_refused(shapes: Path, folder: Callable[[str], Path]) -> None:
    out = folder("run")
    before = sorted(out.iterdir())
    with checkpoint.alone(out), pytest.raises(DataError, match="Another run is at work in"):
        metatrain.main(MetatrainConfig(data=shapes, out=out, **SHORT))
    assert sorted(out.iterdir()) == sorted([*before, out / checkpoint.LOCK])
