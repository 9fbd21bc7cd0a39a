from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch", "onnx", "onnxruntime", "onnxscript")

import onnx
import torch
from safetensors.numpy import load_file, save_file

from models.arrays import softmax
from models.artifact import ARRAYS, GRAPH, INT8_GRAPH, MANIFEST, PROBE, WEIGHTS, Artifact
from models.calibration import Rejection, Temperature, divisor, energy
from models.errors import ArtifactInvalid
from models.extractor import load_extractor
from models.extractor_onnx import OnnxExtractor
from models.extractor_torch import TorchExtractor
from models.images import ImageDecoder
from models.learners import LEARNERS, Learner
from models.learners.prototype import Prototype
from models.learners.ridge import Ridge
from models.report import held_out, without_own
from models.resnet import SHAPES, ImageExtractor, ResNet
from training import calibrate, data, evaluate, export, graphs, metatrain, pretrain, pretrained, probe, raw, splits
from training.config import ExportConfig, MetatrainConfig, PretrainConfig
from training.episodes import Pool, frozen
from training.folders import DataError

FILES = (WEIGHTS, GRAPH, INT8_GRAPH, ARRAYS, PROBE)


def pixels(n: int, *, size: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def lived_in(shape: str) -> ImageExtractor:
    """A network whose batch normalisation has statistics of its own."""
    torch.manual_seed(0)
    backbone = ResNet(SHAPES[shape])
    backbone.train()
    with torch.no_grad():
        for _ in range(5):
            backbone(torch.rand(8, SHAPES[shape].channels, 16, 16))
    centre = 0.1 * torch.rand(SHAPES[shape].dim)
    return ImageExtractor(backbone, centre).eval()


def test_rounding_folds_and_halves_once_and_hardly_moves_the_features() -> None:
    images = torch.from_numpy(pixels(4))
    with torch.inference_mode():
        before = lived_in("tiny")(images)
        extractor = graphs.rounded(lived_in("tiny"))
        after = extractor(images)
    assert 0 < (before - after).abs().max() < 5e-3
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in extractor.modules())
    for value in extractor.state_dict().values():
        assert torch.equal(value, value.half().float())


