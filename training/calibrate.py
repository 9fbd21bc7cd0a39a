"""What makes learners honest, fitted on tasks of held-out classes: temperatures, and when to say "none of these".

See models/calibration.py for what the numbers mean. Knows nothing of images, graphs or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from models.calibration import Temperature, divisor, energy, size_of
from models.learners import Learner
from models.report import fitted, without_own
from training import evaluate
from training.episodes import Indices, Pool, frozen

SHOTS = (1, 2, 5, 10)
LOG_TEMPERATURES = np.linspace(np.log(0.05), np.log(20), 121)
MANY = 2  # examples a class of which some can be held out
PAIRS = 10_000  # of different examples, of which one is as near as twins might be: see apart
MOST_COMPARED = 1000  # examples of a class
SHIFT, SHIFT_ONE_SHOT = 1.0, 0.5  # of the location, per unit of the energies it is read from; see fit_rejection
PINNED = ("ridge",)  # learners that all but repeat the labels of their only examples, whose scores then tell nothing
OWN = 1.2  # times as wide as a task's own examples, held out, its genuine images are at least taken to be spread
RATE = 0.05  # of genuine images, which in tasks of one example a class and of more is the same score


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """What one learner said in one calibration task."""

    cell: int
    shots: tuple[int, ...]
    logits: np.ndarray  # [q, way] of the questions
    answers: np.ndarray  # [q]
    held_out: np.ndarray  # [m, way] of support examples that were held out
    truth: np.ndarray  # [m]
    rivals: np.ndarray  # [n, way - 1] of support examples, without their own class


def calibrate(
    learners: Mapping[str, Learner], features: np.ndarray, pool: Pool, *, episodes: int, queries: int, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]], dict[str, float]]:
    """Temperatures and rejections by learner, and mean accuracy on 5-way tasks, which the default is chosen by."""
    most = min(len(rows) for rows in pool.classes) - 1
    ways = sorted({min(way, len(pool.classes)) for way in (2, 5, 10, 20)})
    cells: list[tuple[int, int, list[Indices]]] = []
    for way in ways:
        for shot in [shot for shot in SHOTS if shot <= most]:
            count = max(10, episodes * 5 // max(5, way))
            tasks = frozen(pool, way=way, shot=shot, queries=queries, count=count, seed=seed, spread=True)
            cells.append((way, shot, tasks))
    temperatures, rejections, scores = {}, {}, {}
    for method, learner in learners.items():
        found = [_answered(learner, features, task, cell) for cell, (_, _, tasks) in enumerate(cells) for task in tasks]
        curves, right = [], []
        for cell, (way, _, _) in enumerate(cells):
            stacked = np.concatenate([task.logits for task in found if task.cell == cell])
            truth = np.concatenate([task.answers for task in found if task.cell == cell])
            curves.append([_nll(stacked / np.exp(value), truth) for value in LOG_TEMPERATURES])
            if way == min(5, len(pool.classes)):
                right.append(float((stacked.argmax(axis=1) == truth).mean()))
        temperatures[method] = fit_temperature([(way, shot) for way, shot, _ in cells], np.array(curves))
        scores[method] = float(np.mean(right))
        rejections[method] = fit_rejection(found, Temperature(**temperatures[method]), pinned=method in PINNED)
    return temperatures, rejections, scores


def limits(pool: Pool, names: Sequence[str]) -> str:
    """What is lost where the smallest class has too few examples to know tasks of every size; "" where it has enough.

    `names`: of the classes of the pool.
    """
    sizes = [len(groups) for groups in pool.classes]
    least = min(sizes)
    if least > max(SHOTS):
        return ""
    small = [name for name, size in zip(names, sizes, strict=True) if size == least]
    lost = f"tasks of more than {least - 1} examples a class are not calibrated on"
    if least <= MANY:
        lost = f'no learner will say "none of these", and {lost}'
    return f"Class '{small[0]}' has {least} examples to calibrate on: {lost}. Add some, or leave it out."


def apart(features: np.ndarray, pool: Pool) -> float:
    """What tells twins, see models/twins.py: a quarter of the squared distance that one pair in ten thousand of
    different examples of a class is nearer than, for elsewhere things may be more alike. 0 where too few can tell."""
    found = []
    for groups in pool.classes:
        rows = np.array([group[0] for group in groups])[:: -(-len(groups) // MOST_COMPARED)]
        products = features[rows] @ features[rows].T
        squares = np.diagonal(products)
        found.append((squares[:, None] + squares - 2 * products)[np.triu_indices(len(rows), 1)])
    distances = np.concatenate(found)
    return round(float(max(0, np.quantile(distances, 1 / PAIRS))) / 4, 5) if len(distances) >= PAIRS else 0.0


def fit_temperature(sizes: list[tuple[int, int]], curves: np.ndarray) -> dict[str, float]:
    """The numbers of a Temperature, from the loss of tasks of each way and shot at LOG_TEMPERATURES, [sizes, 121].

    By least squares on the best of each size, which counts by how much a wrong temperature costs there: an easy task
    answers well at any, and its best is mostly chance; a little it counts all the same.
    """
    width = len(LOG_TEMPERATURES) // 20
    at = np.clip(curves.argmin(axis=1), width, len(LOG_TEMPERATURES) - 1 - width)
    best = LOG_TEMPERATURES[curves.argmin(axis=1)]
    bend = [max(0.0, curve[i - width] + curve[i + width] - 2 * curve[i]) for curve, i in zip(curves, at, strict=True)]
    weight = np.sqrt(np.array(bend) + 0.1 * max(bend) + 1e-9)
    inputs = np.array([[1.0, np.log(way), np.log(shot)] for way, shot in sizes])
    fit = np.linalg.lstsq(inputs * weight[:, None], best * weight, rcond=None)[0]
    names = ("constant", "by_way", "by_shot")
    return {name: round(float(value), 4) for name, value in zip(names, fit, strict=True)}


def _answered(learner: Learner, features: np.ndarray, task: Indices, cell: int) -> Answered:
    support = evaluate.support_of(features, task)
    affine, leave_out = fitted(learner, support)
    held = leave_out()
    own = features[task.support] @ affine.weight.T + affine.bias
    shots = tuple(int(count) for count in np.bincount(task.labels, minlength=task.way))
    return Answered(
        cell,
        shots,
        features[task.query] @ affine.weight.T + affine.bias,
        task.answers,
        held.logits,
        task.labels[held.index],
        without_own(own, task.labels),
    )


def fit_rejection(tasks: list[Answered], temperature: Temperature, *, pinned: bool = False) -> dict[str, list[float]]:
    """The numbers of a Rejection, by least squares on tasks whose questions all show one of their classes.

    How the location follows the task's own energies is not fitted: within one domain they hardly differ and the fit
    would all but ignore them, but from domain to domain they shift as a whole. Nor is how wide its own examples make
    the spread at least. `pinned`: those of a one-shot task tell nothing, see PINNED.
    """
    fits: dict[str, list[float]] = {}
    scaled = []
    for many, suffix in ((True, ""), (False, "_one_shot")):
        chosen = [task for task in tasks if (len(task.held_out) > 0) == many]
        if not chosen:
            return {}  # too few images a class to know tasks of this kind: then nothing is rejected
        sizes, genuine = [], []
        for task in chosen:
            t = divisor(temperature.at(len(task.shots), task.shots), task.held_out, task.truth)
            sizes.append(size_of(task.shots, energy((task.held_out if many else task.rivals) / t)))
            genuine.append(energy(task.logits / t))
        inputs = np.array(sizes).reshape(len(chosen), 5)
        slope = SHIFT if many else SHIFT_ONE_SHOT * (not pinned)
        means = np.array([values.mean() for values in genuine])
        size = np.linalg.lstsq(inputs[:, :3], means - slope * inputs[:, 3], rcond=None)[0]
        location = np.array([*size, slope, 0.0])
        off = [values - row @ location for values, row in zip(genuine, inputs, strict=True)]
        widths = np.log([np.sqrt(np.mean(values**2)) + 1e-6 for values in off])
        spreads = [np.linalg.lstsq(inputs, np.array(widths), rcond=None)[0]]
        if many:
            spreads.append(np.array([np.log(OWN), 0.0, 0.0, 0.0, 1.0]))
        log_spread = np.max([inputs @ spread for spread in spreads], axis=0)
        found = np.concatenate([values / np.exp(by) for values, by in zip(off, log_spread, strict=True)])
        low = float(np.quantile(found, RATE))
        unit = -low if low < 0 else 1.0
        scaled.append(found / unit)
        fits[f"location{suffix}"] = [round(float(value), 5) for value in location]
        for name, spread in zip((f"spread{suffix}", "spread_own"), spreads, strict=False):
            fits[name] = [round(float(value), 5) for value in spread + np.log(unit) * np.eye(5)[0]]
    quantiles = np.quantile(np.concatenate(scaled), np.linspace(0, 1, 201))
    fits["quantiles"] = [round(float(value), 4) for value in quantiles]
    return fits


def _nll(logits: np.ndarray, truth: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(truth)), truth]))
