from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import Command, killed, needs, tree

pytestmark = pytest.mark.torch
needs("torch")

import torch
from safetensors.torch import load_file, save_file

from tests.training.runs import MIX, TINY, config, differing, tensors
from training import __main__ as commands
from training import checkpoint, data, pretrain, pretrained, splits, synthetic, vision
from training.config import PretrainConfig, parse
from training.folders import DataError


@pytest.mark.parametrize("objectives", ["contrastive=1", "supervised=1"])
def test_details_without_the_objective_that_asks_about_them_are_refused(objectives: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="momentum"):
        pretrain.main(config(data=tmp_path, out=tmp_path, objectives=objectives, details=2))


def whole(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the checkpoint of a finished pretraining, as it lies in the file."""
    assert "extractor" in checkpoint.load(out / pretrained.CHECKPOINT)
    return load_file(out / pretrained.CHECKPOINT)


def test_a_run_stopped_by_the_clock_goes_on_to_the_same_end(
    shapes: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"data": shapes, "out": tmp_path, **TINY, "epochs": 2}
    steps = []
    for _ in range(3):
        pretrain.main(PretrainConfig(**given, minutes=1e-9))
        state = checkpoint.load(tmp_path / pretrained.CHECKPOINT)
        assert "extractor" not in state
        steps.append(state["step"])
        assert f"Stopped at step {state['step']} of 18" in capsys.readouterr().err
    assert steps == [1, 2, 3]
    with pytest.raises(DataError, match="not finished"):
        pretrained.load_extractor(tmp_path)
    pretrain.main(PretrainConfig(**given))
    assert differing(whole(unbroken), whole(tmp_path)) == []


def test_without_epochs_the_weights_are_those_of_the_start_and_see_at_another_size(
    shapes: Path, unbroken: Path, tmp_path: Path
) -> None:
    given = {"data": shapes, "size": 24, "epochs": 0, "out": tmp_path / "larger"}
    with pytest.raises(SystemExit, match="--start"):
        pretrain.main(config(**given))
    pretrain.main(config(**given, start=unbroken))
    (source, before), (larger, after) = pretrained.load_extractor(unbroken), pretrained.load_extractor(given["out"])
    assert before.size != after.size == 24
    assert not differing(tensors(dict(source.backbone.state_dict())), tensors(dict(larger.backbone.state_dict())))
    assert not torch.equal(source.get_buffer("centre"), larger.get_buffer("centre"))


def test_only_what_is_labelled_is_learned_from(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[data.Images] = []
    monkeypatch.setattr(pretrain, "train", lambda _config, images, _check: seen.append(images))
    for share in (1, 0.3):
        pretrain.main(config(data=shapes, out=tmp_path, labelled=share))
    whole, part = seen
    assert part.classes == whole.classes
    assert part.pixels.tobytes() == whole.pixels[data.named(whole, 0.3)].tobytes()
    assert 0 < len(part) < len(whole)


def test_a_finished_run_stays_as_it_is(shapes: Path, unbroken: Path) -> None:
    before = whole(unbroken)
    pretrain.main(PretrainConfig(data=shapes, out=unbroken, **TINY, epochs=2))
    assert differing(before, whole(unbroken)) == []


def test_looking_at_the_validation_classes_changes_nothing_and_is_written_down(
    shapes: Path, unbroken: Path, tmp_path: Path
) -> None:
    pretrain.main(PretrainConfig(data=shapes, out=tmp_path, **TINY, epochs=2, check_epochs=1))
    assert differing(whole(unbroken), whole(tmp_path)) == []
    lines = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    checks = [line for line in lines if "check" in line]
    assert [(line["step"], line["epoch"]) for line in checks] == [(9, 1.0), (18, 2.0)]
    assert set(checks[0]["check"]) == {"2-way 1-shot", "2-way 5-shot"}
    assert all(0 <= value <= 100 for value in checks[1]["check"].values())


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"lr": 0.06},
        {"epochs": 3},
        {"objectives": "supervised=1"},
        {"rotations": True},
        {"shape": "tiny-grey", "augment": "characters"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_going_on_with_other_settings_is_refused(shapes: Path, unbroken: Path, other: dict[str, Any]) -> None:
    before = (unbroken / pretrained.CHECKPOINT).read_bytes()
    with pytest.raises(SystemExit, match="made with other settings"):
        pretrain.main(PretrainConfig(**{"data": shapes, "out": unbroken, **TINY, "epochs": 2, **other}))
    assert (unbroken / pretrained.CHECKPOINT).read_bytes() == before


def test_data_may_have_moved_and_the_clock_may_be_set_anew(shapes: Path, unbroken: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(shapes)
    before = whole(unbroken)
    pretrain.main(PretrainConfig(data=moved, out=unbroken, **TINY, epochs=2, minutes=5, checkpoint_s=1))
    assert differing(before, whole(unbroken)) == []


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"shape": "resnet1000"}, "Known shapes: resnet18"),
        ({"objectives": "contrastive=1,magic=2"}, "its objectives: contrastive, supervised"),
        ({"weighting": "learned", "objectives": "contrastive=1,rotation=1"}, "need 300 images or more"),
        ({"mix": True, "objectives": "supervised=1,contrastive=1"}, "--mix is for supervised and projected"),
        ({"mix": True, "objectives": "rotation=1"}, "--mix is for supervised and projected"),
        ({"small": 48}, "--small must not be larger than --size"),
        ({"lr": 1e30, "objectives": "supervised=1"}, "not finite at step .* Lower --lr"),
    ],
    ids=["shape", "objective", "images", "mix", "mix of nothing", "small", "lr"],
)
def test_what_cannot_be_trained_ends_with_a_sentence(
    shapes: Path, tmp_path: Path, other: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((SystemExit, DataError), match=sentence):
        pretrain.main(PretrainConfig(**{"data": shapes, "out": tmp_path, **TINY, "epochs": 2, **other}))
    assert not (tmp_path / pretrained.CHECKPOINT).exists()


def test_what_is_written_down_along_the_way(shapes: Path, tmp_path: Path) -> None:
    pretrain.main(PretrainConfig(data=shapes, out=tmp_path, **TINY, epochs=5))
    lines = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert all(math.isfinite(line["losses"]["contrastive"]) and line["images_per_s"] > 0 for line in lines)
    assert checkpoint.load(tmp_path / pretrained.CHECKPOINT)["config"]["seed"] == 0


@pytest.mark.slow
def test_runs_killed_three_times_end_bit_for_bit_like_unbroken_ones(
    shapes: Path, tmp_path: Path, command: Callable[..., Command]
) -> None:
    """All at a time, each killed wherever it is when it has come far enough."""
    runs = {
        "contrastive": ["--objectives", "contrastive=1", "--rotations", "--epochs", "3"],
        "supervised": ["--objectives", "supervised=1", "--no-rotations", "--epochs", "12"],
        "mixed": ["--objectives", MIX, "--weighting", "uncertainty", "--epochs", "12"],
    }

    def arguments(name: str, out: Path) -> list[str]:
        given = [f"--{flag}={value}" for flag, value in {"data": shapes, "out": out, "checkpoint-s": 0, **TINY}.items()]
        return [*given, *runs[name]]

    def step(name: str) -> int:
        return int(tree(tmp_path / name / pretrained.CHECKPOINT).get("step", 0))

    reached = [dict.fromkeys(runs, 0)]
    for target in (1, 10, 30):
        enough = {name: max(target, before + 1) for name, before in reached[-1].items()}  # one may have come far before
        killed(
            {
                command("pretrain", *arguments(name, tmp_path / name)): lambda name=name, enough=enough: (
                    step(name) >= enough[name]
                )
                for name in runs
            }
        )
        reached.append({name: step(name) for name in runs})
    for steps in zip(*(each.values() for each in reached), [108] * len(runs), strict=True):
        assert all(before < after for before, after in itertools.pairwise(steps))
    for name in runs:
        pretrain.main(parse(PretrainConfig, arguments(name, tmp_path / name), prog="x"))
        assert step(name) == 108
        pretrain.main(parse(PretrainConfig, arguments(name, tmp_path / f"unbroken {name}"), prog="x"))
        assert differing(whole(tmp_path / f"unbroken {name}"), whole(tmp_path / name)) == []


def copied(shapes: Path, copy: Path) -> tuple[Path, list[Path]]:
    """The data under another path, and its folders of the training classes."""
    shutil.copytree(shapes, copy)
    names = splits.split_classes(copy, [path.name for path in copy.iterdir()])["train"]
    return copy, [copy / name for name in names]


def test_going_on_with_other_data_is_refused(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = PretrainConfig(data=shapes, out=out, **TINY, epochs=2)
    pretrain.main(given.model_copy(update={"minutes": 1e-9}))
    fewer, classes = copied(shapes, tmp_path / "fewer")
    next(classes[0].iterdir()).unlink()
    other = given.model_copy(update={"data": fewer})
    with pytest.raises(DataError, match="72 examples of 6 classes, where --data now has 71 of 6"):
        pretrain.main(other)
    renamed, classes = copied(shapes, tmp_path / "renamed")
    classes[0].rename(classes[0].with_name("zebra"))
    (renamed / "splits.json").write_text(json.dumps({"train": ["zebra", *(path.name for path in classes[1:])]}))
    with pytest.raises(DataError, match="72 of 6, or others"):
        pretrain.main(given.model_copy(update={"data": renamed}))
    state = checkpoint.load(out / pretrained.CHECKPOINT)
    del state["trained_on"]
    checkpoint.save(out / pretrained.CHECKPOINT, state)
    pretrain.main(other.model_copy(update={"minutes": 1e-9}))  # an older one does not tell


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_it_to_end_finds_a_checkpoint_of_the_last_step(
    number: signal.Signals,
    shapes: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["pretrain", *(f"--{name}={value}" for name, value in {"data": shapes, "out": tmp_path, **TINY}.items())]
    take_step = vision.Run.take_step

    def asked(run: vision.Run) -> Any:
        if run.step == 4:
            signal.raise_signal(number)
        return take_step(run)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(vision.Run, "take_step", asked)
        with pytest.raises(SystemExit) as ended:
            commands.main([*given, "--epochs=2"])
    assert ended.value.code == 130
    assert signal.getsignal(number) == before
    assert "Stopped at step 5 of 18; run the same command to go on." in capsys.readouterr().err
    assert checkpoint.load(tmp_path / pretrained.CHECKPOINT)["step"] == 5
    assert commands.main([*given, "--epochs=2"]) == 0
    assert differing(whole(unbroken), whole(tmp_path)) == []


def test_steps_after_the_checkpoint_stand_in_the_log_once(shapes: Path, tmp_path: Path) -> None:
    given = PretrainConfig(data=shapes, out=tmp_path, **TINY, epochs=3)
    pretrain.main(given.model_copy(update={"minutes": 1e-9}))
    (tmp_path / "pretrain.jsonl").write_text('{"step": 1}\n{"step": 20}\n{"st')  # a kill at step 21, none saved
    pretrain.main(given)
    lines = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 20]
    assert "losses" in lines[1]


def test_too_few_classes_are_said_before_hours_of_training(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    five = synthetic.write(tmp_path / "five", classes=5, images=4)
    with pytest.raises(DataError, match=r"one class in its split 'val', .* metatrain and export take two"):
        pretrain.main(config(data=five, out=tmp_path))
    names = sorted(path.name for path in five.iterdir())
    (five / "splits.json").write_text(json.dumps({"train": names[:1], "val": names[1:3]}))
    with pytest.raises(DataError, match=f"one class to learn from, '{names[0]}': supervised"):
        pretrain.main(config(data=five, out=tmp_path, objectives="supervised=1"))
    assert "has no classes in its split 'test', which tasks of evaluate will need" in capsys.readouterr().err


def test_folders_that_deal_images_are_learned_from_where_each_class_is_named_once(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path / "eight", classes=8, images=4)
    names = sorted(path.name for path in folder.iterdir())
    for part in ("train", "test"):
        shutil.copytree(folder, tmp_path / "dealt" / part)
    shutil.copytree(folder / names[0], tmp_path / "dealt" / "train" / "unnamed")
    shutil.copytree(folder / names[0], tmp_path / "dealt" / "test" / "unnamed")
    learned = [f"train/{name}" for name in names]
    parts = {"train": learned[:4], "val": learned[4:6], "test": [f"test/{name}" for name in names[6:]]}
    (tmp_path / "dealt" / "splits.json").write_text(json.dumps(parts))
    assert pretrain.main(config(data=tmp_path / "dealt", out=tmp_path / "run")).exists()


def test_classes_numbered_anew_in_each_split_are_learned_from_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = synthetic.write(tmp_path / "six", classes=6, images=4)
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for place, path in enumerate(sorted(folder.iterdir())):
        split = list(parts)[place // 2]
        parts[split].append(f"{split}/{place % 2}")
        shutil.copytree(path, tmp_path / "dealt" / split / str(place % 2))
    (tmp_path / "dealt" / "splits.json").write_text(json.dumps(parts))
    assert pretrain.main(config(data=tmp_path / "dealt", out=tmp_path / "run")).exists()
    said = "As splits.json names both, different classes are test/0 and train/0, test/1 and train/1, train/0 and val/0"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("alike", [False, True])
def test_a_class_of_one_thing_is_said_before_hours_of_training(
    split: str, alike: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = synthetic.write(tmp_path / "ten", classes=10, images=3)
    parts: dict[str, Any] = splits.split_classes(folder, [path.name for path in folder.iterdir()])
    lone, learned = parts[split][0], parts["train"][0]
    images = sorted((folder / lone).iterdir())
    if alike:
        parts["piece"] = {f"{lone}/{image.name}": "one thing" for image in images}
        (folder / "splits.json").write_text(json.dumps(parts))
    else:
        for image in images[1:]:
            image.unlink()
    for image in sorted((folder / learned).iterdir())[1:]:
        image.unlink()
    with pytest.raises(DataError, match=f"one example of {lone} in its split '{split}'; .* of different things"):
        pretrain.main(config(data=folder, out=tmp_path / "run"))
    assert f"Of {learned} there is one example: metatrain will need --tasks" in capsys.readouterr().err


def test_a_start_of_another_shape_is_refused(shapes: Path, unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is of another --shape than tiny-grey"):
        pretrain.main(config(data=shapes, out=tmp_path, shape="tiny-grey", augment="characters", start=unbroken))


@pytest.mark.parametrize("augment", ["photos", "strong", "snapshots"])
def test_augmentations_of_colours_are_refused_where_the_network_sees_grey(
    augment: str, shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"--augment {augment} is for colour, .* grey: --augment characters fits"):
        pretrain.main(config(data=shapes, out=tmp_path, shape="tiny-grey", augment=augment))


@pytest.mark.parametrize("content", [b"", b"PK of something else" * 9, None], ids=["empty", "foreign", "truncated"])
def test_a_checkpoint_that_is_none_is_named(unbroken: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / pretrained.CHECKPOINT
    path.write_bytes((unbroken / pretrained.CHECKPOINT).read_bytes()[:3000] if content is None else content)
    with pytest.raises(DataError, match=f"{path} is no checkpoint of this program, or a damaged one"):
        pretrained.load_extractor(tmp_path)


def test_safetensors_of_somebody_else_are_no_checkpoint(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / pretrained.CHECKPOINT)
    with pytest.raises(DataError, match="is no checkpoint of this program"):
        pretrained.load_extractor(tmp_path)
    checkpoint.save(tmp_path / pretrained.CHECKPOINT, {"extractor": {}, "precision": "auto", "config": {"magic": 1}})
    with pytest.raises(DataError, match="is no pretraining, or one of another version"):
        pretrained.load_extractor(tmp_path)


def test_a_second_run_into_one_folder_is_refused(shapes: Path, tmp_path: Path) -> None:
    with checkpoint.alone(tmp_path), pytest.raises(DataError, match="Another run is at work in"):
        pretrain.main(PretrainConfig(data=shapes, out=tmp_path, **TINY))
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LOCK]