def test_matrices_are_stored_in_half_precision_and_numbers_as_they_are() -> None:
    matrix, vector, number = np.eye(3, dtype=np.float32).T, np.ones(3, np.float32), np.array(0.1, np.float32)
    assert [export.stored(value).dtype for value in (matrix, vector, number)] == [np.float16, np.float32, np.float32]
    assert export.stored(number) == np.float32(0.1)
    assert export.stored(np.arange(6, dtype=np.float32).reshape(2, 3).T).flags.c_contiguous


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_calibration_undoes_a_scale_that_is_wrong(factor: float) -> None:
    """Logits that are larger by a factor get a temperature that is larger by it, and the same accuracy."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 20)
    features = rng.normal(size=(12, 8))[labels] + 1.2 * rng.normal(size=(240, 8))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    learners = {
        "given": Prototype(np.float32(np.log(6))),
        "scaled": Prototype(np.float32(np.log(6 * factor))),
    }
    found, _, scores = calibrate.calibrate(learners, features, Pool.of(labels), episodes=30, queries=5, seed=0)
    assert found["scaled"]["constant"] - found["given"]["constant"] == pytest.approx(np.log(factor), abs=0.05)
    for name in ("by_way", "by_shot"):
        assert found["scaled"][name] == pytest.approx(found["given"][name], abs=0.05)
    assert scores["scaled"] == pytest.approx(scores["given"], abs=1e-3)
    assert 0.3 < scores["given"] < 1


def test_calibration_makes_probabilities_as_sure_as_they_are_right() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 20)
    features = rng.normal(size=(10, 8))[labels] + 1.2 * rng.normal(size=(200, 8))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    pool, learner = Pool.of(labels), Prototype(np.float32(np.log(50)))  # far too sure
    found, _, _ = calibrate.calibrate({"prototype": learner}, features, pool, episodes=100, queries=5, seed=0)
    temperature = Temperature(**found["prototype"])
    sure: list[float] = []
    right: list[bool] = []
    for episode in frozen(pool, way=5, shot=5, queries=5, count=200, seed=9):
        affine = learner.adapt(evaluate.support_of(features, episode))
        logits = (features[episode.query] @ affine.weight.T + affine.bias) / temperature.at(5, (5,) * 5)
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        sure += list((chances / chances.sum(axis=1, keepdims=True)).max(axis=1))
        right += list(logits.argmax(axis=1) == episode.answers)
    assert np.mean(sure) == pytest.approx(np.mean(right), abs=0.06)


# Rejection: fitted on tasks of some classes, held to its promise on tasks of others


REJECTING: dict[str, Learner] = {
    "prototype": Prototype(np.float32(np.log(8))),
    "ridge": Ridge(np.float32(np.log(8)), np.float32(np.log(0.5))),
}


def drawn(seed: int, *, classes: int = 40, images: int = 25, noise: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 32] of classes as unlike as directions in space can be, some of them wider than others; labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), images)
    wide = rng.uniform(0.7, 1.3, classes)[labels][:, None]
    centres = rng.normal(size=(classes, 32))
    features = centres[labels] + noise * wide * rng.normal(size=(len(labels), 32))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), labels


Fitted = dict[str, tuple[Temperature, Rejection]]


@functools.cache
def fit(noise: float) -> Fitted:
    features, labels = drawn(0, noise=noise)
    temperatures, rejections, _ = calibrate.calibrate(
        REJECTING, features, Pool.of(labels), episodes=60, queries=5, seed=0
    )
    return {
        name: (Temperature(**temperatures[name]), Rejection(**{k: tuple(v) for k, v in rejections[name].items()}))
        for name in REJECTING
    }


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return fit(0.8)


def known_of(method: str, fitted: Fitted, *, way: int, shot: int, noise: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """What the questions of new tasks get, and what images of other classes get: as the service works it out."""
    learner, (temperature, rejection) = REJECTING[method], fitted[method]
    features, labels = drawn(1, noise=noise)
    genuine, foreign = [], []
    for episode in frozen(Pool.of(labels), way=way, shot=shot, queries=10, count=60, seed=5):
        support, shots = evaluate.support_of(features, episode), (shot,) * way
        held = held_out(learner, support)
        by = divisor(temperature.at(way, shots), held.logits, support.labels[held.index])
        weight, bias = (part / by for part in learner.adapt(support))
        rivals = without_own(support.features @ weight.T + bias, episode.labels)
        gauge = rejection.gauge(shots, held_out=held.logits / by, rivals=rivals)
        others = np.flatnonzero(~np.isin(labels, labels[episode.support]))[::7]
        for rows, found in ((episode.query, genuine), (others, foreign)):
            found.append(rejection.known(energy(features[rows] @ weight.T + bias), gauge))
    return np.concatenate(genuine), np.concatenate(foreign)


@pytest.mark.parametrize("method", REJECTING)
def test_tasks_of_a_harder_domain_are_answered_more_honestly_for_what_their_own_examples_say(
    method: str, fitted: Fitted
) -> None:
    learner, (temperature, _) = REJECTING[method], fitted[method]
    features, labels = drawn(2, noise=2.0)
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for episode in frozen(Pool.of(labels), way=5, shot=5, queries=10, count=100, seed=6):
        support = evaluate.support_of(features, episode)
        weight, bias = learner.adapt(support)
        held, t = held_out(learner, support), temperature.at(5, (5,) * 5)
        for by, found in ((t, gaps[False]), (divisor(t, held.logits, support.labels[held.index]), gaps[True])):
            chances = softmax((features[episode.query] @ weight.T + bias) / by)
            found.append(chances.max(axis=1).mean() - (chances.argmax(axis=1) == episode.answers).mean())
    assert np.mean(gaps[False]) > 0.05
    assert abs(np.mean(gaps[True])) < 0.6 * np.mean(gaps[False])


def test_rejection_is_fitted_with_what_the_examples_of_each_task_say(
    fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "divisor", lambda temperature, *_: temperature)
    for method, (_, rejection) in fit.__wrapped__(0.8).items():
        assert rejection.quantiles != fitted[method][1].quantiles


@pytest.mark.parametrize("method", REJECTING)
def test_as_many_genuine_images_of_new_tasks_are_turned_away_as_was_said(method: str, fitted: Fitted) -> None:
    turned_away = []
    for way in (2, 5, 10):
        for shot in (1, 3, 5):
            genuine, foreign = known_of(method, fitted, way=way, shot=shot)
            assert (genuine >= 0).all()
            assert (genuine <= 1).all()
            turned_away.append(np.mean(genuine < 0.05))
            # Of the only examples of ridge nothing is read but how many classes there are.
            within, about = (0.1, 0.3) if (method, shot) == ("ridge", 1) else (0.045, 0.17)
            assert turned_away[-1] == pytest.approx(0.05, abs=within), (way, shot)
            for rate in np.arange(0.1, 1, 0.1):  # one curve serves tasks of every size, so it fits each only about
                assert np.mean(genuine < rate) == pytest.approx(rate, abs=about), (way, shot)
            assert np.mean(foreign < 0.05) > 5 * turned_away[-1], (way, shot)
            # How often an image of a class is better known than one of none.
            order = np.argsort(np.concatenate([foreign, genuine]), kind="stable")
            area = (np.argsort(order)[len(foreign) :].mean() - (len(genuine) - 1) / 2) / len(foreign)
            assert area > 0.85, (way, shot)
    assert np.mean(turned_away) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(("learned", "asked"), [(0.6, 0.9), (0.9, 0.6)], ids=["harder", "easier"])
@pytest.mark.parametrize("method", REJECTING)
def test_in_another_domain_the_examples_that_are_held_out_say_what_is_low(
    method: str, learned: float, asked: float
) -> None:
    fitted = fit(learned)
    for way in (2, 5, 10):
        for shot in (3, 5):
            genuine, foreign = known_of(method, fitted, way=way, shot=shot, noise=asked)
            assert np.mean(genuine < 0.05) == pytest.approx(0.05, abs=0.07), (way, shot)
            assert np.mean(foreign < 0.05) > 0.7, (way, shot)


@pytest.mark.parametrize("method", REJECTING)
def test_a_rejection_is_numbers_that_a_manifest_can_hold(method: str, fitted: Fitted) -> None:
    _, rejection = fitted[method]
    assert len(rejection.quantiles) == 201
    assert list(rejection.quantiles) == sorted(rejection.quantiles)
    json.dumps(dataclasses.asdict(rejection), allow_nan=False)


def test_an_artifact_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    asked = ExportConfig(checkpoint=tmp_path, data=tmp_path, out=tmp_path / "artifact", name="x")
    with pytest.raises(SystemExit, match="exists; an artifact is never edited"):
        export.main(asked)
    assert list(tmp_path.rglob("*")) == [tmp_path / "artifact"]


def test_checkpoints_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `python -m training pretrain"):
        export.main(ExportConfig(checkpoint=tmp_path, data=tmp_path, out=tmp_path / "artifact", name="x"))
    assert list(tmp_path.iterdir()) == []


# What the demo leaves behind


@pytest.fixture
def artifact(demo: Path) -> Artifact:
    return Artifact.load(demo / "artifact")


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be broken."""
    return Path(shutil.copytree(demo / "artifact", tmp_path / "artifact"))


