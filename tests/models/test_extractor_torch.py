"""The extractor on torch: what is common to a CPU and a GPU, and, where there is a GPU, what it does there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch", "onnxruntime")

import torch

from models.artifact import Artifact
from models.errors import ArtifactInvalid
from models.extractor import load_extractor
from models.extractor_torch import SIZES, TorchExtractor, _cut
from service.settings import PRETRAINED


@pytest.fixture(scope="module")
def characters() -> Artifact:
    return Artifact.load(PRETRAINED / "characters")


def drawings(n: int) -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 2, (n, 7, 7, 1), dtype=np.uint8)
    return np.repeat(np.repeat(255 * coarse, 4, axis=1), 4, axis=2)


def test_bfloat16_gives_nearly_the_features_of_float32(characters: Artifact) -> None:
    exact = load_extractor(characters, device="torch-cpu")
    halved = load_extractor(characters, device="torch-cpu", precision="bfloat16")
    images = drawings(8)
    expected, found = exact(images), halved(images)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    assert 1e-5 < np.abs(found - expected).max() < 0.03
    assert (found @ expected.T).argmax(axis=1).tolist() == list(range(8))
    assert characters.check(halved, precision="bfloat16") < 0.03
    with pytest.raises(ArtifactInvalid):
        characters.check(halved)


@pytest.mark.parametrize(("device", "precision"), [("torch-cpu", "int8"), ("cpu", "bfloat16")])
def test_a_precision_that_is_of_another_device_is_refused_by_name(
    characters: Artifact, device: str, precision: str
) -> None:
    with pytest.raises(ArtifactInvalid, match=f"{precision} is for a .PU: on a .PU FEWSHOT_PRECISION is float32 or"):
        load_extractor(characters, device=device, precision=precision)


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 300])
def test_a_batch_larger_than_any_that_is_recorded_is_cut(n: int) -> None:
    parts = _cut(np.arange(n))
    assert np.concatenate(parts).tolist() == list(range(n))
    assert max(map(len, parts)) <= SIZES[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 3, 16, 130])
def test_a_recorded_batch_of_any_size_is_what_the_network_computes(
    characters: Artifact, precision: str, n: int
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    recorded = TorchExtractor(characters, precision=precision)
    images = drawings(n)
    for _ in range(2):
        found = recorded(images)
        assert found.shape == (n, characters.manifest.dim)
        assert np.abs(found - TorchExtractor(characters, device="cpu")(images)).max() < 0.03


def test_a_batch_that_the_card_has_no_memory_for_is_seen_in_halves(characters: Artifact) -> None:
    seen: list[int] = []

    class Card(TorchExtractor):
        room = 5

        def _graph(self, part: np.ndarray) -> Any:
            if len(part) > self.room:
                raise torch.OutOfMemoryError
            seen.append(len(part))
            return lambda part: part.astype(np.float32)

    card = Card(characters, device="cpu")
    batch = np.arange(12, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(np.concatenate(card._features(batch)), batch)
    assert seen == [3, 3, 3, 3]
    Card.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        card._features(batch)
