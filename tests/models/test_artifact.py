"""What an artifact asks of an extractor before it is served; its folder is the matter of training/test_export.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from safetensors.numpy import load

from models.artifact import PROBE, PROBE_TOLERANCE, Artifact
from models.errors import ArtifactInvalid
from service.settings import PRETRAINED


@pytest.fixture(scope="module")
def characters() -> Artifact:
    return Artifact.load(PRETRAINED / "characters")


class Off:
    """The features of the probe, one number of them off by so much."""

    def __init__(self, artifact: Artifact, by: float):
        self.dim = artifact.manifest.dim
        self._probe = load((artifact.path / PROBE).read_bytes())
        self._by = by

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        assert np.array_equal(batch, self._probe["images"])
        features = self._probe["features"].copy()
        features[-1, -1] += self._by
        return features


@pytest.mark.parametrize("precision", PROBE_TOLERANCE)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_extractor_may_differ_from_the_probe_by_so_much_in_its_precision_and_no_more(
    characters: Artifact, precision: str, sign: int
) -> None:
    most = PROBE_TOLERANCE[precision]
    found = characters.check(Off(characters, sign * 0.9 * most), precision=precision)
    assert found == pytest.approx(0.9 * most, rel=1e-3)
    with pytest.raises(ArtifactInvalid, match="other features than the probe expects"):
        characters.check(Off(characters, sign * 1.1 * most), precision=precision)


def test_an_extractor_that_gives_no_numbers_is_refused(characters: Artifact) -> None:
    with pytest.raises(ArtifactInvalid, match="other features"):
        characters.check(Off(characters, math.nan), precision="int8")
