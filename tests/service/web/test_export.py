"""A task leaves: over HTTP, into another Python, into a browser."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from models.artifact import Artifact
from models.calibration import Rejection
from models.head import Head
from service.keys import create
from service.settings import PRETRAINED, Settings
from service.stores.memory import MemoryStore
from service.web import export
from service.web.app import create_app
from service.web.export import MOST_ASKED
from tests.fakes import MeanColour, tiny_artifact
from tests.service.live import served
from tests.service.web.asks import colours, refused

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "service" / "sample"
LETTERS = ("alpha", "omega", "theta")
SUPPORT = [(label, (SAMPLE / label / f"{n}.png").read_bytes()) for label in LETTERS for n in (1, 2, 3)]


def rejecting(artifact: Artifact) -> Artifact:
    """The same artifact, whose default learner says "none of these" of what scores low, whatever it could before."""
    quantiles = tuple(statistics.NormalDist(0, 3).inv_cdf(min(max(k / 200, 0.001), 0.999)) for k in range(201))
    others = {field.name: (0.0, 0.0, 0.0, 1.0, 0.0) for field in dataclasses.fields(Rejection)}
    others |= {name: (0.0,) * 5 for name in others if name.startswith("spread")}
    rejection = Rejection(**{**others, "quantiles": quantiles})
    manifest = dataclasses.replace(artifact.manifest, rejections={artifact.manifest.default: rejection})
    return dataclasses.replace(artifact, manifest=manifest)


@contextlib.contextmanager
def service(name: str, **settings: Any) -> Iterator[httpx.Client]:
    """One that serves an artifact that ships, and knows the task `letters`."""
    artifact = rejecting(Artifact.load(PRETRAINED / name))
    with served(create_app(Settings(**settings), artifact=artifact, store=MemoryStore())) as client:
        assert client.put("/v1/tasks/letters", files=SUPPORT).status_code == 201
        yield client


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with service("characters", reject=0.1) as client:
        yield client


def unpacked(answer: httpx.Response, folder: Path) -> Path:
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.slow
def test_the_file_is_sent_under_the_name_of_the_task_and_a_tag_of_what_it_is_made_of(http: httpx.Client) -> None:
    head = http.get("/v1/tasks/letters").json()["head"]
    answer = http.get("/v1/tasks/letters/export?precision=int8")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="fewshot-letters-v1.onnx"'
    assert answer.headers["etag"] == f'"v1-{head}-int8-0.1.onnx"'
    session = onnxruntime.InferenceSession(answer.content)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["labels"]) == list(LETTERS)
    assert (facts["task"], facts["version"], facts["head"], facts["reject"]) == ("letters", "1", head, "0.1")
    assert session.get_inputs()[0].shape == ["n", 28, 28, 1]
    for known in (answer.headers["etag"], f'"x", W/{answer.headers["etag"]}', "*"):
        again = http.get("/v1/tasks/letters/export?precision=int8", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.slow
def test_another_file_of_the_same_head_has_another_tag(http: httpx.Client) -> None:
    known, tags = {}, set()
    for query in ("precision=float32", "precision=int8", "precision=float32&format=zip", "precision=int8&format=zip"):
        answer = http.get(f"/v1/tasks/letters/export?{query}", headers=known)
        assert answer.status_code == 200
        tags.add(answer.headers["etag"])
        known = {"If-None-Match": ", ".join(tags)}
    http.put("/v1/tasks/back", files=SUPPORT)
    query = "/v1/tasks/back/export?precision=float32"
    first = http.get(query).headers["etag"]
    http.post("/v1/tasks/back/examples", files=[("alpha", (SAMPLE / "alpha" / "4.png").read_bytes())])
    assert http.post("/v1/tasks/back/rollback?version=1").status_code == 200  # the same head, as another version
    assert http.get(query, headers={"If-None-Match": first}).status_code == 200
    with service("characters", reject=0.2) as other:  # the same task, and another number in its file
        answer = other.get("/v1/tasks/letters/export?precision=float32", headers=known)
        assert answer.status_code == 200


def test_the_file_follows_the_task(http: httpx.Client) -> None:
    http.put("/v1/tasks/moving", files=SUPPORT[:6])
    first = http.get("/v1/tasks/moving/export")
    http.post("/v1/tasks/moving/examples", files=SUPPORT[6:])
    second = http.get("/v1/tasks/moving/export", headers={"If-None-Match": first.headers["etag"]})
    assert second.status_code == 200
    assert second.headers["content-disposition"].endswith('-moving-v2.onnx"')
    ways = [onnxruntime.InferenceSession(f.content).get_outputs()[0].shape[1] for f in (first, second)]
    assert ways == [2, 3]


def test_the_golden_vectors_are_what_the_service_says_of_those_pixels(http: httpx.Client, tmp_path: Path) -> None:
    folder = unpacked(http.get("/v1/tasks/letters/export?format=zip"), tmp_path)
    golden = np.load(folder / "golden.npz")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    found = session.run(["probabilities", "known"], {"pixels": golden["pixels"]})
    for one, wanted in zip(found, (golden["probabilities"], golden["known"]), strict=True):
        assert np.abs(one - wanted).max() < 1e-4
    images = []
    for pixels in golden["pixels"]:  # of the size of the input, so that the service sees these very pixels
        out = io.BytesIO()
        Image.fromarray(pixels[:, :, 0]).save(out, "PNG")
        images.append(("image", out.getvalue()))
    rows = http.post("/v1/tasks/letters/classify?reject=off", files=images).json()["predictions"]
    assert len(rows) == 8
    for row, probabilities, known in zip(rows, golden["probabilities"], golden["known"], strict=True):
        np.testing.assert_allclose(list(row["probabilities"].values()), probabilities, atol=1e-4)
        assert abs(row["known"] - known) < 1e-4


def test_the_int8_graph_can_be_asked_for_and_is_half_the_size(http: httpx.Client) -> None:
    plain, small = (http.get(f"/v1/tasks/letters/export?precision={p}") for p in ("float32", "int8"))
    assert len(small.content) < 0.6 * len(plain.content)
    assert onnxruntime.InferenceSession(small.content).get_modelmeta().custom_metadata_map["precision"] == "int8"


def test_the_python_of_the_documentation_runs_as_it_is_written(
    http: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    (tmp_path / "letters.onnx").write_bytes(http.get("/v1/tasks/letters/export").content)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    said = capsys.readouterr().out
    assert re.fullmatch(r"\{'alpha': [-e0-9.]+, 'omega': [-e0-9.]+, 'theta': [-e0-9.]+\} [-e0-9.]+\n", said), said


@pytest.mark.slow
def test_a_service_that_runs_int8_exports_what_it_runs() -> None:
    with service("characters", precision="int8") as client:
        default = onnxruntime.InferenceSession(client.get("/v1/tasks/letters/export").content)
        assert default.get_modelmeta().custom_metadata_map["precision"] == "int8"
        assert client.get("/v1/tasks/letters/export?precision=float32").status_code == 200


@pytest.mark.slow
def test_many_at_once_are_all_answered(http: httpx.Client) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda _: len(http.get("/v1/tasks/letters/export").content), range(4)))
    assert len(set(sizes)) == 1
    assert sizes[0] > 1_000_000  # the weights are in it, in whichever precision the service runs


@pytest.mark.slow
def test_of_very_many_at_once_some_are_told_to_come_again(http: httpx.Client) -> None:
    """Each waits for all before it, those of other tenants too."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3 * MOST_ASKED) as pool:
        answers = list(pool.map(lambda _: http.get("/v1/tasks/letters/export"), range(3 * MOST_ASKED)))
    refusals = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refusals) <= 2 * MOST_ASKED
    for answer in refusals:
        refused(answer, 503, "overloaded", "exports")
        assert int(answer.headers["retry-after"]) >= 1
    assert http.get("/v1/tasks/letters/export").status_code == 200


