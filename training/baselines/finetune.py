"""The pretrained extractor and a linear head, all weights trained on the examples of a task.

Chen, Liu, Kira, Wang and Huang, "A Closer Look at Few-shot Classification", 2019, https://arxiv.org/abs/1904.04232, is
where fine-tuning was shown to be a baseline to reckon with; Hu et al., "Pushing the Limits of Simple Pipelines", 2022,
https://arxiv.org/abs/2204.07305, tune the whole network on augmented examples. The head starts as the map that the
artifact's default learner makes, so that step 0 is what is served, and only what the steps add is compared. Inductive.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from models.episode import Support
from training.baselines import Answers, Given
from training.baselines.fitting import Classifier, artifact_of, fit, head_of, images_network, inductive, labels_read


@dataclass(frozen=True, slots=True)
class Settings:
    steps: int = 50
    lr: float = 1e-4


class Finetune:
    def __init__(self, settings: Settings, given: Given):
        artifact = artifact_of(given)
        self.settings = settings
        self.seed = given.seed
        self.extractor = images_network(artifact)
        self.learner = artifact.learners()[artifact.manifest.default]
        self.labels = labels_read(artifact)

    def prepared(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Classifier:
        """The classifier before the first step."""
        extractor = copy.deepcopy(self.extractor)
        with torch.no_grad():
            features = extractor(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
        return Classifier(extractor, head_of(self.learner.adapt(Support(features, labels, way))))

    def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Mapping[str, Answers]:
        network = self.prepared(pixels, labels, way)
        settings = self.settings
        fit(network, network.parameters(), pixels, labels, steps=settings.steps, lr=settings.lr, seed=self.seed)
        return inductive(network)
