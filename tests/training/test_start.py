from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch

from models.artifact import Artifact
from models.extractor_torch import TorchExtractor
from models.resnet import ImageExtractor
from training.pretrained import embed
from training.start import convolutions, from_artifact, is_artifact

CHARACTERS = Path(__file__).resolve().parents[2] / "models" / "pretrained" / "characters"


def test_a_network_with_its_normalisation_put_back_computes_what_the_artifact_does() -> None:
    artifact = Artifact.load(CHARACTERS)
    pixels = torch.randint(0, 256, (64, *artifact.decoder().shape), dtype=torch.uint8)
    told = TorchExtractor(artifact, device="cpu")(pixels.numpy())
    backbone = from_artifact(artifact, pixels)
    assert any(isinstance(bn, torch.nn.BatchNorm2d) for _, bn in convolutions(backbone))
    centre = torch.from_numpy(_centre(artifact))
    again = embed(ImageExtractor(backbone, centre), pixels.numpy(), torch.device("cpu"))
    assert abs(again - told).max() < 1e-4


def test_normalisation_has_the_statistics_of_the_images_given() -> None:
    artifact = Artifact.load(CHARACTERS)
    pixels = torch.randint(0, 256, (64, *artifact.decoder().shape), dtype=torch.uint8)
    backbone = from_artifact(artifact, pixels).eval()
    x = pixels.permute(0, 3, 1, 2).float() / 255
    out = backbone.conv((x - backbone.mean) * backbone.scale)
    assert backbone.bn.running_mean is not None
    assert torch.allclose(backbone.bn.running_mean, out.mean(dim=(0, 2, 3)), atol=1e-4)


def test_an_artifact_is_told_from_a_run(tmp_path: Path) -> None:
    assert is_artifact(CHARACTERS)
    assert not is_artifact(tmp_path)


def _centre(artifact: Artifact):  # type: ignore[no-untyped-def]
    from safetensors.numpy import load_file

    return load_file(artifact.path / "extractor.safetensors")["centre"].astype("float32")
