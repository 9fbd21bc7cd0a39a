from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from models.images import ImageDecoder
from training import data, synthetic

DECODER = ImageDecoder(32, 32, 3)


def test_every_class_has_its_images_and_all_can_be_read(tmp_path: Path) -> None:
    assert synthetic.write(tmp_path / "set", classes=4, images=3) == tmp_path / "set"
    images = data.load(tmp_path / "set", "all", DECODER)
    assert images.classes == ("class00", "class01", "class02", "class03")
    assert np.bincount(images.labels).tolist() == [3] * 4


def test_the_seed_decides(tmp_path: Path) -> None:
    one, same, other = (
        data.load(synthetic.write(tmp_path / name, classes=2, images=2, seed=seed), "all", DECODER).pixels
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_no_two_images_are_the_same(tmp_path: Path) -> None:
    images = data.load(synthetic.write(tmp_path, classes=3, images=10), "all", DECODER)
    assert len({image.tobytes() for image in images.pixels}) == 30


def test_a_class_keeps_its_colour_and_classes_differ_in_theirs() -> None:
    rng = random.Random(0)

    def colour(label: int) -> tuple[float, float]:
        """The direction of the hue in the middle of a picture, where the shape is."""
        middle = np.asarray(synthetic.draw(label, (label * 0.618) % 1.0, 48, rng).convert("HSV"))[24, 24]
        angle = middle[0] / 256 * 2 * np.pi
        return float(np.cos(angle)), float(np.sin(angle))

    found = np.array([[colour(label) for _ in range(12)] for label in range(5)])
    means = found.mean(axis=1)
    within = np.linalg.norm(found - means[:, None], axis=2).max()
    between = min(np.linalg.norm(means[i] - means[j]) for i in range(5) for j in range(i))
    assert within < 0.1 < between


def test_a_picture_has_the_size_asked_for() -> None:
    assert synthetic.draw(2, 0.5, 40, random.Random(0)).size == (40, 40)
