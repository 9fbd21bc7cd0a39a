"""What a pretraining left: its extractor, what that was learned from, and the features that it gives.

Knows nothing of how it was trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.artifact import Artifact
from training import checkpoint, inputs, splits
from training.config import PretrainConfig
from training.folders import DataError
from training.objectives import OBJECTIVES
from training.start import from_artifact, is_artifact

CHECKPOINT = "pretrain.safetensors"


def load_extractor(folder: Path) -> tuple[inputs.Network, PretrainConfig]:
    """The extractor of a finished pretraining."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise DataError(f"{path} does not exist: run `python -m training pretrain --out {folder}` first.")
    state = checkpoint.load(path)
    if "extractor" not in state:
        raise DataError(f"{path} is not finished: run the same `pretrain` command again, it goes on.")
    # With the precision that it had, where that was left to the device.
    try:
        config = PretrainConfig(**{**state["config"], "precision": state["precision"]})
    except (KeyError, ValidationError):
        raise DataError(f"{path} is no pretraining, or one of another version.") from None
    extractor = inputs.network(config.shape)
    extractor.load_state_dict(state["extractor"])
    return extractor.eval(), config


def digest(extractor: nn.Module) -> str:
    """Names the weights of an extractor: learners fit no other one."""
    found = hashlib.sha256()
    for name, value in extractor.state_dict().items():
        found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def starting(folder: Path, pixels: Tensor) -> nn.Module:
    """The backbone of a finished pretraining, or of an artifact. Raises DataError for what is neither."""
    if is_artifact(folder):
        return from_artifact(Artifact.load(folder), pixels)
    return load_extractor(folder)[0].backbone


@torch.no_grad()
def embed(extractor: nn.Module, pixels: np.ndarray, device: torch.device, *, batch: int = 128) -> np.ndarray:
    """uint8 [n, H, W, C] or [n, length] -> float32 features [n, dim]."""
    extractor.eval()
    parts = [
        extractor(torch.from_numpy(pixels[at : at + batch]).to(device)).float().cpu()
        for at in range(0, len(pixels), batch)
    ]
    return torch.cat(parts).numpy()


def labelled(config: PretrainConfig) -> bool:
    """Whether an extractor has seen a label of its training classes, or started from one that has.

    A start that is gone cannot be asked, and counts as one that has.
    """
    names = [part.split("=")[0] for part in config.objectives.split(",")]
    if config.labels == "classes" and any(name in OBJECTIVES and OBJECTIVES[name].uses_labels for name in names):
        return True
    if config.start is None:
        return False
    if is_artifact(config.start):
        return bool(Artifact.load(config.start).manifest.training["labels_used"])
    return not (config.start / CHECKPOINT).exists() or labelled(load_extractor(config.start)[1])


def learned(config: PretrainConfig, classes: Iterable[str]) -> str:
    """Digests of the classes behind an extractor: these, and those of what it starts from, as far as that knows."""
    before = ""
    if config.start is not None and is_artifact(config.start):
        before = Artifact.load(config.start).manifest.classes.get("learned", "")
    elif config.start is not None:
        before = classes_of(config.start)
    return splits.together(splits.digests(classes), before)


def classes_of(folder: Path) -> str:
    """Digests of the classes that a pretraining has learned from. Older ones, and what is no pretraining, know none."""
    path = folder / CHECKPOINT
    return str(checkpoint.load(path).get("classes", "")) if path.exists() else ""


def epochs(config: PretrainConfig) -> int:
    """Passes over training images behind an extractor, those of what it started from among them, as far as is known."""
    own = config.epochs * (config.rounds if config.labels == "clusters" else 1)
    if config.start is None:
        return own
    if is_artifact(config.start):
        return own + int(Artifact.load(config.start).manifest.training["epochs"])
    return own + epochs(load_extractor(config.start)[1]) if (config.start / CHECKPOINT).exists() else own
