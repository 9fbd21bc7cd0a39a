"""Other ways to score "none of these", against the energy that is served: which tells foreign images best?

All are functions of the features, the head's means and the memory, in the whitened space; what a task's own examples
lower (see calibration.divisor) is left out of each. The rivals: the largest logit and probability (Hendrycks and
Gimpel, 2017, https://arxiv.org/abs/1610.02136), the distance to the nearest mean, the nearest example, the energy less
that of the remembered classes, and the cosine normalised by what question and class score among the remembered ones
(Auckenthaler et al., "Score Normalization for Text-Independent Speaker Verification Systems", 2000,
https://doi.org/10.1006/dspr.1999.0360). Compared paired, on one list of episodes. Knows nothing of thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.arrays import class_means, normalise, one_hot, softmax, square_sum
from models.artifact import Artifact
from models.calibration import energy
from models.episode import Support
from models.learners.whitened import Whitened, offset, whitening
from training.config import EvaluateConfig
from training.episodes import Pool, digest, frozen
from training.honesty import auroc
from training.intervals import interval

COHORT = 20  # of the remembered classes, the nearest ones that a cosine is normalised by


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """How well one score tells foreign images apart; AUROC in per cent, and what it gains on the energy, paired."""

    data: str
    split: str
    method: str  # the score
    way: int
    shot: int
    auroc: float
    auroc_interval: float
    gain: float
    gain_interval: float
    foreign: int
    episodes: int
    queries: int
    seed: int
    episode_list: str


def scores(
    learner: Whitened, slots: np.ndarray, support: Support, questions: np.ndarray, temperature: float
) -> dict[str, np.ndarray]:
    """Every score of each question [q, dim], higher where it is more surely known; slots [slots, dim] as remembered."""
    transform = whitening(learner.basis, learner.spectrum, learner.log_shrink)
    x, examples, memory = (values @ transform for values in (questions, support.features, slots))
    labels = one_hot(support.labels, support.way, examples)
    means, counts = class_means(examples, labels), labels.sum(axis=0)
    scale = np.exp(learner.log_scale) / temperature
    logits = scale * (x @ means.T + offset(means, counts, learner.log_noise))
    remembered = scale * (x @ memory.T + offset(memory, np.ones(len(memory), np.float32), learner.log_noise))
    cosines = normalise(x) @ normalise(means).T
    known = np.log(np.exp(10 * cosines).sum(axis=1)) / 10

    def among(values: np.ndarray) -> np.ndarray:
        """What each of them scores with the remembered classes that it is nearest to."""
        return np.asarray(np.sort(normalise(values) @ normalise(memory).T, axis=1)[:, -COHORT:].mean(axis=1))

    return {
        "energy": energy(logits),
        "largest logit": logits.max(axis=1),
        "largest probability": softmax(logits).max(axis=1),
        "distance": -(square_sum(x)[:, None] - 2 * x @ means.T + square_sum(means)).min(axis=1),
        "cosine": cosines.max(axis=1),
        "energy of the cosine": known,
        "nearest example": (normalise(x) @ normalise(examples).T).max(axis=1),
        "energy less memory": energy(logits) - energy(remembered),
        "cosine among memory": (cosines - 0.5 * among(means)).max(axis=1) - 0.5 * among(x),
        "energy of the cosine among memory": known - 0.5 * among(x),
    }


def measure(artifact: Artifact, features: np.ndarray, pool: Pool, config: EvaluateConfig) -> list[ScoreRow]:
    """A row for each score, way and shot; none for an artifact without whitened prototypes and a memory."""
    learners = artifact.learners()
    learner, slots = learners.get("whitened"), getattr(learners.get("lstm"), "slots", None)
    if not isinstance(learner, Whitened) or slots is None:
        return []
    rows: list[ScoreRow] = []
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
            temperature = artifact.manifest.methods["whitened"].at(way, (shot,) * way)
            areas: dict[str, list[float]] = {}
            for episode in episodes:
                mine, known = episode.labels < way, episode.answers < way
                support = Support(features[episode.support[mine]], episode.labels[mine], way)
                for name, values in scores(learner, slots, support, features[episode.query], temperature).items():
                    areas.setdefault(name, []).append(auroc(values[known], values[~known]))
            rows += _rows(areas, digest(episodes), way, shot, foreign, config)
    return rows


def _rows(
    areas: Mapping[str, Sequence[float]], name: str, way: int, shot: int, foreign: int, config: EvaluateConfig
) -> list[ScoreRow]:
    rows = []
    for score, found in areas.items():
        values = np.array(found)
        gain = values - np.array(areas["energy"])
        rows.append(
            ScoreRow(
                config.data.name,
                config.split,
                score,
                way,
                shot,
                round(100 * float(values.mean()), 2),
                round(100 * interval(values), 2),
                round(100 * float(gain.mean()), 2),
                round(100 * interval(gain), 2),
                foreign,
                len(values),
                config.queries,
                config.seed,
                name,
            )
        )
    return rows


def table(rows: Sequence[ScoreRow]) -> str:
    lines = ["| score | task | AUROC | over the energy |", "|---|---|---|---|"]
    lines += [
        f"| {row.method} | {row.way}-way {row.shot}-shot | {row.auroc:.2f} ± {row.auroc_interval:.2f} | "
        f"{row.gain:+.2f} ± {row.gain_interval:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
