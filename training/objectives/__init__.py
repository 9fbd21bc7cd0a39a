"""What pretraining minimises: each objective is a small head on the shared backbone and the loss it gives.

A new self-supervised task is one class and one line in the table. Knows nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.objectives.clusters import Clusters
from training.objectives.contrastive import Contrastive
from training.objectives.jigsaw import Jigsaw
from training.objectives.labels import Projected, Supervised
from training.objectives.momentum import Momentum
from training.objectives.question import Kept, Objective, Posed, View
from training.objectives.reconstruction import Reconstruction
from training.objectives.rotation import Rotation, rotated

__all__ = ["OBJECTIVES", "POOLED", "Kept", "Objective", "Posed", "View", "rotated"]

Head = (
    type[Contrastive]
    | type[Momentum]
    | type[Clusters]
    | type[Reconstruction]
    | type[Rotation]
    | type[Jigsaw]
    | type[Supervised]
    | type[Projected]
)

# Those that read pooled features alone, of whatever input.
POOLED: Mapping[str, type[Contrastive] | type[Supervised] | type[Projected]] = {
    "contrastive": Contrastive,
    "supervised": Supervised,
    "projected": Projected,
}
OBJECTIVES: Mapping[str, Head] = {
    **POOLED,
    "rotation": Rotation,
    "momentum": Momentum,
    "clusters": Clusters,
    "reconstruction": Reconstruction,
    "jigsaw": Jigsaw,
}
