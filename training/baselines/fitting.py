"""What the baselines that fit a whole network to a support set share: the steps, the views, the answering.

Knows nothing of where a network comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.artifact import Artifact
from models.extractor_torch import network_of
from models.head import Affine
from models.resnet import ImageExtractor
from training.augment import AUGMENTATIONS
from training.baselines import Answers, Given
from training.folders import DataError
from training.stepping import generator


class Classifier(nn.Module):
    """An extractor with a linear head on its features: float images [n, C, H, W] in [0, 1] -> logits [n, way]."""

    def __init__(self, extractor: ImageExtractor, head: nn.Linear):
        super().__init__()
        self.extractor = extractor
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.extractor.normalise(self.extractor.backbone(images)))
        return logits


def artifact_of(given: Given) -> Artifact:
    """Raises DataError where none was given."""
    if given.artifact is None:
        raise DataError("This method needs an artifact: say --artifact FOLDER.")
    return given.artifact


def images_network(artifact: Artifact) -> ImageExtractor:
    """Raises DataError for an artifact that reads texts, ArtifactInvalid for an imported one."""
    network = network_of(artifact)
    if not isinstance(network, ImageExtractor):
        raise DataError(f"{artifact.path} reads texts; this method fits a network for images.")
    return network


def labels_read(artifact: Artifact) -> str:
    return "training classes" if artifact.manifest.training.get("labels_used") else "none"


def head_of(affine: Affine) -> nn.Linear:
    """A linear layer that starts as the map that a learner made."""
    way, dim = affine.weight.shape
    head = nn.Linear(dim, way)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(np.asarray(affine.weight, np.float32)))
        head.bias.copy_(torch.from_numpy(np.asarray(affine.bias, np.float32)))
    return head


def scaled(pixels: np.ndarray) -> Tensor:
    """uint8 [n, H, W, C] -> float [n, C, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255


def fit(
    network: nn.Module,
    parameters: Iterable[nn.Parameter],
    pixels: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Adam with a rate that falls along a half cosine, all examples a step, each in a view of its own.

    Views are those of pretraining: crops, flips and colours for photos, small distortions for one channel. The mode
    of the network (training or not) is the caller's.
    """
    images, truth = scaled(pixels), torch.from_numpy(labels)
    size = images.shape[-1]
    augment = AUGMENTATIONS["photos" if images.shape[1] == 3 else "characters"]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        views = augment(images, size, generator(seed, step)).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(views), truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def inductive(network: nn.Module) -> Mapping[str, Answers]:
    """The answers of a network that is done."""
    network.eval()

    def answers(questions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(network(scaled(questions)).argmax(dim=1).numpy())

    return {"inductive": answers}
