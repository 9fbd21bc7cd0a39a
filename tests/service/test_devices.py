"""The same answers wherever the extractor and the learners run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from models import extractor
from models.extractor import best_device
from service.settings import PRETRAINED, Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.fakes import picture
from tests.service.live import served

pytestmark = [pytest.mark.torch, pytest.mark.slow]
SAMPLE = Path(__file__).resolve().parents[2] / "service" / "sample"
SUPPORT = [
    (label, (SAMPLE / label / f"{n}.png").read_bytes()) for label in ("alpha", "theta", "omega") for n in (1, 2, 3)
]
QUERIES = [
    ("image", (SAMPLE / label / f"{n}.png").read_bytes()) for label in ("alpha", "theta", "omega") for n in (7, 8)
]


def answers(device: str, artifact: str) -> dict[str, np.ndarray]:
    """Probabilities [queries, way] by method."""
    settings = Settings(
        device=device,  # type: ignore[arg-type]
        adapt_device=device,  # type: ignore[arg-type]
        artifact=PRETRAINED / artifact,
        precision="float32",  # torch has no other
    )
    found = {}
    with served(create_app(settings, store=MemoryStore())) as http:
        for method in [method["name"] for method in http.get("/v1/artifact").json()["methods"]]:
            files = [*SUPPORT, ("unlabelled", picture("red"))]
            taught = http.put(f"/v1/tasks/{method}?method={method}", files=files)
            assert taught.status_code == 201, taught.text
            rows = http.post(f"/v1/tasks/{method}/classify", files=QUERIES).json()["predictions"]
            found[method] = np.array([list(row["probabilities"].values()) for row in rows])
    return found


def test_where_no_driver_is_torch_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor, "DRIVERS", ("/no/such/driver",))
    monkeypatch.setitem(sys.modules, "models.extractor_torch", None)  # to import it would fail
    monkeypatch.setattr(sys, "platform", "linux")
    assert not extractor.may_have_gpu()
    assert best_device() == "cpu"
    monkeypatch.setattr(sys, "platform", "win32")
    assert extractor.may_have_gpu()  # there is no file to look for


@pytest.mark.parametrize("artifact", ["photos", "characters"])
@pytest.mark.parametrize("device", ["torch-cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_answers_like_onnxruntime_and_numpy(device: str, artifact: str) -> None:
    if device == "cuda" and best_device() != "cuda":
        pytest.skip("there is no CUDA device here")
    plain, other = answers("cpu", artifact), answers(device, artifact)
    assert plain.keys() == other.keys()
    assert {"prototype", "ridge", "whitened", "gradient", "lstm"} <= set(plain)
    for method, expected in plain.items():
        assert np.abs(other[method] - expected).max() < 1e-3, method