def rewritten(folder: Path, **changes: Any) -> Path:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    return folder


@pytest.mark.slow
def test_the_artifact_is_complete_and_says_what_it_is(artifact: Artifact) -> None:
    assert {file.name for file in artifact.path.iterdir()} == {MANIFEST, *FILES}
    assert not artifact.path.with_name("artifact.partial").exists()
    manifest = artifact.manifest
    assert set(manifest.files) == set(FILES)
    assert manifest.name == "demo"
    assert manifest.dim == 8
    assert manifest.input == {"kind": "image", "height": 32, "width": 32, "channels": 3}
    assert set(manifest.methods) == {*LEARNERS}
    assert manifest.default in manifest.methods
    assert manifest.training["data"] == "shapes"
    assert manifest.training["precision"] == "float32"
    parts = splits.split_classes(Path("."), [f"class{label:02}" for label in range(30)])
    assert manifest.classes == {"learned": splits.digests(parts["train"]), "calibrated": splits.digests(parts["val"])}
    assert manifest.training["labels_used"] is True  # not by the extractor, but by the learners
    assert manifest.accuracy == ()
    assert artifact.digest == "sha256:" + hashlib.sha256((artifact.path / MANIFEST).read_bytes()).hexdigest()
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in artifact.path.iterdir())
    assert artifact.decoder().shape == (32, 32, 3)


