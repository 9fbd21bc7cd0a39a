"""Several views of an image: what is looked at, and that their features are averaged."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from models.views import MOST, Views, seen
from service.settings import Settings
from training.config import EvaluateConfig


class Kept:
    """Remembers what it was shown; features are mean colours of the left and right half."""

    dim = 2

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.batches.append(batch)
        middle = batch.shape[2] // 2
        halves = np.stack([part.mean(axis=(1, 2, 3)) for part in (batch[:, :, :middle], batch[:, :, middle:])], axis=1)
        return (halves / np.linalg.norm(halves, axis=1, keepdims=True)).astype(np.float32)


def images(channels: int) -> np.ndarray:
    """Two images, dark left and bright right, with a border that is brighter still."""
    batch = np.full((2, 20, 30, channels), 40, np.uint8)
    batch[:, :, 15:] = 80
    batch[1] += 20
    batch[:, :2] = batch[:, -2:] = batch[:, :, :3] = batch[:, :, -3:] = 250
    return batch


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_seen_whole_then_its_middle_then_mirrored(channels: int) -> None:
    inner, batch = Kept(), images(channels)
    Views(inner, MOST)(batch)
    whole, middle, mirrored = inner.batches
    assert (whole == batch).all()
    assert (mirrored == batch[:, :, ::-1]).all()
    assert {view.shape for view in inner.batches} == {batch.shape}
    assert {view.dtype for view in inner.batches} == {np.dtype(np.uint8)}
    assert middle.max() < 250  # seven tenths of each edge leave the border out
    assert (middle[0, :, :13] == 40).all()  # and what is there stays where it is
    assert (middle[0, :, 17:] == 80).all()
    assert (middle[1] == middle[0] + 20).all()


@pytest.mark.parametrize("views", range(1, MOST + 1))
def test_the_features_are_the_mean_of_those_of_the_views_at_unit_length(views: int) -> None:
    inner, batch = Kept(), images(3)
    extractor = Views(inner, views)
    features = extractor(batch)
    assert len(inner.batches) == views
    mean = np.mean([Kept()(batch) for batch in inner.batches], axis=0)
    np.testing.assert_allclose(features, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-6)
    assert (features.dtype, extractor.dim) == (np.float32, 2)


def test_one_view_is_the_extractor_itself() -> None:
    inner = Kept()
    assert seen(inner, 1) is inner
    assert isinstance(seen(inner, 2), Views)


@pytest.mark.parametrize("views", [0, MOST + 1])
def test_there_are_no_more_views_than_these(views: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        Views(Kept(), views)
    for kind, given in ((Settings, {}), (EvaluateConfig, {"artifact": "a", "data": "d"})):
        with pytest.raises(ValidationError):
            kind.model_validate({**given, "views": views})
        kind.model_validate({**given, "views": MOST})
