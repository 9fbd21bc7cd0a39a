"""Small pretrainings, and their states held against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.resnet import SHAPES
from tests.training.conftest import noise
from training import vision
from training.config import PretrainConfig

MIX = "momentum=1,clusters=1,reconstruction=1,rotation=0.5,jigsaw=0.5"
# On drawn shapes: 72 images.
TINY = {"shape": "tiny", "size": 32, "batch": 8, "lr": 0.05, "device": "cpu", "precision": "float32"}


def config(**given: Any) -> PretrainConfig:
    defaults = {"data": Path("d"), "out": Path("o"), **TINY, "size": 16, "epochs": 3}
    return PretrainConfig(**{**defaults, **given})


def a_run(**given: Any) -> vision.Run:
    channels = SHAPES[given.get("shape", "tiny")].channels
    images = 110 if given.get("weighting") == "learned" else 7  # a tenth is held out, and makes clusters
    return vision.Run(config(**given), noise(3, images, channels=channels))


def tensors(state: Any) -> dict[str, torch.Tensor]:
    """Every tensor in a state, by its path."""
    if isinstance(state, torch.Tensor):
        return {"": state.detach().clone()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {f"/{key}{path}": value for key, item in items for path, value in tensors(item).items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same, bit for bit."""
    names = sorted(first.keys() | second.keys())
    return [
        name
        for name in names
        if name not in first
        or name not in second
        or first[name].dtype != second[name].dtype
        or not torch.equal(first[name], second[name])
    ]