@pytest.mark.slow
def test_the_runtimes_agree_with_each_other_and_with_the_probe(artifact: Artifact) -> None:
    onnxruntime, torch_ = OnnxExtractor(artifact), TorchExtractor(artifact, device="cpu")
    images = pixels(16)
    features = onnxruntime(images)
    assert features.shape == (16, 8)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-4)
    assert np.abs(features - torch_(images)).max() < 1e-4
    assert np.abs(features[0] - features[1]).max() > 1e-3
    assert artifact.check(onnxruntime) < 1e-4
    assert artifact.check(torch_) < 1e-4


@pytest.mark.slow
def test_the_features_are_those_of_the_checkpoint_but_for_the_rounding(artifact: Artifact, demo: Path) -> None:
    trained, settings = pretrained.load_extractor(demo / "run")
    images = data.load(demo / "shapes", "test", ImageDecoder(settings.size, settings.size, 3)).pixels
    expected = pretrained.embed(trained, images, torch.device("cpu"))
    assert np.abs(OnnxExtractor(artifact)(images) - expected).max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["cpu", "torch-cpu", "int8"])
def test_features_do_not_depend_on_the_size_of_the_batch(artifact: Artifact, runtime: str) -> None:
    extractor = (
        load_extractor(artifact, precision="int8") if runtime == "int8" else load_extractor(artifact, device=runtime)
    )
    images = pixels(5)
    together = extractor(images)
    for n in range(1, 6):
        np.testing.assert_allclose(extractor(images[:n]), together[:n], atol=1e-5)


@pytest.mark.slow
def test_the_int8_graph_holds_int8_weights_and_gives_features_close_by(artifact: Artifact) -> None:
    graph = onnx.load(artifact.path / INT8_GRAPH).graph
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    quantised, plain = load_extractor(artifact, precision="int8"), load_extractor(artifact)
    images = pixels(16)
    features = quantised(images)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-4)
    assert 1e-5 < np.abs(features - plain(images)).max() < 0.5
    artifact.check(quantised, precision="int8")
    assert artifact.manifest.int8 is not None
    assert set(artifact.manifest.int8) == {"loss_5w1s", "interval_5w1s", "loss_5w5s", "interval_5w5s"}
    assert all(np.isfinite(value) for value in artifact.manifest.int8.values())


@pytest.mark.slow
def test_weights_are_stored_once_in_half_precision_and_read_by_the_graph(artifact: Artifact) -> None:
    weights = load_file(artifact.path / WEIGHTS)
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float16)}
    file = artifact.path / GRAPH
    assert file.stat().st_size < 200_000
    graph = onnx.load(file, load_external_data=False).graph
    outside = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    raw = (artifact.path / WEIGHTS).read_bytes()
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == WEIGHTS
        assert tensor.data_type == onnx.TensorProto.FLOAT16
        part = raw[int(place["offset"]) :][: int(place["length"])]
        expected = weights[tensor.name.removesuffix(".half")]
        assert tuple(tensor.dims) == expected.shape
        assert np.array_equal(np.frombuffer(part, np.float16).reshape(expected.shape), expected)
    convolutions = [name for name, value in weights.items() if value.ndim == 4]
    assert {f"{name}.half" for name in convolutions} <= {tensor.name for tensor in outside}
    inside = sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL)
    assert inside < 100


