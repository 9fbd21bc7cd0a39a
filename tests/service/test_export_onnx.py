"""A task as one ONNX file, run by onnxruntime and held against the service's own numbers."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import save_file

import models
from models.artifact import GRAPH, PROBE, Artifact
from models.calibration import Rejection, energy
from models.errors import ExportRefused
from models.extractor import load_extractor
from models.head import Affine, Head
from models.images import ImageDecoder
from service import export_onnx
from service.batcher import Batcher
from service.engine import Engine
from service.export_onnx import Exported, answers, build, bundle, check, export, facts_of
from service.settings import PRETRAINED
from service.stores import Pointer
from service.support import Limits, Row, Rows, learn, record_of
from tests.fakes import MeanColour, a_head, picture, tiny_artifact

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "service" / "sample"
NORMAL = tuple(round(statistics.NormalDist().inv_cdf(min(max(k / 200, 0.001), 0.999)), 4) for k in range(201))
POINTER = Pointer(3, "hd_abc")


def with_quantiles(quantiles: Sequence[float]) -> Rejection:
    """How a gauge comes about does not matter here: the heads of these tests are given theirs."""
    others = {field.name: (0.0,) for field in dataclasses.fields(Rejection) if field.name != "quantiles"}
    return Rejection(**others, quantiles=tuple(quantiles))


REJECTION = with_quantiles(NORMAL)


def graphed(folder: Path, *, rejection: Rejection | None = None) -> Artifact:
    """The tiny artifact with a graph that computes what MeanColour does, and with probe images."""
    artifact = tiny_artifact(folder)
    numbers = {"area": np.array([1, 2], np.int64), "across": np.array([1], np.int64)}
    numbers |= {name: np.array(value, np.float32) for name, value in {"white": 255, "half": 0.5, "tiny": 1e-6}.items()}
    node, kind = onnx.helper.make_node, onnx.TensorProto
    nodes = [
        node("Cast", ["images"], ["floats"], to=kind.FLOAT),
        node("ReduceMean", ["floats", "area"], ["mean"], keepdims=0),
        node("Div", ["mean", "white"], ["shares"]),
        node("Sub", ["shares", "half"], ["centred"]),
        node("ReduceL2", ["centred", "across"], ["length"]),
        node("Add", ["length", "tiny"], ["divisor"]),
        node("Div", ["centred", "divisor"], ["features"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "mean colour",
        [onnx.helper.make_tensor_value_info("images", kind.UINT8, ["n", 16, 16, 3])],
        [onnx.helper.make_tensor_value_info("features", kind.FLOAT, ["n", 3])],
        [onnx.numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, folder / GRAPH)
    images = some_pixels(6, artifact)
    save_file({"images": images, "features": MeanColour()(images)}, folder / PROBE)
    manifest = dataclasses.replace(
        artifact.manifest,
        files={GRAPH: "", PROBE: ""},
        rejections={} if rejection is None else {"prototype": rejection},
    )
    return dataclasses.replace(artifact, manifest=manifest)


def some_pixels(count: int, artifact: Artifact, *, seed: int = 0) -> np.ndarray:
    """Noise of many colours."""
    given, rng = artifact.manifest.input, np.random.default_rng(seed)
    colour = rng.integers(0, 256, (count, 1, 1, given["channels"]))
    noise = rng.integers(-60, 60, (count, given["height"], given["width"], given["channels"]))
    return np.clip(colour + noise, 0, 255).astype(np.uint8)


def file_of(artifact: Artifact, head: Head, *, precision: str = "float32") -> bytes:
    return build(
        artifact, head, facts_of(artifact, "t", POINTER, head, precision=precision, reject=0.05), precision=precision
    )


def opened(model: bytes) -> Any:
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def run(model: bytes, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, known = opened(model).run(["probabilities", "known"], {"pixels": pixels})
    return probabilities, known


def exported(artifact: Artifact, head: Head, **options: Any) -> Exported:
    """What the use case makes, with MeanColour as the extractor that serves."""

    async def main() -> Exported:
        batcher = Batcher(MeanColour(), ImageDecoder(16, 16, 3), lanes=2, max_batch=4, max_waiting=50)
        try:
            engine = Engine(artifact, batcher)
            given = {"precision": "float32", "served": "float32", "reject": 0.05, **options}
            return await export(engine, "garage-door", POINTER, head, **given)
        finally:
            await batcher.close()

    return asyncio.run(main())


def with_gauge(head: Head, location: float, spread: float) -> Head:
    return dataclasses.replace(head, gauge=(location, spread))


# The file.


def test_the_file_takes_pixels_and_gives_probabilities_and_how_known_they_are(tmp_path: Path) -> None:
    session = opened(file_of(graphed(tmp_path), a_head(way=4)))
    (pixels,) = session.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["n", 16, 16, 3])
    found = [(output.name, output.type, output.shape) for output in session.get_outputs()]
    assert found == [("probabilities", "tensor(float)", ["n", 4]), ("known", "tensor(float)", ["n"])]


def test_the_file_asks_for_no_newer_runtime_than_its_operators_do(tmp_path: Path) -> None:
    artifact = graphed(tmp_path)
    model = onnx.load_from_string(file_of(artifact, a_head()))
    assert (model.opset_import[0].version, model.ir_version) == (20, 9)  # onnxruntime 1.17 knows both, and 1.16 neither
    onnx.checker.check_model(model, full_check=True)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    artifact = graphed(tmp_path, rejection=REJECTION)
    head = dataclasses.replace(with_gauge(a_head(), 0, 1), labels=("größe, \"'\n", "日本"))
    facts = opened(file_of(artifact, head)).get_modelmeta().custom_metadata_map
    assert json.loads(facts.pop("labels")) == list(head.labels)
    assert "BILINEAR" in facts.pop("resize")
    assert facts == {
        "task": "t",
        "version": "3",
        "head": "hd_abc",
        "artifact": "sha256:tiny",
        "method": "prototype",
        "precision": "float32",
        "reject": "0.05",
        "input": "16 x 16 pixels, RGB",
    }


def test_a_method_that_cannot_say_none_of_these_turns_no_image_away(tmp_path: Path) -> None:
    artifact = graphed(tmp_path)
    for head in (a_head(), with_gauge(a_head(), 0, 1)):
        model = file_of(artifact, head)
        assert opened(model).get_modelmeta().custom_metadata_map["reject"] == "0"
        np.testing.assert_array_equal(run(model, some_pixels(4, artifact))[1], np.ones(4, np.float32))


@pytest.mark.parametrize("way", [2, 256])
@pytest.mark.parametrize("count", [1, 5, 200])
def test_the_file_answers_like_the_service(tmp_path: Path, way: int, count: int) -> None:
    artifact = graphed(tmp_path, rejection=REJECTION)
    pixels = some_pixels(count, artifact, seed=1)
    features = MeanColour()(pixels)
    head = a_head(way=way)
    head = with_gauge(head, float(energy(head.logits(features)).mean()), 0.3)
    expected = answers(head, features, REJECTION)
    probabilities, known = run(file_of(artifact, head), pixels)
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-6)
    np.testing.assert_allclose(known, expected.known, atol=1e-5)
    if count == 200:
        assert ((known > 0.05) & (known < 0.95)).sum() > 50  # between the ends, where something could be wrong


def test_what_is_known_follows_the_quantiles_also_where_they_are_equal_or_far_apart(tmp_path: Path) -> None:
    quantiles = (-3.0, -1.0, -1.0, -1.0, -0.5, 0.0, 0.0001, 2.0, 2.0)
    rejection = with_quantiles(quantiles)
    artifact = graphed(tmp_path, rejection=rejection)
    pixels = some_pixels(400, artifact, seed=2)
    head = a_head()
    energies = energy(head.logits(MeanColour()(pixels)))
    head = with_gauge(head, float(np.median(energies)), float(energies.std() / 2))
    assert head.gauge
    scaled = (energies - head.gauge[0]) / head.gauge[1]
    assert [((scaled > low) & (scaled < high)).sum() > 3 for low, high in ((-9, -3), (-3, -1), (-1, 0), (0, 2))] == [
        True
    ] * 4
    known = run(file_of(artifact, head), pixels)[1]
    away = np.abs(scaled[:, None] - np.array(quantiles)).min(axis=1) > 1e-3  # a step is a step: not on it
    assert away.sum() > 300
    np.testing.assert_allclose(known[away], rejection.known(energies, head.gauge)[away], atol=1e-5)
    for wanted in (-1.005, -0.995, -0.005, 0.005, 1.995, 2.005):  # on either side of each step
        head = with_gauge(head, float(energies[0]) - wanted, 1.0)
        (near,) = run(file_of(artifact, head), pixels[:1])[1]
        assert abs(near - np.interp(wanted, quantiles, np.linspace(0, 1, 9))) < 1e-4, wanted


@pytest.mark.parametrize(("location", "expected"), [(1e6, 0.0), (-1e6, 1.0)])
def test_beyond_the_quantiles_an_image_is_known_not_at_all_or_wholly(
    tmp_path: Path, location: float, expected: float
) -> None:
    artifact = graphed(tmp_path, rejection=REJECTION)
    known = run(file_of(artifact, with_gauge(a_head(), location, 1e-3)), some_pixels(3, artifact))[1]
    np.testing.assert_array_equal(known, np.full(3, expected, np.float32))


def test_logits_that_are_very_large_do_not_overflow(tmp_path: Path) -> None:
    artifact, pixels = graphed(tmp_path, rejection=REJECTION), some_pixels(50, graphed(tmp_path))
    head = a_head(way=5)
    head = with_gauge(dataclasses.replace(head, affine=Affine(*(1e4 * part for part in head.affine))), 1e4, 1e4)
    expected = answers(head, MeanColour()(pixels), REJECTION)
    probabilities, known = run(file_of(artifact, head), pixels)
    assert np.isfinite(probabilities).all()
    np.testing.assert_array_equal(probabilities.argmax(axis=1), expected.probabilities.argmax(axis=1))
    np.testing.assert_allclose(known, expected.known, atol=1e-4)


# The use case.


def test_what_is_exported_answers_for_the_probe_images_as_the_extractor_that_serves(tmp_path: Path) -> None:
    artifact = graphed(tmp_path, rejection=REJECTION)
    head = with_gauge(a_head(way=3), 0.5, 1)
    made = exported(artifact, head)
    np.testing.assert_array_equal(made.pixels, some_pixels(6, artifact))
    expected = answers(head, MeanColour()(made.pixels), REJECTION)
    np.testing.assert_allclose(made.expected.probabilities, expected.probabilities, atol=1e-6)
    np.testing.assert_allclose(made.expected.known, expected.known, atol=1e-6)
    assert 0 < made.expected.known.min() < made.expected.known.max() < 1
    assert check(made.model, made.pixels, made.expected) < 1e-5


def test_a_service_that_answers_otherwise_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, logits = graphed(tmp_path, rejection=REJECTION), Head.logits
    exported(artifact, a_head())
    monkeypatch.setattr(Head, "logits", lambda self, features: 1.01 * logits(self, features))
    with pytest.raises(ExportRefused, match="answers otherwise than the service"):
        exported(artifact, a_head())


def test_a_service_that_is_otherwise_sure_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, head = graphed(tmp_path, rejection=REJECTION), with_gauge(a_head(), 0.5, 1)
    exported(artifact, head)
    known = Rejection.known
    monkeypatch.setattr(Rejection, "known", lambda self, *given: known(self, *given) + 2e-4)
    with pytest.raises(ExportRefused, match="answers otherwise than the service"):
        exported(artifact, head)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    head = a_head()
    broken = dataclasses.replace(head, affine=Affine(head.affine.weight * np.float32(np.nan), head.affine.bias))
    with pytest.raises(ExportRefused, match="otherwise"):
        exported(graphed(tmp_path), broken)


def test_a_difference_of_less_than_one_in_ten_thousand_is_none(tmp_path: Path) -> None:
    artifact = graphed(tmp_path)
    made = exported(artifact, a_head())
    for shift, refused in ((5e-5, False), (2e-4, True)):
        moved = dataclasses.replace(made.expected, probabilities=made.expected.probabilities + np.float32(shift))
        if refused:
            with pytest.raises(ExportRefused):
                check(made.model, made.pixels, moved)
        else:
            assert 4e-5 < check(made.model, made.pixels, moved) < 6e-5


def test_a_file_that_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_onnx, "build", lambda *_, **__: b"no model")
    with pytest.raises(ExportRefused, match="does not run"):
        exported(graphed(tmp_path), a_head())


def test_a_precision_that_the_artifact_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportRefused, match=r"'tiny' has no int8 graph"):
        exported(graphed(tmp_path), a_head(), precision="int8")


@pytest.mark.parametrize("absent", ["onnxruntime", "onnx"])
def test_without_the_libraries_the_refusal_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    artifact = graphed(tmp_path)
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, "models.extractor_onnx", raising=False)
    monkeypatch.delattr(models, "extractor_onnx", raising=False)
    with pytest.raises(ExportRefused, match="export from one that serves the same artifact on a CPU"):
        exported(artifact, a_head())


def test_the_zip_holds_the_file_a_runner_and_answers_to_hold_any_runtime_against(tmp_path: Path) -> None:
    made = exported(graphed(tmp_path), a_head(way=3))
    with zipfile.ZipFile(io.BytesIO(bundle(made))) as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) == {"model.onnx", "golden.npz", "run.py", "README.txt"}
        golden = np.load(io.BytesIO(archive.read("golden.npz")))
        probabilities, known = run(archive.read("model.onnx"), golden["pixels"])
        compile(archive.read("run.py"), "run.py", "exec")
        readme = archive.read("README.txt").decode()
        assert "'garage-door', version 3" in readme
        assert 'pip install "onnxruntime>=1.17" numpy "Pillow>=9.1"' in readme
    np.testing.assert_allclose(probabilities, golden["probabilities"], atol=1e-4)
    np.testing.assert_allclose(known, golden["known"], atol=1e-4)
    assert len(probabilities) == 6


@pytest.mark.slow
def test_a_start_does_not_load_what_only_an_export_needs() -> None:
    program = "import sys, service.web.app; print([m for m in ('onnx', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# The artifacts that ship.

SHIPPED = pytest.mark.parametrize("name", ["characters", pytest.param("photos", marks=pytest.mark.slow)])


def taught(artifact: Artifact, method: str, extractor: Any, decoder: ImageDecoder) -> Head:
    """A task of three letters, three examples each."""
    rows = {
        (label, f"ex{n}"): Row(extractor(decoder(read(label, n))[None])[0].astype(np.float16))
        for label in ("alpha", "omega", "theta")
        for n in (1, 2, 3)
    }
    record = record_of(Rows(rows), artifact=artifact.digest, method=method, dim=artifact.manifest.dim, limits=Limits())
    temperature = artifact.manifest.methods[method]
    return learn(record, artifact.learners()[method], temperature, None, device="cpu").head


def read(label: str, n: int) -> bytes:
    return (SAMPLE / label / f"{n}.png").read_bytes()


def rejecting(artifact: Artifact, methods: Sequence[str]) -> Artifact:
    """The same artifact, whose learners can say "none of these", whatever they could before."""
    manifest = dataclasses.replace(artifact.manifest, rejections=dict.fromkeys(methods, REJECTION))
    return dataclasses.replace(artifact, manifest=manifest)


@pytest.mark.slow
@SHIPPED
def test_every_learner_of_the_artifacts_that_ship_answers_alike_from_its_file(name: str) -> None:
    artifact = Artifact.load(PRETRAINED / name)
    artifact = rejecting(artifact, list(artifact.manifest.methods))
    extractor, decoder = load_extractor(artifact), artifact.decoder()
    drawn = [decoder(read(label, n)) for label in ("alpha", "omega", "theta") for n in range(4, 10)]
    colours = [decoder(picture(colour, size=(90, 60), format="JPEG")) for colour in ("red", "white", "black")]
    pixels = np.concatenate([np.stack([*drawn, *colours]), some_pixels(9, artifact)])
    features = extractor(pixels)
    assert {"prototype", "ridge", "whitened", "gradient", "lstm"} <= set(artifact.manifest.methods)
    for method in artifact.manifest.methods:
        head = taught(artifact, method, extractor, decoder)
        letters = energy(head.logits(features[: len(drawn)]))
        head = with_gauge(head, float(letters.mean()), float(letters.std()))
        expected = answers(head, features, REJECTION)
        session = opened(file_of(artifact, head))
        for size in (1, 5, len(pixels)):
            parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
            found = [session.run(["probabilities", "known"], {"pixels": part}) for part in parts]
            probabilities, known = (np.concatenate(part) for part in zip(*found, strict=True))
            assert np.abs(probabilities - expected.probabilities).max() < 1e-4, (method, size)
            assert np.abs(known - expected.known).max() < 1e-4, (method, size)
        # There was something to be wrong about: it tells letters apart, and is surer of some than of others.
        assert (probabilities[: len(drawn)].argmax(axis=1) == np.repeat([0, 1, 2], 6)).mean() > 0.5, method
        assert known.max() - known.min() > 0.3, method


@pytest.mark.slow
@SHIPPED
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_file_is_whole_small_and_plain(name: str, precision: str) -> None:
    artifact = Artifact.load(PRETRAINED / name)
    extractor, decoder = load_extractor(artifact, precision=precision), artifact.decoder()
    head = taught(artifact, artifact.manifest.default, extractor, decoder)
    written = file_of(artifact, head, precision=precision)
    model = onnx.load_from_string(written)
    onnx.checker.check_model(model, full_check=True)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {opset.domain for opset in model.opset_import} == {""}
    halves = sum(path.stat().st_size for path in artifact.path.glob("extractor.safetensors"))
    assert len(written) < {"float32": 1.1, "int8": 0.6}[precision] * halves
    pixels = np.stack([decoder(read(label, n)) for label in ("alpha", "omega", "theta") for n in (4, 5)])
    assert check(written, pixels, answers(head, extractor(pixels), None)) < 1e-5