def test_what_cannot_be_exported_is_refused_with_a_reason(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(http.get("/v1/tasks/nobody/export"), 404, "task_not_found")
    refused(http.get("/v1/tasks/no.name/export"), 422, "invalid_request")
    refused(http.get("/v1/tasks/letters/export?format=tar"), 422, "invalid_request")
    refused(http.get("/v1/tasks/letters/export?precision=int4"), 422, "invalid_request")
    refused(http.get("/v1/tasks/letters/export?formal=zip"), 422, "invalid_request")
    logits = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, features: 0.9 * logits(self, features))
    problem = refused(http.get("/v1/tasks/letters/export"), 409, "export_refused")
    assert "answers otherwise than the service" in problem["detail"]


def test_a_service_without_onnxruntime_says_where_to_go(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import models

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "models.extractor_onnx", raising=False)
    monkeypatch.delattr(models, "extractor_onnx", raising=False)
    problem = refused(http.get("/v1/tasks/letters/export"), 409, "export_refused")
    assert "on a CPU" in problem["detail"]


@pytest.mark.slow
def test_a_task_of_another_artifact_is_stale(tmp_path: Path) -> None:
    store = MemoryStore()
    before, now = (tiny_artifact(tmp_path / name, name=name) for name in ("before", "now"))
    with served(create_app(Settings(), artifact=before, extractor=MeanColour(), store=store)) as client:
        client.put("/v1/tasks/old", files=colours("red", "blue"))
    with served(create_app(Settings(), artifact=now, extractor=MeanColour(), store=store)) as client:
        refused(client.get("/v1/tasks/old/export"), 409, "task_stale")


