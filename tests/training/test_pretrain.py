from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import Command, killed, needs, noise, tree

pytestmark = pytest.mark.torch
needs("torch")

import torch
from safetensors.torch import load_file

from models.images import ImageDecoder
from models.resnet import SHAPES, ResNet
from training import checkpoint, data, evaluate, pretrain
from training.config import PretrainConfig, parse

# Every combination that a pretraining may be of, on images of nothing.
KINDS = [
    {"objectives": objectives, "rotations": rotations, "optimizer": optimizer}
    for objectives, rotations, optimizer in itertools.product(
        ("contrastive=1", "supervised=1,rotation=0.5", "contrastive=1,supervised=0.5"), (False, True), ("sgd", "adamw")
    )
]
# Those with state of their own: a queue and a slow copy, decoders, learned weights.
MIX = "momentum=1,clusters=1,reconstruction=1,rotation=0.5,jigsaw=0.5"
KINDS += [{"objectives": MIX, "weighting": weighting, "optimizer": "adamw"} for weighting in ("fixed", "uncertainty")]
KINDS += [
    {"objectives": MIX, "weighting": "learned", "weighting_steps": 2, "optimizer": "sgd"},
    {"objectives": "rotation=1,jigsaw=1"},  # no view is read as it is
    {"objectives": "supervised=1,projected=1,rotation=0.5", "mix": True},
]
# On drawn shapes: 72 images.
TINY = {"shape": "tiny", "size": 32, "batch": 8, "lr": 0.05, "device": "cpu", "precision": "float32"}


def config(**given: Any) -> PretrainConfig:
    defaults = {"data": Path("d"), "out": Path("o"), **TINY, "size": 16, "epochs": 3}
    return PretrainConfig(**{**defaults, **given})


def a_run(**given: Any) -> pretrain.Run:
    channels = SHAPES[given.get("shape", "tiny")].channels
    images = 110 if given.get("weighting") == "learned" else 7  # a tenth is held out, and makes clusters
    return pretrain.Run(config(**given), noise(3, images, channels=channels))