@pytest.mark.slow
def test_both_runtimes_follow_the_weights_in_the_one_file(artifact: Artifact, copied: Path) -> None:
    weights = load_file(copied / WEIGHTS)
    save_file({name: value * np.float16(0.5) for name, value in weights.items()}, copied / WEIGHTS)
    changed = Artifact(copied, artifact.manifest, artifact.digest)  # not verified: load would refuse it
    images = pixels(4)
    features = OnnxExtractor(changed)(images)
    assert np.abs(features - OnnxExtractor(artifact)(images)).max() > 1e-2
    assert np.abs(features - TorchExtractor(changed, device="cpu")(images)).max() < 1e-4


@pytest.mark.slow
def test_the_graph_says_nothing_of_the_computer_it_was_made_on(artifact: Artifact) -> None:
    for name in (GRAPH, INT8_GRAPH):
        raw = (artifact.path / name).read_bytes()
        assert re.search(rb"\w\.py\b", raw) is None  # "org.pytorch" is the name of an operator set
        assert str(Path.home()).encode() not in raw


@pytest.mark.slow
def test_every_method_can_say_none_of_these_and_its_numbers_come_back(artifact: Artifact) -> None:
    assert set(artifact.manifest.rejections) == set(artifact.manifest.methods)
    written = json.loads((artifact.path / MANIFEST).read_text())["methods"]
    for method, rejection in artifact.manifest.rejections.items():
        assert dataclasses.asdict(rejection) == {
            name: tuple(values) for name, values in written[method]["rejection"].items()
        }
        for shot in (1, 5):
            logits = np.random.default_rng(shot).normal(size=(5 * shot, 5))
            held = logits if shot > 1 else logits[:0]
            gauge = rejection.gauge((shot,) * 5, held_out=held, rivals=logits[:, 1:])
            known = rejection.known(energy(logits), gauge)
            assert np.isfinite(gauge).all()
            assert ((known >= 0) & (known <= 1)).all()


@pytest.mark.slow
def test_an_artifact_from_before_there_were_rejections_has_none(artifact: Artifact, copied: Path) -> None:
    methods = json.loads((copied / MANIFEST).read_text())["methods"]
    old = {name: {"temperature": values["temperature"]} for name, values in methods.items()}
    assert Artifact.load(rewritten(copied, methods=old)).manifest.rejections == {}


@pytest.mark.slow
def test_temperatures_are_finite_for_tasks_of_any_size(artifact: Artifact) -> None:
    for temperature in artifact.manifest.methods.values():
        for way in (2, 5, 20, 100):
            for shot in (1, 5, 50):
                assert 1e-3 < temperature.at(way, (shot,) * way) < 1e3


@pytest.mark.slow
def test_every_learner_of_the_artifact_learns_from_its_features(artifact: Artifact, demo: Path) -> None:
    images = data.load(demo / "shapes", "test", artifact.decoder())
    features = evaluate.embed(OnnxExtractor(artifact), images.pixels)
    (episode,) = frozen(Pool.of(images.labels), way=5, shot=5, queries=10, count=1, seed=0)
    learners = artifact.learners()
    assert set(learners) == set(artifact.manifest.methods)
    for learner in learners.values():
        affine = learner.adapt(evaluate.support_of(features, episode))
        assert affine.weight.dtype == np.float32
        assert np.isfinite(affine.weight).all()
        assert evaluate.accuracy(affine, features, episode) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_noticed_and_the_file_named(copied: Path, name: str, where: str) -> None:
    Artifact.load(copied)
    raw = bytearray((copied / name).read_bytes())
    raw[{"first": 0, "middle": len(raw) // 2, "last": -1}[where]] ^= 1
    (copied / name).write_bytes(raw)
    with pytest.raises(ArtifactInvalid, match=f"{name} is not the file that the manifest names"):
        Artifact.load(copied)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(ArtifactInvalid, match=f"{name} cannot be read"):
        Artifact.load(copied)


@pytest.mark.slow
def test_a_link_out_of_the_artifact_is_refused_though_its_content_is_right(copied: Path, demo: Path) -> None:
    (copied / ARRAYS).unlink()
    (copied / ARRAYS).symlink_to(demo / "artifact" / ARRAYS)
    with pytest.raises(ArtifactInvalid, match=f"{ARRAYS} leads out of the artifact"):
        Artifact.load(copied)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "folder/file"])
