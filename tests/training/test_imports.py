from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch", "onnx", "onnxruntime", "onnxscript")

from models import extractor, extractor_torch
from models.artifact import ARRAYS, GRAPH, INT8_GRAPH, MANIFEST, PROBE, WEIGHTS, Artifact
from models.errors import ArtifactInvalid
from models.extractor import best_device, load_extractor
from models.extractor_onnx import OnnxExtractor
from models.images import ImageDecoder
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.service.live import served
from tests.training.nets import DIM, net, write
from training import __main__ as commands
from training import data, imports, onnx_file
from training.backbone import Refused
from training.config import EvaluateConfig, ImportConfig
from training.folders import DataError

FILES = {WEIGHTS, GRAPH, ARRAYS, PROBE}
QUICK = {"learners": "prototype,whitened", "steps": 2, "episodes": 10}


def config(file: Path, shapes: Path, out: Path, **more: Any) -> ImportConfig:
    return ImportConfig(**{"backbone": file, "data": shapes, "out": out, "name": "theirs", **QUICK, **more})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(net(opset=13), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def artifact(source: Path, shapes: Path) -> Artifact:
    out = source.parent / "made" / "artifact"
    assert imports.main(config(source, shapes, out, description="From elsewhere.")) == out
    return Artifact.load(out)


def test_the_artifact_is_complete_and_says_where_it_comes_from(artifact: Artifact, source: Path) -> None:
    assert [file.name for file in artifact.path.parent.iterdir()] == ["artifact"]
    manifest = artifact.manifest
    assert set(manifest.files) - {INT8_GRAPH} == FILES
    assert (INT8_GRAPH in manifest.files) == (manifest.int8 is not None)
    assert (manifest.name, manifest.description, manifest.dim) == ("theirs", "From elsewhere.", DIM)
    assert manifest.input == {"kind": "image", "height": 24, "width": 24, "channels": 3}
    assert set(manifest.methods) == set(manifest.rejections) == {"prototype", "whitened"}
    assert manifest.training["shape"] == "onnx"
    assert manifest.training["source"] == imports.digest(source)
    assert manifest.accuracy == ()
    assert artifact.check(OnnxExtractor(artifact)) < 1e-5


def test_features_are_the_source_rooted_and_centred_over_the_training_classes(
    artifact: Artifact, source: Path, shapes: Path
) -> None:
    found = onnx_file.read(source, config(source, shapes, source.parent / "x"))
    decoder = ImageDecoder(24, 24, 3)
    seen, asked = (data.load(shapes, split, decoder).pixels for split in ("train", "test"))
    rooted = [np.sqrt(found.reference(found.given(pixels)) + 1e-6) for pixels in (seen, asked)]
    expected = rooted[1] - rooted[0].mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    features = OnnxExtractor(artifact)(asked)
    assert np.linalg.norm(features - expected, axis=1).max() < 0.02  # the weights were rounded
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-4)


def test_it_is_measured_as_any_other(artifact: Artifact, shapes: Path) -> None:
    from training import evaluate

    rows = evaluate.main(EvaluateConfig(artifact=artifact.path, data=shapes, way="2", shot="1", episodes=10))
    assert {row.method for row in rows} == {"prototype", "whitened"}


def test_only_onnxruntime_runs_it_and_auto_knows(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactInvalid, match="'theirs' was imported: it is a graph that only onnxruntime runs"):
        load_extractor(artifact, device="torch-cpu")
    monkeypatch.setattr(extractor, "DRIVERS", ("/",))
    monkeypatch.setattr(extractor_torch, "has_cuda", lambda: True)
    assert best_device() == "cuda"
    assert best_device(artifact) == "cpu"


def test_the_service_learns_answers_and_makes_a_file_with_it(artifact: Artifact, shapes: Path) -> None:
    folders = sorted(path for path in shapes.iterdir() if path.is_dir())[:3]
    files = {folder.name: sorted(folder.glob("*.png")) for folder in folders}
    support = [(label, one.read_bytes()) for label, found in files.items() for one in found[:5]]
    with served(create_app(Settings(artifact=artifact.path, device="auto"), store=MemoryStore())) as http:
        taught = http.put("/v1/tasks/t", files=support)
        assert taught.status_code == 201, taught.text
        # What it was taught with it knows again more often than chance would.
        asked = http.post("/v1/tasks/t/classify?reject=off", files=[("image", payload) for _, payload in support])
        labels = [row["label"] for row in asked.json()["predictions"]]
        assert sum(a == b for a, (b, _) in zip(labels, support, strict=True)) > 8
        made = http.get("/v1/tasks/t/export")
        assert made.status_code == 200, made.text
        told = http.get("/v1/artifact").json()
        assert told["training"]["objectives"] == "imported"


