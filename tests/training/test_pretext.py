from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch

from models.resnet import SHAPES, ImageExtractor, ResNet
from training import pretext, pretrain
from training.config import PretextConfig, PretrainConfig
from training.pretexts import ORDERS, PRETEXTS, SIDE, orders


def noise(n: int = 4, size: int = 18) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PRETEXTS)
def test_every_answer_alters_the_images_in_its_own_way(name: str) -> None:
    images = noise()
    kept = images.clone()
    forms = [PRETEXTS[name].alter(images, answer) for answer in range(PRETEXTS[name].way)]
    assert all(form.shape == images.shape for form in forms)
    assert all(
        not torch.equal(one, other) for number, one in enumerate(forms) for other in [images, *forms[number + 1 :]]
    )
    assert torch.equal(images, kept)
    assert all(torch.equal(form, PRETEXTS[name].alter(images, answer)) for answer, form in enumerate(forms))


def test_the_orders_of_the_tiles_are_far_apart() -> None:
    found = orders(ORDERS)
    assert (np.sort(found, axis=1) == np.arange(SIDE**2)).all()
    apart = [(one != other).sum() for number, one in enumerate(found) for other in found[number + 1 :]]
    assert min(apart) >= 8


def test_a_slanted_image_shows_its_round_middle_alone_and_four_quarter_turns_are_one() -> None:
    images = noise(2, 20)
    forms = [PRETEXTS["rotation-45"].alter(images, answer) for answer in range(4)]
    for form in forms:
        assert bool((form[:, :, :2, :2] == 0.5).all())
    torch.testing.assert_close(forms[2], torch.rot90(forms[0], 2, (2, 3)), atol=1e-4, rtol=0)


def test_only_the_place_that_is_asked_for_is_of_another_image() -> None:
    images = noise(3, 9)
    found = PRETEXTS["inpainting-position"].alter(images, 5)  # second row, third column
    assert torch.equal(found[1, :, 3:6, 6:9], images[0, :, 3:6, 6:9])
    found[:, :, 3:6, 6:9] = images[:, :, 3:6, 6:9]
    assert torch.equal(found, images)


def test_features_are_those_of_each_form() -> None:
    torch.manual_seed(0)
    extractor = ImageExtractor(ResNet(SHAPES["tiny"])).eval()
    pixels = (noise().permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy()
    task = PRETEXTS["jigsaw-3x3"]
    found = pretext.features(extractor, pixels, task, torch.device("cpu"))
    assert found.shape == (4, ORDERS, 8)
    third = task.alter(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, 3)
    with torch.no_grad():
        expected = extractor.normalise(extractor.backbone(third)).numpy()
    np.testing.assert_allclose(found[:, 3], expected, atol=1e-5)


def told_apart(n: int, spread: float) -> np.ndarray:
    """Features [n, 3, 6] of unit length around three directions."""
    rng = np.random.default_rng(n)
    found = np.eye(6)[:3] + spread * rng.standard_normal((n, 3, 6))
    return np.asarray(found / np.linalg.norm(found, axis=2, keepdims=True), np.float32)


def test_both_heads_learn_what_can_be_told_apart_and_only_that() -> None:
    known, asked = told_apart(40, 0.2), told_apart(60, 0.2)
    assert pretext.accuracy(pretext.quick(known[:10], 10), asked) > 0.9
    assert pretext.accuracy(pretext.thorough(known), asked) > 0.95
    nothing = np.random.default_rng(0).standard_normal((300, 3, 6)).astype(np.float32)
    assert abs(pretext.accuracy(pretext.thorough(nothing[:100]), nothing[100:]) - 1 / 3) < 0.1


def test_the_thorough_head_fits_better_than_the_quick_one() -> None:
    known = told_apart(50, 0.6)
    assert pretext.accuracy(pretext.thorough(known), known) >= pretext.accuracy(pretext.quick(known, 10), known)


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    pretrain.main(
        PretrainConfig(
            data=shapes, out=out, shape="tiny", size=18, batch=16, epochs=1, precision="float32", device="cpu"
        )
    )
    return out


def test_each_extractor_and_one_of_random_weights_on_each_task(
    shapes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "rows.jsonl"
    config = PretextConfig(
        data=shapes, extractors=f"mine={trained}", results=results, draws=3, images=5, full=30, asked=10, device="cpu"
    )
    found = pretext.main(config)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert rows == found
    assert [(row["method"], row["task"]) for row in rows] == [
        (name, task) for name in ("random", "mine") for task in PRETEXTS
    ]
    for row in rows:
        assert row["experiment"] == "pretext"
        assert row["shot"] == 5
        assert row["full_images"] == 30
        assert row["asked_images"] == 10
        assert row["ratio"] == pytest.approx(100 * row["accuracy"] / row["full"], rel=2e-3)
        above = (
            (row["accuracy"] - row["chance"]) / (row["full"] - row["chance"]) if row["full"] > row["chance"] else None
        )
        assert row["ratio_above_chance"] == (above if above is None else pytest.approx(100 * above, rel=0.02, abs=0.5))
        assert row["command"].startswith(f"python -m training pretext --data DATA/shapes --extractors mine={trained}")
    assert rows[3]["objectives"] == "contrastive=1"
    assert capsys.readouterr().out.count("| mine |") == 3
    assert pretext.main(config) != []
    again = [json.loads(line) for line in results.read_text().splitlines()][len(rows) :]
    same = ("accuracy", "full", "ratio")
    assert [[row[key] for key in same] for row in again] == [[row[key] for key in same] for row in rows]


def test_extractors_of_different_sizes_are_refused(shapes: Path, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pretrain.main(
        PretrainConfig(
            data=shapes, out=other, shape="tiny", size=16, batch=16, epochs=1, precision="float32", device="cpu"
        )
    )
    with pytest.raises(SystemExit, match="must be of one shape and size"):
        pretext.main(PretextConfig(data=shapes, extractors=f"a={trained},b={other}", results=tmp_path / "x"))


def test_without_a_file_for_them_rows_are_printed_alone(
    shapes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"extractors": f"mine={trained}", "draws": 2, "images": 2, "full": 10, "asked": 4, "device": "cpu"}
    assert len(pretext.main(PretextConfig(data=shapes, **given))) == 6
    assert capsys.readouterr().out.count("| mine |") == 3
    assert list(tmp_path.iterdir()) == []