def test_a_name_that_leads_out_of_the_artifact_is_refused(artifact: Artifact, copied: Path, name: str) -> None:
    (copied.parent / "secret").write_text("x")
    rewritten(copied, files={**artifact.manifest.files, name: hashlib.sha256(b"x").hexdigest()})
    with pytest.raises(ArtifactInvalid, match="leads out of the artifact"):
        Artifact.load(copied)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "fewshot-artifact-0"}, "unknown format 'fewshot-artifact-0'"),
        ({"methods": {"magic": {"temperature": {}}}}, "magic"),
        ({"default": "magic"}, "magic"),
        ({"input": {"kind": "sound"}}, "unknown kind of input 'sound'"),
        ({"dim": None}, "not a manifest"),
        ({"files": {}}, f"does not list {GRAPH}"),
    ],
    ids=["format", "method", "default", "input", "dim", "files"],
)
def test_a_manifest_that_is_not_understood_is_refused(copied: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArtifactInvalid, match=sentence) as refused:
        Artifact.load(rewritten(copied, **changes))
    assert MANIFEST in refused.value.detail


@pytest.mark.slow
def test_any_change_of_the_manifest_is_another_artifact(artifact: Artifact, copied: Path) -> None:
    assert Artifact.load(copied).digest == artifact.digest
    assert Artifact.load(rewritten(copied, description="Better.")).digest != artifact.digest


# Characters: one channel, pseudo-tasks, no int8


