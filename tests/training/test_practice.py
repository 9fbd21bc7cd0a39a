from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs, noise

pytestmark = pytest.mark.torch
needs("torch")

import torch

from models.images import ImageDecoder
from models.learners import build
from models.resnet import SHAPES, ImageExtractor, ResNet
from training import data, evaluate, metatrain, practice, pretrained, synthetic
from training.config import MetatrainConfig, PretrainConfig
from training.episodes import frozen
from training.folders import DataError

PRETRAINED = PretrainConfig(data=Path("d"), out=Path("o"), shape="tiny", size=16, precision="float32")
CPU = torch.device("cpu")


def config(**given: Any) -> MetatrainConfig:
    return MetatrainConfig(**{"data": Path("d"), "out": Path("o"), "views": 1, "slots": 16, **given})


def clouds(seed: int = 0) -> practice.Tasks:
    """Twelve classes as clouds on a sphere, wide in directions that tell classes apart badly; two rows a thing."""
    rng = np.random.default_rng([5, seed])
    labels = np.repeat(np.arange(12), 16)
    spread = np.where(np.arange(10) < 4, 0.9, 0.25)
    features = rng.normal(size=(12, 10))[labels] * 0.5 + rng.normal(size=(len(labels), 10)) * spread
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return practice.Tasks(features.astype(np.float32), labels, np.arange(len(labels)) // 2, plain=len(labels))


@pytest.fixture
def extractor() -> ImageExtractor:
    torch.manual_seed(0)
    return ImageExtractor(ResNet(SHAPES["tiny"])).eval()


@pytest.mark.parametrize("rotations", [False, True])
def test_features_are_those_of_the_images_and_then_of_views_of_them(extractor: ImageExtractor, rotations: bool) -> None:
    images = noise(3, 4)
    tasks = practice.cached(extractor, images, config(views=2, rotations=rotations), PRETRAINED, seed=1)
    images = evaluate.turned(images) if rotations else images
    n = len(images)
    assert tasks.features.shape == (3 * n, 8)
    np.testing.assert_allclose(tasks.features[:n], pretrained.embed(extractor, images.pixels, CPU), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(tasks.features, axis=1), 1, atol=1e-3)
    assert np.array_equal(tasks.labels, np.tile(images.labels, 3))
    plain, first, second = tasks.features.reshape(3, n, 8)
    for views, others in ((first, plain), (second, plain), (first, second)):
        assert np.abs(views - others).max(axis=1).min() > 1e-4


def test_views_are_those_of_their_seed(extractor: ImageExtractor) -> None:
    def features(seed: int) -> np.ndarray:
        return practice.cached(extractor, noise(2, 3), config(views=2), PRETRAINED, seed=seed).features

    assert np.array_equal(features(1), features(1))
    assert np.array_equal(features(1)[:6], features(2)[:6])
    assert np.abs(features(1)[6:] - features(2)[6:]).max(axis=1).min() > 1e-4


def test_with_labels_the_views_of_one_image_are_one_thing(extractor: ImageExtractor) -> None:
    tasks = practice.cached(extractor, noise(3, 4), config(views=2), PRETRAINED, seed=0)
    assert len(tasks.pool.classes) == 3
    for label, things in enumerate(tasks.pool.classes):
        assert [set((rows % 12).tolist()) for rows in things] == [{4 * label + k} for k in range(4)]
        assert {len(rows) for rows in things} == {3}


def test_images_of_one_thing_are_one_thing_with_all_their_views(extractor: ImageExtractor) -> None:
    images = replace(noise(3, 4), groups=np.tile([7, 7, -1, -1], 3))
    tasks = practice.cached(extractor, images, config(views=2), PRETRAINED, seed=0)
    for label, things in enumerate(tasks.pool.classes):
        shown = sorted(sorted(set((rows % 12 - 4 * label).tolist())) for rows in things)
        assert shown == [[0, 1], [2], [3]]


def test_in_pseudo_tasks_an_image_is_a_class_and_its_views_are_its_examples(extractor: ImageExtractor) -> None:
    tasks = practice.cached(extractor, noise(3, 4), config(views=2, tasks="pseudo"), PRETRAINED, seed=0)
    assert len(tasks.pool.classes) == 12
    for number, things in enumerate(tasks.pool.classes):
        assert [rows.tolist() for rows in things] == [[number], [number + 12], [number + 24]]


@pytest.mark.parametrize(("kind", "pools"), [("clusters", 2), ("mixed", 3)])
def test_clusters_fine_and_coarse_are_pools_of_their_own(
    extractor: ImageExtractor, kind: str, pools: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(practice.pseudo, "FINE", 6)
    monkeypatch.setattr(practice.pseudo, "COARSE", 20)
    images = noise(6, 10)
    tasks = practice.cached(extractor, images, config(views=2, tasks=kind), PRETRAINED, seed=0)
    assert len(tasks.pools) == pools
    fine, coarse, *rest = tasks.pools
    assert fine is tasks.pool
    assert len(fine.classes) > 2 * len(coarse.classes)
    for pool in (fine, coarse):
        things = [rows % 60 for things in pool.classes for rows in things]
        assert all(len(set(rows.tolist())) == 1 and len(rows) == 3 for rows in things)  # an image with its views
        shown = {int(rows[0]) for rows in things}
        assert len(shown) == len(things) <= 54  # no image in two classes, and a tenth in none
    assert [len(pool.classes) for pool in rest] == [60] * (pools - 2)
    assert tasks.near().shape == (len(fine.classes),) * 2
    build("lstm", metatrain.start("lstm", tasks, config()))


def test_classes_are_near_by_the_angle_between_their_means() -> None:
    tasks = clouds()
    near = tasks.near()
    means = np.stack([tasks.features[tasks.labels == label].mean(axis=0) for label in range(12)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(near, means @ means.T, atol=1e-5)


# Where episodes come from


def practised(extractor: ImageExtractor, asked: MetatrainConfig, **given: Any) -> tuple[practice.Tasks, Any]:
    pretrained = PretrainConfig(**{**PRETRAINED.model_dump(), **given})
    return practice.practice(extractor, ImageDecoder(16, 16, 3), asked, pretrained)


def test_without_more_the_classes_that_are_remembered_are_practised_on(extractor: ImageExtractor, shapes: Path) -> None:
    remembered, (source,) = practised(extractor, config(data=shapes))
    assert source.tasks is remembered
    assert len(source.owners) == len(practice.slots_of(remembered, 16, seed=0)[0])


def test_only_what_was_labelled_for_the_extractor_is_remembered(extractor: ImageExtractor, shapes: Path) -> None:
    expected = data.load(shapes, "train", ImageDecoder(16, 16, 3), labelled=0.3)
    remembered, _ = practised(extractor, config(data=shapes), labelled=0.3)
    assert remembered.plain == len(expected)
    assert np.array_equal(remembered.labels[: remembered.plain], expected.labels)


def test_what_is_labelled_is_told_for_the_split_of_the_extractor_alone(extractor: ImageExtractor, shapes: Path) -> None:
    with pytest.raises(DataError, match="dealt for the split 'all'"):
        practised(extractor, config(data=shapes), labelled=0.3, split="all")


def test_classes_held_out_are_practised_on_and_never_remembered(extractor: ImageExtractor, shapes: Path) -> None:
    images = data.load(shapes, "train", ImageDecoder(16, 16, 3))
    known, unknown = data.hold_out(images, 2)
    remembered, (source,) = practised(extractor, config(data=shapes), hold_out=2)
    for tasks, expected in ((remembered, known), (source.tasks, unknown)):
        assert np.array_equal(tasks.labels[: tasks.plain], expected.labels)
        embedded = pretrained.embed(extractor, expected.pixels, CPU)
        np.testing.assert_allclose(tasks.features[: tasks.plain], embedded, atol=1e-6)
    assert source.owners is None


def test_other_folders_are_practised_on_as_well(extractor: ImageExtractor, shapes: Path, tmp_path: Path) -> None:
    other = synthetic.write(tmp_path / "other", classes=5, images=4, size=20, seed=3)
    _, (first, second) = practised(extractor, config(data=shapes, practise=str(other)))
    assert first.owners is not None
    assert second.owners is None  # the memory knows nothing of them
    assert len(second.tasks.pool.classes) == 3  # those of its training split


def test_slots_of_the_classes_of_an_episode_are_left_out() -> None:
    tasks = clouds()
    slots, owners = practice.slots_of(tasks, 24, seed=0)
    assert owners is not None
    assert len(slots) == len(owners) == 24
    episodes = frozen(tasks.pool, way=4, shot=2, queries=2, count=5, seed=0)
    kept = practice.Source(tasks, owners).kept(episodes)
    assert kept is not None
    for episode, keep in zip(episodes, kept, strict=True):
        shown = set(tasks.labels[episode.support].tolist())
        assert set(owners[~keep].tolist()) == shown
        assert set(owners[keep].tolist()) == set(range(12)) - shown


def test_an_episode_of_every_class_keeps_the_memory() -> None:
    tasks = clouds()
    _, owners = practice.slots_of(tasks, 12, seed=0)
    (kept,) = practice.Source(tasks, owners).kept(frozen(tasks.pool, way=12, shot=1, queries=1, count=1, seed=0)) or []
    assert kept.all()


def test_where_classes_are_too_many_slots_are_no_ones() -> None:
    slots, owners = practice.slots_of(clouds(), 11, seed=0)
    assert len(slots) == 11
    assert owners is None
    assert practice.Source(clouds(), owners).kept([]) is None
