"""How far probabilities and "none of these" can be trusted on classes never seen.

Each episode has classes that the task knows and foreign ones that it does not. Calibration is the expected error of the
stated probability (ECE, 15 bins, pooled over all questions; Guo et al., 2017, https://arxiv.org/abs/1706.04599); how
well foreign images are told apart is the area under the ROC curve within an episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.arrays import softmax
from models.artifact import Artifact
from models.calibration import divisor, energy
from models.episode import Support
from models.report import fitted, without_own
from training.config import EvaluateConfig
from training.episodes import Indices, Pool, frozen

RATE = 0.05  # of genuine images that may be turned away
BINS = 15


@dataclass(frozen=True, slots=True)
class HonestRow:
    """What was measured of one learner at one size of task; shares in per cent, each with its 95 % interval."""

    data: str
    split: str
    method: str
    way: int
    shot: int
    ece: float
    false_reject: float
    false_reject_interval: float
    foreign_rejected: float
    auroc: float
    auroc_interval: float
    foreign: int
    episodes: int
    queries: int
    seed: int


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean distance between stated and true accuracy: [n] in 0..1 and [n] bool -> 0..1."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def auroc(genuine: np.ndarray, foreign: np.ndarray) -> float:
    """The chance that a genuine image scores higher than a foreign one; as high counts half."""
    _, place, counts = np.unique(np.concatenate([genuine, foreign]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of equal scores the mean of their ranks
    n, m = len(genuine), len(foreign)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def measure(artifact: Artifact, features: np.ndarray, pool: Pool, config: EvaluateConfig) -> list[HonestRow]:
    """One row for each learner that can say "none of these", way and shot."""
    learners = artifact.learners()
    asked = config.learners.split(",") if config.learners else list(learners)
    methods = [name for name in artifact.manifest.rejections if name in asked]
    rows = []
    for way in [int(part) for part in config.way.split(",")]:
        foreign = min(config.foreign, len(pool.classes) - way)
        for shot in [int(part) for part in config.shot.split(",")]:
            episodes = frozen(
                pool,
                way=way + foreign,
                shot=shot,
                queries=config.queries,
                count=config.episodes,
                seed=config.seed,
                spread=config.spread,
            )
            rows += [_row(artifact, method, features, episodes, way, shot, foreign, config) for method in methods]
    return rows


def _row(
    artifact: Artifact,
    method: str,
    features: np.ndarray,
    episodes: Sequence[Indices],
    way: int,
    shot: int,
    foreign: int,
    config: EvaluateConfig,
) -> HonestRow:
    learner = artifact.learners()[method]
    rejection, shots = artifact.manifest.rejections[method], (shot,) * way
    temperature = artifact.manifest.methods[method].at(way, shots)
    confidence, right, turned_away, caught, areas = [], [], [], [], []
    for episode in episodes:
        mine, known = episode.labels < way, episode.answers < way
        own = features[episode.support[mine]]
        support = Support(own, episode.labels[mine], way)
        affine, leave_out = fitted(learner, support, near=artifact.manifest.twins)
        held = leave_out()
        by = divisor(temperature, held.logits, support.labels[held.index])
        weight, bias = affine.weight.T / by, affine.bias / by
        logits = features[episode.query] @ weight + bias
        gauge = rejection.gauge(
            shots,
            held_out=held.logits / by,
            rivals=without_own(own @ weight + bias, episode.labels[mine]),
        )
        scores = energy(logits)
        shares = rejection.known(scores, gauge)
        probabilities = softmax(logits[known])
        confidence.append(probabilities.max(axis=1))
        right.append(probabilities.argmax(axis=1) == episode.answers[known])
        turned_away.append((shares[known] < RATE).mean())
        caught.append((shares[~known] < RATE).mean())
        areas.append(auroc(scores[known], scores[~known]))
    half = 100 * 1.96 / np.sqrt(len(episodes))
    return HonestRow(
        config.data.name,
        config.split,
        method,
        way,
        shot,
        round(100 * ece(np.concatenate(confidence), np.concatenate(right)), 2),
        round(100 * float(np.mean(turned_away)), 2),
        round(float(half * np.std(turned_away, ddof=1)), 2),
        round(100 * float(np.mean(caught)), 2),
        round(100 * float(np.mean(areas)), 2),
        round(float(half * np.std(areas, ddof=1)), 2),
        foreign,
        len(episodes),
        config.queries,
        config.seed,
    )


def table(rows: Sequence[HonestRow]) -> str:
    lines = [
        f"| learner | task | calibration error | false rejects at {100 * RATE:.0f} % | foreign rejected | AUROC |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.method} | {row.way}-way {row.shot}-shot | {row.ece:.2f} | "
        f"{row.false_reject:.2f} ± {row.false_reject_interval:.2f} | {row.foreign_rejected:.1f} | "
        f"{row.auroc:.2f} ± {row.auroc_interval:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