def test_images_that_are_scanned_are_served_without_int8(tmp_path: Path, shapes: Path) -> None:
    file = write(net(shape=(1, 3, 24, 24), ends="fixed"), tmp_path)
    out = imports.main(config(file, shapes, tmp_path / "artifact", learners="prototype"))
    made = Artifact.load(out)
    assert made.manifest.int8 is None
    assert made.manifest.default == "prototype"
    extractor = OnnxExtractor(made)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    assert np.allclose(extractor(pixels), np.concatenate([extractor(one[None]) for one in pixels]), atol=1e-6)
    support = [
        (path.parent.name, path.read_bytes()) for path in sorted(shapes.rglob("*.png"))[:20] if path.parent != shapes
    ]
    with served(create_app(Settings(artifact=out), store=MemoryStore())) as http:
        assert http.put("/v1/tasks/t", files=support).status_code == 201
        assert http.get("/v1/tasks/t/export").status_code == 200


def test_weights_that_half_precision_would_spoil_stay_whole(tmp_path: Path, shapes: Path) -> None:
    """A large part that all images share drowns what differs once it is rounded."""
    model = net(relu=False)
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            value = np.frombuffer(tensor.raw_data, np.float32) * np.float32(1e-8)  # nothing, in half precision
            tensor.raw_data = value.tobytes()
    model.graph.initializer[2].raw_data = np.array(1e7, np.float32).tobytes()
    out = imports.main(config(write(model, tmp_path), shapes, tmp_path / "artifact", learners="prototype", int8=False))
    made = Artifact.load(out)
    assert made.check(OnnxExtractor(made)) < 1e-5
    header = (out / WEIGHTS).read_bytes()
    assert b'"F32"' in header[:2000]
    assert b'"F16"' not in header[:2000]


def test_int8_is_left_out_where_it_does_not_hold(artifact: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact.path, tmp_path / "artifact"))
    assert not imports.holds(artifact, {"loss_5w1s": 0.6, "interval_5w1s": 0.1, "loss_5w5s": 0.0})
    shutil.copy(folder / GRAPH, folder / INT8_GRAPH)
    manifest = json.loads((folder / MANIFEST).read_text())
    made = imports.seal(folder, manifest)
    assert imports.holds(made, {"loss_5w1s": 0.5, "interval_5w1s": 9.0})
    assert not imports.holds(made, {"loss_5w1s": -1.0, "loss_5w5s": 0.51})


# What does not fit


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_a_pickled_file_is_refused_in_one_line(
    name: str, tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    given = ["--backbone", tmp_path / name, "--data", shapes, "--out", tmp_path / "out", "--name", "x"]
    assert commands.main(["import", *map(str, given)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("import: ")
    assert "is pickled, which may run code when read" in line
    assert not (tmp_path / "out").exists()


def test_weights_alone_and_nothing_at_all_are_refused(tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for name, sentence in (("model.safetensors", "is weights alone"), ("none.onnx", "does not exist")):
        with pytest.raises(Refused, match=sentence):
            imports.main(config(tmp_path / name, shapes, tmp_path / "out"))


def test_a_backbone_that_does_not_look_at_the_image_is_refused_and_leaves_nothing(tmp_path: Path, shapes: Path) -> None:
    file = write(net(factor=0.0), tmp_path)
    with pytest.raises(Refused, match="the same vector whatever the image"):
        imports.main(config(file, shapes, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_too_few_classes_are_refused(tmp_path: Path, shapes: Path, source: Path) -> None:
    for name in ("a", "b", "c", "d"):
        shutil.copytree(sorted(path for path in shapes.iterdir() if path.is_dir())[0], tmp_path / "few" / name)
    with pytest.raises(DataError, match="has one class in its split 'val'"):
        imports.main(config(source, tmp_path / "few", tmp_path / "out"))


def test_an_artifact_is_never_written_over_and_learners_are_known(tmp_path: Path, shapes: Path, source: Path) -> None:
    with pytest.raises(SystemExit, match="--learners: known learners are"):
        imports.main(config(source, shapes, tmp_path / "out", learners="magic"))
    with pytest.raises(SystemExit, match="exists; an artifact is never edited"):
        imports.main(config(source, shapes, tmp_path))
