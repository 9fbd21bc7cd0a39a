from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs, noise

pytestmark = pytest.mark.torch
needs("torch")

import torch

from models.images import ImageDecoder
from tests.training.runs import MIX, a_run, config, differing, tensors
from training import checkpoint, data, evaluate, pretrained, vision

# Every combination that a pretraining may be of, on images of nothing.
KINDS = [
    {"objectives": objectives, "rotations": rotations, "optimizer": optimizer}
    for objectives, rotations, optimizer in itertools.product(
        ("contrastive=1", "supervised=1,rotation=0.5", "contrastive=1,supervised=0.5"), (False, True), ("sgd", "adamw")
    )
]
# Those with state of their own: a queue and a slow copy, decoders, learned weights.
KINDS += [{"objectives": MIX, "weighting": weighting, "optimizer": "adamw"} for weighting in ("fixed", "uncertainty")]
KINDS += [
    {"objectives": MIX, "weighting": "learned", "weighting_steps": 2, "optimizer": "sgd"},
    {"objectives": "rotation=1,jigsaw=1"},  # no view is read as it is
    {"objectives": "supervised=1,projected=1,rotation=0.5", "mix": True},
]


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
    run = vision.Run(config(objectives=f"{name}=1", size=32, epochs=10, lr=0.1, batch=24), images)
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


def test_where_none_is_asked_for_a_cpu_computes_in_float32() -> None:
    left, asked = a_run(precision="auto"), a_run(precision="float32")
    assert left.precision == "float32"
    assert left.advance() == asked.advance()


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
    features = pretrained.embed(extractor, images.pixels, run.device, batch=5)
    assert features.shape == (len(images), 8)
    np.testing.assert_allclose(features, pretrained.embed(extractor, images.pixels, run.device), atol=1e-5)


def test_a_run_may_start_from_the_weights_of_another(shapes: Path, unbroken: Path) -> None:
    started = vision.Run(config(start=unbroken), noise(3, 7))
    source, _ = pretrained.load_extractor(unbroken)
    assert not differing(tensors(dict(source.backbone.state_dict())), tensors(dict(started.backbone.state_dict())))
    assert differing(tensors(a_run().state()["network"]), tensors(started.state()["network"]))
