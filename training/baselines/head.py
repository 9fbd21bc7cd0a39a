"""What is served: the extractor as it is, and one of the artifact's learners on its features.

Here so that the other baselines are compared with it on the same episodes and by the same clock. The papers are in
`models/learners/`. Inductive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.episode import Support
from models.extractor import load_extractor
from training.baselines import Answers, Given
from training.baselines.fitting import artifact_of, labels_read
from training.folders import DataError


@dataclass(frozen=True, slots=True)
class Settings:
    learner: str = ""  # empty: the artifact's default


class Served:
    def __init__(self, settings: Settings, given: Given):
        artifact = artifact_of(given)
        learners = artifact.learners()
        name = settings.learner or artifact.manifest.default
        if name not in learners:
            raise DataError(f"{artifact.path} has no learner '{name}', only {', '.join(learners)}.")
        self.extractor = load_extractor(artifact)
        self.learner = learners[name]
        self.labels = labels_read(artifact)

    def adapt(self, pixels: np.ndarray, labels: np.ndarray, way: int) -> Mapping[str, Answers]:
        affine = self.learner.adapt(Support(self.extractor(pixels), labels, way))

        def answers(questions: np.ndarray) -> np.ndarray:
            logits = self.extractor(questions) @ affine.weight.T + affine.bias
            return np.asarray(logits.argmax(axis=1))

        return {"inductive": answers}
