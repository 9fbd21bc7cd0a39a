from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import needs, noise

pytestmark = pytest.mark.torch
needs("torch")

import torch

from models.resnet import SHAPES, ResNet
from training import checkpoint, data, pretrained


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
    with pytest.raises(data.DataError, match=f"run `python -m training pretrain --out {tmp_path}` first"):
        pretrained.load_extractor(tmp_path)