def tensors(state: Any) -> dict[str, torch.Tensor]:
    """Every tensor in a state, by its path."""
    if isinstance(state, torch.Tensor):
        return {"": state.detach().clone()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {f"/{key}{path}": value for key, item in items for path, value in tensors(item).items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same, bit for bit."""
    names = sorted(first.keys() | second.keys())
    return [
        name
        for name in names
        if name not in first
        or name not in second
        or first[name].dtype != second[name].dtype
        or not torch.equal(first[name], second[name])
    ]


def test_the_random_numbers_of_a_step_are_its_own() -> None:
    def numbers(seed: int, step: int) -> tuple[float, ...]:
        return tuple(torch.rand(3, generator=pretrain.generator(seed, step)).tolist())

    assert numbers(0, 5) == numbers(0, 5)
    assert len({numbers(seed, step) for seed in range(4) for step in range(-20, 20)}) == 4 * 40


def test_the_learning_rate_rises_evenly_and_then_falls_to_nothing() -> None:
    asked = config(lr=0.4, warmup=0.2)
    rates = [pretrain.learning_rate(step, 100, asked) for step in range(100)]
    np.testing.assert_allclose(rates[:20], 0.4 * np.arange(1, 21) / 20)
    assert rates[20] == max(rates) == 0.4
    assert all(before > after for before, after in itertools.pairwise(rates[20:]))
    assert rates[60] == pytest.approx(0.2)
    assert 0 < rates[-1] < 0.001
    assert pretrain.learning_rate(0, 1, config(lr=0.4, warmup=0)) == 0.4


@pytest.mark.parametrize("rotations", [False, True])
def test_an_epoch_shows_each_image_once_with_its_label(rotations: bool) -> None:
    run = a_run(rotations=rotations, batch=7)
    images = noise(3, 7)
    images = evaluate.turned(images) if rotations else images
    expected = {image.tobytes(): int(label) for image, label in zip(images.pixels, images.labels, strict=True)}
    epochs = []
    for epoch in range(2):
        seen: list[tuple[bytes, int]] = []
        for at in range(run.steps_per_epoch):
            pixels, labels = run.batch(epoch * run.steps_per_epoch + at)
            whole = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
            seen += [(image.tobytes(), int(label)) for image, label in zip(whole, labels, strict=True)]
        assert len(seen) == len(expected)
        assert dict(seen) == expected
        epochs.append(seen)
    assert epochs[0] != epochs[1]  # in another order


def test_a_batch_is_the_same_however_one_comes_to_its_step() -> None:
    run, other = a_run(rotations=True), a_run(rotations=True)
    for step in range(12):
        run.batch(step)
    assert all(torch.equal(a, b) for a, b in zip(run.batch(25), other.batch(25), strict=True))


def test_images_are_small_in_the_first_part_only() -> None:
    run = a_run(size=32, small=16, small_share=0.5, epochs=4)
    assert run.steps == 8
    assert [run.size_at(step) for step in range(8)] == [16] * 4 + [32] * 4
    assert {a_run(size=32).size_at(step) for step in range(6)} == {32}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_run_that_goes_on_from_a_checkpoint_is_the_unbroken_run(kind: dict[str, Any], tmp_path: Path) -> None:
    unbroken = a_run(**kind)
    losses = [unbroken.advance() for _ in range(5)]
    broken = a_run(**kind)
    for part in (2, 2, 1):
        for _ in range(part):
            found = broken.advance()
        assert found == losses[broken.step - 1]
        checkpoint.save(tmp_path / "state.safetensors", broken.state())
        broken = a_run(**kind)
        broken.restore(checkpoint.load(tmp_path / "state.safetensors"))
    assert broken.step == 5
    assert differing(tensors(unbroken.state()), tensors(broken.state())) == []
    fresh = tensors(a_run(**kind).state())
    moved = differing(tensors(unbroken.state()), fresh)
    assert all(any(name.startswith(f"/network/{part}") for name in moved) for part in ("backbone", "heads"))
    learns = kind.get("weighting", "fixed") != "fixed"
    assert any(name.startswith("/weighting") for name in moved) == learns
    assert unbroken.weighting.weights() == broken.weighting.weights()


def test_labels_of_mixed_images_are_those_of_the_training_classes_in_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(objectives="supervised=1,rotation=1", mix=True)
    told: list[torch.Tensor] = []
    head = run.heads["supervised"]
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda views, labels: told.append(labels) or forward(views, labels))
    for _ in range(12):
        run.advance()
    assert {tuple(labels.shape) for labels in told} == {(run.config.batch, 3)}
    assert all(torch.allclose(labels.sum(dim=1), torch.ones(len(labels))) for labels in told)
    purest = [float(labels.max(dim=1).values.min()) for labels in told]
    assert min(purest) < 1 == max(purest)


def test_details_are_small_cut_outs_beside_the_views() -> None:
    run = a_run(objectives="momentum=1,rotation=1", details=3, detail_size=16, size=32)
    shown: list[tuple[int, ...]] = []
    maps = run.backbone.maps
    run.backbone.maps = lambda x: shown.append(tuple(x.shape)) or maps(x)  # type: ignore[method-assign,func-returns-value]
    run.advance()
    batch = run.config.batch
    sides = [(len_ // batch, side) for len_, _, side, _ in shown if side == 16]
    assert sides == [(3, 16)]
    assert {side for _, _, side, _ in shown} == {16, 32}


@pytest.mark.parametrize("objectives", ["contrastive=1", "supervised=1"])
def test_details_without_the_objective_that_asks_about_them_are_refused(objectives: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="momentum"):
        pretrain.main(config(data=tmp_path, out=tmp_path, objectives=objectives, details=2))


def test_the_seed_decides_weights_order_and_views() -> None:
    runs = [a_run(seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.advance()
    first, same, other = (tensors(run.state()) for run in runs)
    assert differing(first, same) == []
    assert "/network/backbone.conv.weight" in differing(first, other)


def test_every_step_and_both_views_of_it_draw_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def noted(images: torch.Tensor, size: int, rng: torch.Generator) -> torch.Tensor:
        drawn.append(float(torch.rand((), generator=rng)))
        return images

    runs = [a_run(seed=seed) for seed in (0, 1)]
    for run in runs:
        monkeypatch.setattr(run, "augment", noted)
        for _ in range(3):
            run.advance()
    assert len(drawn) == len(set(drawn)) == 12


@pytest.mark.parametrize(
    ("name", "share"), [("contrastive", 0.9), ("supervised", 0.9), ("reconstruction", 0.9), ("clusters", 0.96)]
)
def test_training_lowers_the_loss(name: str, share: float, shapes: Path) -> None:
    images = data.load(shapes, "train", ImageDecoder(32, 32, 3))
    run = pretrain.Run(config(objectives=f"{name}=1", size=32, epochs=10, lr=0.1, batch=24), images)
    losses = [run.advance()[name] for _ in range(run.steps)]
    assert np.mean(losses[-5:]) < share * np.mean(losses[:5])


def test_images_held_out_for_the_weights_are_in_no_batch() -> None:
    run = a_run(weighting="learned", objectives="contrastive=1,rotation=1", batch=9)
    shown: set[bytes] = set()
    for step in range(2 * run.steps_per_epoch):
        images, _ = run.batch(step)
        shown |= {image.numpy().tobytes() for image in (images * 255).round().to(torch.uint8)}
    out = {image.numpy().tobytes() for image in run.held_out.permute(0, 3, 1, 2)}
    assert len(out) == 33
    assert len(shown) == 297
    assert not out & shown


def test_looking_at_held_out_tasks_moves_nothing_but_the_weights() -> None:
    """One step with a look and one without end at the same network, bit for bit."""
    given = {"weighting": "learned", "objectives": "momentum=1,clusters=1,rotation=1"}
    looked, did_not = a_run(**given, weighting_steps=1), a_run(**given, weighting_steps=9)
    for run in (looked, did_not):
        run.advance()
    assert differing(tensors(looked.state()["network"]), tensors(did_not.state()["network"])) == []
    assert looked.weighting.weights() != did_not.weighting.weights()


def test_weight_decay_spares_offsets_and_normalisation() -> None:
    run = a_run(weight_decay=0.1)
    decayed, plain = run.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(weight.ndim > 1 for weight in decayed["params"])
    assert all(weight.ndim == 1 for weight in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(run.network.parameters()))


@pytest.mark.parametrize(
    "given", [{}, {"weighting": "learned", "weighting_steps": 1, "objectives": "momentum=1,rotation=1"}], ids=str
)
def test_timing_the_precisions_leaves_no_trace(given: dict[str, Any]) -> None:
    timed, fresh = a_run(**given), a_run(**given)
    assert timed.time_precision() in ("float32", "bfloat16")
    timed.precision = "float32"
    assert timed.step == 0
    assert differing(tensors(timed.state()), tensors(fresh.state())) == []
    assert timed.advance() == fresh.advance()


@pytest.mark.parametrize("rotations", [False, True])
def test_the_extractor_is_centred_on_its_training_images(rotations: bool) -> None:
    run = a_run(rotations=rotations, shape="tiny-grey", augment="characters")
    run.advance()
    images = noise(3, 7, channels=1)
    images = evaluate.turned(images) if rotations else images
    extractor = run.extractor()
    with torch.inference_mode():
        pooled = extractor.backbone(torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(extractor.centre, torch.sqrt(pooled + 1e-6).mean(dim=0), rtol=1e-4, atol=1e-5)
    features = pretrain.embed(extractor, images.pixels, run.device, batch=5)
    assert features.shape == (len(images), 8)
    np.testing.assert_allclose(features, pretrain.embed(extractor, images.pixels, run.device), atol=1e-5)


def whole(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the checkpoint of a finished pretraining, as it lies in the file."""
    assert "extractor" in checkpoint.load(out / pretrain.CHECKPOINT)
    return load_file(out / pretrain.CHECKPOINT)


@pytest.fixture(scope="module")
def unbroken(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    pretrain.main(PretrainConfig(data=shapes, out=out, **TINY, epochs=2))
    return out


def test_a_run_stopped_by_the_clock_goes_on_to_the_same_end(
    shapes: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"data": shapes, "out": tmp_path, **TINY, "epochs": 2}
    steps = []
    for _ in range(3):
        pretrain.main(PretrainConfig(**given, minutes=1e-9))
        state = checkpoint.load(tmp_path / pretrain.CHECKPOINT)
        assert "extractor" not in state
        steps.append(state["step"])
        assert f"Stopped at step {state['step']} of 18" in capsys.readouterr().err
    assert steps == [1, 2, 3]
    with pytest.raises(data.DataError, match="not finished"):
        pretrain.load_extractor(tmp_path)
    pretrain.main(PretrainConfig(**given))
    assert differing(whole(unbroken), whole(tmp_path)) == []


def test_without_epochs_the_weights_are_those_of_the_start_and_see_at_another_size(
    shapes: Path, unbroken: Path, tmp_path: Path
) -> None:
    given = {"data": shapes, "size": 24, "epochs": 0, "out": tmp_path / "larger"}
    with pytest.raises(SystemExit, match="--start"):
        pretrain.main(config(**given))
    pretrain.main(config(**given, start=unbroken))
    (source, before), (larger, after) = pretrain.load_extractor(unbroken), pretrain.load_extractor(given["out"])
    assert before.size != after.size == 24
    assert not differing(tensors(dict(source.backbone.state_dict())), tensors(dict(larger.backbone.state_dict())))
    assert not torch.equal(source.get_buffer("centre"), larger.get_buffer("centre"))


def test_a_run_may_start_from_the_weights_of_another(shapes: Path, unbroken: Path) -> None:
    started = pretrain.Run(config(start=unbroken), noise(3, 7))
    source, _ = pretrain.load_extractor(unbroken)
    assert not differing(tensors(dict(source.backbone.state_dict())), tensors(dict(started.backbone.state_dict())))
    assert differing(tensors(a_run().state()["network"]), tensors(started.state()["network"]))


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
        {"shape": "tiny-grey"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_going_on_with_other_settings_is_refused(shapes: Path, unbroken: Path, other: dict[str, Any]) -> None:
    before = (unbroken / pretrain.CHECKPOINT).read_bytes()
    with pytest.raises(SystemExit, match="made with other settings"):
        pretrain.main(PretrainConfig(**{"data": shapes, "out": unbroken, **TINY, "epochs": 2, **other}))
    assert (unbroken / pretrain.CHECKPOINT).read_bytes() == before


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
    with pytest.raises((SystemExit, data.DataError), match=sentence):
        pretrain.main(PretrainConfig(**{"data": shapes, "out": tmp_path, **TINY, "epochs": 2, **other}))
    assert not (tmp_path / pretrain.CHECKPOINT).exists()


def test_the_extractor_of_a_finished_run_is_loaded_with_its_settings(unbroken: Path) -> None:
    extractor, settings = pretrain.load_extractor(unbroken)
    assert settings.size == 32
    assert not extractor.training
    pixels = noise(2, 3, size=32).pixels
    features = pretrain.embed(extractor, pixels, torch.device("cpu"))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-3)
    state = checkpoint.load(unbroken / pretrain.CHECKPOINT)
    backbone = ResNet(SHAPES["tiny"])
    backbone.load_state_dict({n.removeprefix("backbone."): v for n, v in state["network"].items() if "backbone" in n})
    with torch.inference_mode():
        pooled = backbone.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
        expected = extractor.normalise(pooled).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_missing_checkpoint_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=f"run `python -m training pretrain --out {tmp_path}` first"):
        pretrain.load_extractor(tmp_path)


def test_what_is_written_down_along_the_way(shapes: Path, tmp_path: Path) -> None:
    pretrain.main(PretrainConfig(data=shapes, out=tmp_path, **TINY, epochs=5))
    lines = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert all(math.isfinite(line["losses"]["contrastive"]) and line["images_per_s"] > 0 for line in lines)
    assert checkpoint.load(tmp_path / pretrain.CHECKPOINT)["config"]["seed"] == 0


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
        return int(tree(tmp_path / name / pretrain.CHECKPOINT).get("step", 0))

    reached = []
    for target in (1, 10, 30):
        killed(
            {
                command("pretrain", *arguments(name, tmp_path / name)): lambda name=name, target=target: (
                    step(name) >= target
                )
                for name in runs
            }
        )
        reached.append([step(name) for name in runs])
    for steps in zip([0] * len(runs), *reached, [108] * len(runs), strict=True):
        assert all(before < after for before, after in itertools.pairwise(steps))
    for name in runs:
        pretrain.main(parse(PretrainConfig, arguments(name, tmp_path / name), prog="x"))
        assert step(name) == 108
        pretrain.main(parse(PretrainConfig, arguments(name, tmp_path / f"unbroken {name}"), prog="x"))
        assert differing(whole(tmp_path / f"unbroken {name}"), whole(tmp_path / name)) == []