@pytest.fixture(scope="module")
def characters(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a short training on one channel without labels."""
    out = tmp_path_factory.mktemp("characters")
    given = {"data": shapes, "out": out, "device": "cpu"}
    pretrain.main(
        PretrainConfig(
            **given, shape="tiny-grey", size=20, batch=24, epochs=2, augment="characters", precision="float32"
        )
    )
    metatrain.main(
        MetatrainConfig(**given, tasks="pseudo", learners="prototype,ridge", steps=2, max_way=4, max_shot=2, views=2)
    )
    return out


@pytest.mark.slow
def test_an_export_is_refused_when_the_runtimes_disagree_and_else_whole(
    characters: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = [{"accuracy": 81.5, "interval": 0.2, "way": 5, "shot": 1}, {"accuracy": 90.0}]
    metrics = tmp_path / "figures.jsonl"
    several = [{"accuracy": 83.0, "interval": 0.2, "way": 5, "shot": 1, "views": 3}]  # an artifact speaks of one
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [*figures, *several]))
    asked = ExportConfig(
        checkpoint=characters,
        data=shapes,
        out=tmp_path / "made" / "artifact",
        name="drawn",
        description="Characters.",
        tasks="pseudo",
        rotations=True,
        default="ridge",
        int8=False,
        episodes=10,
        metrics=str(metrics),
    )
    with monkeypatch.context() as patch:
        patch.setattr(export, "PARITY", 0.0)
        with pytest.raises(SystemExit, match="The runtimes disagree by"):
            export.main(asked)
    assert not asked.out.exists()
    assert export.main(asked) == asked.out  # what the refused one left is in nobody's way
    assert [file.name for file in asked.out.parent.iterdir()] == ["artifact"]
    artifact = Artifact.load(asked.out)
    assert artifact.decoder().shape == (20, 20, 1)
    assert artifact.manifest.default == "ridge"
    assert artifact.manifest.description == "Characters."
    assert list(artifact.manifest.accuracy) == figures
    assert artifact.manifest.training["labels_used"] is False
    assert artifact.manifest.training["calibration"] == "pseudo of val"
    assert artifact.manifest.int8 is None
    assert not (asked.out / INT8_GRAPH).exists()
    with pytest.raises(ArtifactInvalid, match="'drawn' has no int8 graph"):
        load_extractor(artifact, precision="int8")
    images = pixels(3, size=20, channels=1)
    assert np.abs(OnnxExtractor(artifact)(images) - TorchExtractor(artifact, device="cpu")(images)).max() < 1e-4


@pytest.mark.slow
def test_no_image_of_the_data_is_in_the_artifact(artifact: Artifact, demo: Path) -> None:
    shown = load_file(artifact.path / PROBE)["images"]
    assert np.array_equal(shown, probe.drawn(artifact.decoder().shape))
    images = data.load(demo / "shapes", "all", artifact.decoder()).pixels
    assert not any(np.array_equal(one, other) for one in shown for other in images)


@pytest.mark.slow
def test_the_epochs_of_what_was_started_from_count(artifact: Artifact, demo: Path, tmp_path: Path) -> None:
    _, settings = pretrained.load_extractor(demo / "run")
    assert artifact.manifest.training["epochs"] == pretrained.epochs(settings) == settings.epochs
    assert pretrained.epochs(settings.model_copy(update={"start": demo / "run", "epochs": 2})) == settings.epochs + 2
    assert pretrained.epochs(settings.model_copy(update={"start": artifact.path, "epochs": 1})) == settings.epochs + 1
    assert pretrained.epochs(settings.model_copy(update={"start": tmp_path, "epochs": 3})) == 3


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (None, "figures.jsonl does not exist"),
        ([{"artifact": "other"}], "measured 'other', and this is 'mine'"),
        ([{"artifact": "mine", "split": "train"}], "on the split 'train', which was learned from"),
    ],
    ids=["missing", "name", "split"],
)
def test_figures_of_something_else_are_refused_before_any_work(
    lines: list[dict[str, Any]] | None, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "figures.jsonl"
    if lines is not None:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ExportConfig(checkpoint=tmp_path, data=tmp_path, out=tmp_path / "made", name="mine", metrics=str(file))
    with pytest.raises(DataError, match=sentence):
        export.main(asked)


def test_figures_are_of_these_weights_and_stand_once(tmp_path: Path) -> None:
    row = {"artifact": "mine", "split": "test", "accuracy": 50.0, "way": 5}
    file = tmp_path / "figures.jsonl"
    file.write_text("".join(json.dumps({**row, "measured_in_s": seconds}) + "\n" for seconds in (1, 2)))
    asked = ExportConfig(checkpoint=tmp_path, data=tmp_path, out=tmp_path / "made", name="mine", metrics=str(file))
    found = export.figures(asked)
    assert export._kept(found, "abc") == [{"split": "test", "accuracy": 50.0, "way": 5}]
    assert export._kept([{**row, "weights_digest": "abc"}], "abc") != []
    with pytest.raises(DataError, match=r"figures of other weights \(abc\) than these \(def\)"):
        export._kept([{**row, "weights_digest": "abc"}], "def")


@pytest.mark.slow
def test_a_row_names_the_weights_by_what_lies_in_the_artifact(artifact: Artifact) -> None:
    files = {name: hashlib.sha256((artifact.path / name).read_bytes()).hexdigest() for name in (WEIGHTS, ARRAYS)}
    assert raw.made_with(artifact)["weights_digest"] == raw.weights(files)


def test_a_default_that_is_none_of_the_learners_is_named_with_the_nearest() -> None:
    export.check_default("", ["ridge"])
    export.check_default("ridge", ["ridge"])
    with pytest.raises(SystemExit, match=r"no learner 'whitend'. Is whitened meant\? prototype, whitened"):
        export.check_default("whitend", ["prototype", "whitened"])
