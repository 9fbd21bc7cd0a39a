from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.training.conftest import needs, noise

pytestmark = pytest.mark.torch
needs("torch")

import torch

from models import artifact
from models.resnet import SHAPES, ResNet
from tests.training.runs import config
from training import checkpoint, pretrained, splits
from training.folders import DataError


def test_the_extractor_of_a_finished_run_is_loaded_with_its_settings(unbroken: Path) -> None:
    extractor, settings = pretrained.load_extractor(unbroken)
    assert settings.size == 32
    assert not extractor.training
    pixels = noise(2, 3, size=32).pixels
    features = pretrained.embed(extractor, pixels, torch.device("cpu"))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-3)
    state = checkpoint.load(unbroken / pretrained.CHECKPOINT)
    backbone = ResNet(SHAPES["tiny"])
    backbone.load_state_dict({n.removeprefix("backbone."): v for n, v in state["network"].items() if "backbone" in n})
    with torch.inference_mode():
        pooled = backbone.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
        expected = extractor.normalise(pooled).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_missing_checkpoint_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"run `python -m training pretrain --out {tmp_path}` first"):
        pretrained.load_extractor(tmp_path)


def test_an_extractor_knows_the_classes_behind_it_those_of_its_start_among_them(
    unbroken: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = splits.split_classes(shapes, [path.name for path in shapes.iterdir()])["train"]
    assert pretrained.classes_of(unbroken) == splits.digests(names)
    expected = splits.digests([*names, "more"])
    assert pretrained.learned(config(start=unbroken), ["more"]) == expected
    (tmp_path / artifact.MANIFEST).touch()
    start = SimpleNamespace(manifest=SimpleNamespace(classes={"learned": splits.digests(names)}))
    monkeypatch.setattr(artifact.Artifact, "load", lambda _: start)
    assert pretrained.learned(config(start=tmp_path), ["more"]) == expected
    assert pretrained.learned(config(start=tmp_path / "gone"), ["more"]) == splits.digests(["more"])