@pytest.mark.slow
def test_a_task_leaves_with_a_key_of_its_tenant_only(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    ours, theirs = (
        {"Authorization": f"Bearer {create(file, tenant=tenant, scopes=['adapt'])[1]}"} for tenant in ("we", "they")
    )
    artifact = Artifact.load(PRETRAINED / "characters")
    settings = Settings(keys_file=file)
    with served(create_app(settings, artifact=artifact, store=MemoryStore())) as client:
        client.put("/v1/tasks/letters", files=SUPPORT, headers=ours)
        refused(client.get("/v1/tasks/letters/export"), 401, "unauthorized")
        refused(client.get("/v1/tasks/letters/export", headers=theirs), 404, "task_not_found")
        assert client.get("/v1/tasks/letters/export", headers=ours).status_code == 200


# Another Python.


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


def pictures(folder: Path) -> list[Path]:
    """Letters in every way that a picture can be a file: sizes, modes, formats, turned, see-through."""
    found = []

    def keep(image: Image.Image, name: str, **options: Any) -> None:
        image.save(folder / name, **options)
        found.append(folder / name)

    for label in LETTERS:
        for n in (4, 5):
            found.append(SAMPLE / label / f"{n}.png")
        letter = Image.open(SAMPLE / label / "6.png").convert("L")
        large = letter.resize((900, 620), Image.Resampling.BICUBIC)
        keep(large.convert("RGB"), f"{label}-large.jpg", quality=90)
        keep(large, f"{label}-grey.jpg")
        turned, exif = large.convert("RGB").transpose(Image.Transpose.ROTATE_90), Image.Exif()
        exif[0x0112] = 6
        keep(turned, f"{label}-turned.jpg", exif=exif)
        keep(turned, f"{label}-turned.png", exif=exif)
        keep(large.convert("RGB"), f"{label}.webp", lossless=True)
        glass = Image.new("RGBA", large.size, (0, 0, 0, 0))
        glass.putalpha(large.point(lambda value: 255 - value))
        keep(glass, f"{label}-glass.png")
        keep(Image.fromarray(np.asarray(large, np.uint16) * 257), f"{label}-deep.png")
        keep(large.convert("RGB").quantize(16), f"{label}-palette.png")
        keep(letter.resize((40, 31)), f"{label}-tiny.png")
    for turn in range(2, 9):
        exif[0x0112] = turn
        keep(large, f"turn-{turn}.webp", exif=exif)
    # What Pillow turns and the service does not.
    keep(large, "xmp.jpg", xmp=XMP)
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    keep(large, "xmp.png", pnginfo=info)
    info = PngInfo()
    raw = exif.tobytes()
    info.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)
    keep(large, "raw.png", pnginfo=info)
    long = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 4, 1, 6, 0)  # a number of four bytes and not of two
    keep(large, "long.jpg", exif=b"Exif\0\0" + long)
    rng = np.random.default_rng(0)
    keep(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "noise.png")
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds onnxruntime, numpy and Pillow, and no other."""
    import PIL

    folder = tmp_path_factory.mktemp("bare")
    site = Path(PIL.__file__).parents[1]
    for name in ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs"):
        if (site / name).exists():  # the .libs are those of Linux
            (folder / name).symlink_to(site / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["characters", "photos"])
def test_the_runner_says_the_same_in_a_python_that_has_nothing_of_ours(
    http: httpx.Client, bare: Path, tmp_path: Path, name: str
) -> None:
    with contextlib.ExitStack() as stack:
        client = http if name == "characters" else stack.enter_context(service(name, reject=0.1))
        folder = unpacked(client.get("/v1/tasks/letters/export?format=zip"), tmp_path / "unpacked")
        paths = pictures(tmp_path)
        rows = []
        for path in paths:
            answer = client.post("/v1/tasks/letters/classify", files=[("image", path.read_bytes())])
            assert answer.status_code == 200, answer.text
            rows += answer.json()["predictions"]
    program = f"import runpy, sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(bare)!r}]\n"
    program += "from PIL import Image; del Image.Image.has_transparency_data\n"  # which is newer than what it asks for
    program += f"sys.argv = ['run.py', *sys.argv[1:]]; runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *map(str, paths)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^(\S.*): (.+)\n((?:  .+\n)+)", done.stdout, re.MULTILINE)
    assert [path for path, _, _ in said] == [str(path) for path in paths]
    verdicts = set()
    for (path, verdict, shares), row in zip(said, rows, strict=True):
        verdicts.add(verdict)
        assert verdict == (row["label"] or "none of these"), path
        found = {label: float(share) for label, share in re.findall(r"  (\S+) ([0-9.]+)\n", shares)}
        assert found.keys() == row["probabilities"].keys()
        for label, share in found.items():
            assert abs(share - row["probabilities"][label]) < 1e-4, (path, label)
    assert verdicts > {*LETTERS} or name == "photos"
    assert "none of these" in verdicts
    assert len(verdicts) > 2


# A browser.


@pytest.mark.slow
def test_the_runtime_for_browsers_is_served_where_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def app() -> Any:
        return create_app(Settings(), artifact=tiny_artifact(tmp_path), extractor=MeanColour(), store=MemoryStore())

    monkeypatch.setattr(export, "OFFLINE", tmp_path)
    with served(app()) as client:
        refused(client.get("/offline/ort.wasm.min.mjs"), 404, "not_found")
    for name in export.RUNTIME:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "secret.txt").write_text("secret")
    with served(app()) as client:
        for name, media_type in export.RUNTIME.items():
            answer = client.get(f"/offline/{name}")
            assert (answer.status_code, answer.content) == (200, name.encode())
            assert answer.headers["content-type"].split(";")[0] == media_type
            assert "immutable" in answer.headers["cache-control"]
            head = client.head(f"/offline/{name}")
            assert (head.status_code, head.content) == (200, b"")
        assert client.get("/offline/ort-wasm-simd-threaded.wasm").headers["content-type"] == "application/wasm"
        for name in ("secret.txt", "..%2Fexport.py", "%2e%2e/export.py", "ort.wasm.min.mjs/x"):
            assert client.get(f"/offline/{name}").status_code == 404


@pytest.mark.slow
def test_the_runtime_for_browsers_needs_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "OFFLINE", tmp_path)
    for name in export.RUNTIME:
        (tmp_path / name).write_bytes(b"x")
    create(tmp_path / "keys.json", tenant="we", scopes=["adapt"])
    settings = Settings(keys_file=tmp_path / "keys.json")
    artifact = tiny_artifact(tmp_path)
    with served(create_app(settings, artifact=artifact, extractor=MeanColour(), store=MemoryStore())) as client:
        assert client.get("/offline/ort.wasm.min.mjs").status_code == 200
        assert client.get("/v1/tasks").status_code == 401


def chromium() -> str:
    """The path of a Chromium. Without it or the runtime, which is optional, the test is skipped; or fails where it was
    to be run."""
    required = os.environ.get("FEWSHOT_TEST_REQUIRE", "").split(",")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    missing = "there is no Chromium" if not found else ""
    missing = missing or ("" if export.runtime_is_there() else "`make offline` has fetched nothing")
    if ("browser" in required and not found) or ("offline" in required and missing):
        pytest.fail(f"{missing}, and FEWSHOT_TEST_REQUIRE asks for it")
    if missing or found is None:
        pytest.skip(missing)
    return found


IN_THE_BROWSER = """async ({model, pixels, shape}) => {
    const ort = await import("/offline/ort.wasm.min.mjs");
    ort.env.wasm.numThreads = 1;
    const bytes = new Uint8Array(await (await fetch(model)).arrayBuffer());
    const session = await ort.InferenceSession.create(bytes, {executionProviders: ["wasm"]});
    const answer = await session.run({pixels: new ort.Tensor("uint8", Uint8Array.from(pixels), shape)});
    return {
        probabilities: [...answer.probabilities.data],
        known: [...answer.known.data],
        dims: answer.probabilities.dims,
    };
}"""


@pytest.mark.browser
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_file_runs_in_a_browser_and_says_the_same(http: httpx.Client, tmp_path: Path, precision: str) -> None:
    program = chromium()
    from playwright.sync_api import sync_playwright

    model = f"/v1/tasks/letters/export?precision={precision}"
    golden = np.load(unpacked(http.get(f"{model}&format=zip"), tmp_path) / "golden.npz")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(str(http.base_url.join("/")))  # under the policy of the page itself
        pixels = golden["pixels"]
        given = {"model": model, "pixels": pixels.ravel().tolist(), "shape": list(pixels.shape)}
        found = page.evaluate(IN_THE_BROWSER, given)
        browser.close()
    assert found["dims"] == list(golden["probabilities"].shape)
    assert np.abs(np.reshape(found["probabilities"], found["dims"]) - golden["probabilities"]).max() < 1e-3
    assert np.abs(np.array(found["known"]) - golden["known"]).max() < 1e-3
    assert any(url.endswith("ort-wasm-simd-threaded.wasm") for url in asked)
    assert all(url.startswith((str(http.base_url), "blob:", "data:")) for url in asked)
