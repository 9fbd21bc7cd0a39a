"""What fits a network to a support set: from scratch, from pretrained weights, by scale and shift; and raw pixels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.conftest import needs, noise

pytestmark = pytest.mark.torch
needs("torch")

import dataclasses

import torch
from safetensors.numpy import save_file

from models.artifact import ARRAYS, WEIGHTS, Artifact, Manifest
from models.calibration import Temperature
from models.extractor_torch import TorchExtractor
from models.resnet import SHAPES, ImageExtractor, ResNet, fold
from training.baselines import Given, finetune, fitting, head, pixels, scale_shift, scratch
from training.folders import DataError

SIZE = 16
SHAPE = SHAPES["tiny"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A folded network with random weights and normalisation that matters, and prototypes over it; no graph."""
    folder = tmp_path_factory.mktemp("artifact")
    torch.manual_seed(0)
    backbone = ResNet(SHAPE)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    network = ImageExtractor(fold(backbone))
    save_file({name: value.half().numpy() for name, value in network.state_dict().items()}, folder / WEIGHTS)
    save_file({"prototype/log_scale": np.array(np.log(10.0), np.float32)}, folder / ARRAYS)
    manifest = Manifest(
        name="tiny",
        description="",
        dim=SHAPE.dim,
        shape=dataclasses.asdict(SHAPE),
        input={"kind": "image", "height": SIZE, "width": SIZE, "channels": 3},
        methods={"prototype": Temperature()},
        default="prototype",
        training={"labels_used": True},
        accuracy=(),
        int8=None,
        files={},
    )
    return Artifact(folder, manifest, "sha256:tiny")


def given(artifact: Artifact | None) -> Given:
    return Given(2, 4, SIZE, 3, seed=0, artifact=artifact)


def colours(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dark and bright images with noise, [2 * count, SIZE, SIZE, 3], and which is which."""
    images = noise(2, count, size=SIZE, seed=seed).pixels // 2
    labels = np.repeat([0, 1], count)
    images[labels == 1] += 127
    return images, labels


def test_scratch_learns_the_examples_from_nothing(artifact: Artifact) -> None:
    support, labels = colours(4)
    questions, answers = colours(10, seed=1)
    method = scratch.Scratch(scratch.Settings(steps=40, lr=1e-2), given(artifact))
    found = method.adapt(support, labels, 2)["inductive"](questions)
    assert np.mean(found == answers) > 0.8
    untrained = scratch.Scratch(scratch.Settings(steps=0), given(artifact)).adapt(support, labels, 2)
    assert np.mean(untrained["inductive"](questions) == answers) < 0.8
    assert method.labels == "none"
    assert np.array_equal(method.adapt(support, labels, 2)["inductive"](questions), found)


@pytest.mark.parametrize("module", [finetune, scale_shift])
def test_without_a_step_tuning_is_what_is_served(
    module: object, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "load_extractor", lambda artifact: TorchExtractor(artifact, device="cpu"))
    served = head.Served(head.Settings(), given(artifact))
    kind = finetune.Finetune if module is finetune else scale_shift.Tuned
    settings = finetune.Settings if module is finetune else scale_shift.Settings
    tuned = kind(settings(steps=0), given(artifact))
    assert tuned.labels == served.labels == "training classes"
    images = noise(2, 4, size=SIZE)
    questions = noise(2, 30, size=SIZE, seed=1).pixels
    one, two = (m.adapt(images.pixels, images.labels, 2)["inductive"](questions) for m in (served, tuned))
    assert np.array_equal(one, two)
    assert 0 < one.sum() < 60


class Noted:
    """Keeps the classifiers that a method prepares, to look at them when it is done."""

    def __init__(self, method: finetune.Finetune):
        self.made: list[fitting.Classifier] = []
        self.plain = method.prepared
        method.prepared = self  # type: ignore[method-assign, assignment]

    def __call__(self, *arguments: np.ndarray | int) -> fitting.Classifier:
        self.made.append(self.plain(*arguments))  # type: ignore[arg-type]
        return self.made[-1]


@pytest.mark.parametrize("kind", [finetune.Finetune, scale_shift.Tuned])
def test_tuning_lowers_the_loss_and_leaves_the_artifact_as_it_is(
    kind: type[finetune.Finetune], artifact: Artifact
) -> None:
    support, labels = colours(4)
    method = kind(finetune.Settings(steps=30, lr=1e-2), given(artifact))
    before = {name: value.clone() for name, value in method.extractor.state_dict().items()}
    start = method.prepared(support, labels, 2)
    noted = Noted(method)
    method.adapt(support, labels, 2)

    def loss(classifier: fitting.Classifier) -> float:
        with torch.no_grad():
            logits = classifier(fitting.scaled(support))
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()

    lower, higher = loss(noted.made[0]), loss(start)
    assert lower < 0.9 * higher
    assert all(torch.equal(value, before[name]) for name, value in method.extractor.state_dict().items())


def test_scale_and_shift_start_as_nothing_and_are_two_numbers_a_channel(artifact: Artifact) -> None:
    images = torch.from_numpy(noise(1, 6, size=SIZE).pixels)
    network = fitting.images_network(artifact)
    with torch.no_grad():
        before = network(images)
        parameters = list(scale_shift.insert(network.backbone))
        torch.testing.assert_close(network(images), before)
        # One behind each convolution: the stem, two a block, and the shortcut of the second stage.
        assert sum(value.numel() for value in parameters) == 2 * (4 + 2 * 4 + 2 * 8 + 8)
        for number, parameter in enumerate(parameters):
            kept = parameter.clone()
            parameter += 0.5
            assert (network(images) - before).abs().max() > 1e-5, number
            parameter.copy_(kept)


def test_scale_and_shift_train_nothing_else(artifact: Artifact) -> None:
    support, labels = noise(2, 4, size=SIZE).pixels, np.repeat([0, 1], 4)
    method = scale_shift.Tuned(scale_shift.Settings(steps=3), given(artifact))
    noted = Noted(method)
    method.adapt(support, labels, 2)
    found = dict(noted.made[0].extractor.named_parameters())
    for name, value in fitting.images_network(artifact).named_parameters():
        assert torch.equal(found[name], value), name
    moved = [name for name, value in found.items() if name.endswith("scale") and bool((value != 1).any())]
    assert len(moved) == 6


@pytest.mark.parametrize("module", [scratch.Scratch, finetune.Finetune, scale_shift.Tuned, head.Served])
def test_what_needs_an_artifact_says_so(module: type) -> None:
    with pytest.raises(DataError, match="say --artifact"):
        module(finetune.Settings(), given(None))


def test_a_learner_that_the_artifact_does_not_have_is_named(artifact: Artifact) -> None:
    with pytest.raises(DataError, match="no learner 'magic', only prototype"):
        head.Served(head.Settings(learner="magic"), given(artifact))


def test_pixels_are_nearest_to_the_mean_of_their_class() -> None:
    support, labels = colours(4)
    questions, answers = colours(10, seed=1)
    method = pixels.Pixels(pixels.Settings(), given(None))
    order = np.random.default_rng(0).permutation(len(labels))
    assert np.array_equal(method.adapt(support[order], labels[order], 2)["inductive"](questions), answers)
    means = np.stack([support[labels == label].mean(axis=0) for label in (0, 1)])
    mixed = noise(2, 30, size=SIZE, seed=2).pixels
    nearest = np.square(mixed[:, None].astype(float) - means).sum(axis=(2, 3, 4)).argmin(axis=1)
    assert np.array_equal(method.adapt(support, labels, 2)["inductive"](mixed), nearest)
