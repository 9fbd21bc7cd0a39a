"""Lake's one-shot test: twenty runs, each of twenty characters of one alphabet, one example and one question each.

Lake, Salakhutdinov & Tenenbaum, "Human-level concept learning through probabilistic program induction", 2015,
https://doi.org/10.1126/science.aab3050. Harder than episodes from all alphabets, for the characters of one alphabet
look alike. 400 questions tell an error to about two points, so the interval, over runs, belongs to the number. The runs
are drawn from twenty alphabets that nothing may have been learned from: how many of their characters the artifact has
seen is said with every row. Knows nothing of how extractor and learners were made.
"""

from __future__ import annotations

import re
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.artifact import Artifact
from models.episode import Support
from models.extractor import Decoder, load_extractor
from training import folders, raw, splits
from training.config import LakeConfig
from training.evaluate import embed
from training.folders import DataError
from training.intervals import interval

RUNS = "one_shot_runs.zip"
PAIR = re.compile(r"^(\S+/test/\S+)\s+(\S+/training/\S+)$", re.MULTILINE)


class Run(NamedTuple):
    support: np.ndarray  # [way, H, W, C] uint8, one example of each class
    query: np.ndarray  # [q, H, W, C] uint8
    answers: np.ndarray  # [q] 0..way-1


def runs(archive: Path, decoder: Decoder) -> list[Run]:
    """Reads `<run>/class_labels.txt`, whose lines pair a question with its example. Raises DataError."""
    if not archive.exists():
        raise DataError(f"{archive} does not exist.")
    found = []
    with zipfile.ZipFile(archive) as file:
        for name in sorted(name for name in file.namelist() if name.endswith("class_labels.txt")):
            pairs = PAIR.findall(file.read(name).decode())
            if not pairs:
                raise DataError(f"{archive}: {name} has no line with a question and its example.")
            examples = sorted({example for _, example in pairs})
            found.append(
                Run(
                    np.stack([decoder(file.read(example)) for example in examples]),
                    np.stack([decoder(file.read(question)) for question, _ in pairs]),
                    np.array([examples.index(example) for _, example in pairs]),
                )
            )
    if not found:
        raise DataError(f"{archive} has no runs (looked for class_labels.txt).")
    return found


def seen(artifact: Artifact, source: Path) -> list[str]:
    """Characters of the twenty evaluation alphabets that the artifact was trained on, with or without their labels."""
    training = artifact.manifest.training
    if training.get("data") != source.name:
        return []
    names = list(dict.fromkeys(name for name, _, _ in folders.members(source)))
    split = str(training["split"])
    if split == "all":
        chosen = names
    elif split in splits.BY_ALPHABET:
        chosen = [name for name in names if name.split("/")[0] in splits.alphabets(source, split)]
    else:
        chosen = splits.split_classes(source, names)[split]
    evaluation = splits.alphabets(source, "evaluation20")
    return [name for name in chosen if name.split("/")[0] in evaluation]


def main(config: LakeConfig) -> list[raw.Line]:
    begun = time.perf_counter()
    artifact = Artifact.load(config.artifact)
    extractor = load_extractor(artifact)
    tests = runs(config.data / RUNS, artifact.decoder())
    features = [(embed(extractor, run.support), embed(extractor, run.query)) for run in tests]
    known = seen(artifact, config.data)
    lines: list[raw.Line] = []
    for method, learner in artifact.learners().items():
        values = []
        for run, (support, query) in zip(tests, features, strict=True):
            way = len(support)
            affine = learner.adapt(Support(support, np.arange(way), way))
            logits = query @ affine.weight.T + affine.bias
            values.append((logits.argmax(axis=1) == run.answers).mean())
        accuracy = np.array(values)
        lines.append(
            {
                "experiment": "lake",
                "data": config.data.name,
                "split": "one-shot runs",
                "method": method,
                "default": method == artifact.manifest.default,
                "way": len(tests[0].support),
                "shot": 1,
                "accuracy": round(100 * float(accuracy.mean()), 2),
                "error": round(100 * float(1 - accuracy.mean()), 2),
                "interval": round(100 * interval(accuracy), 2),
                "episodes": len(tests),
                "questions": sum(len(run.query) for run in tests),
                "seen_characters": len(known),
                "seen_alphabets": len({name.split("/")[0] for name in known}),
                **raw.made_with(artifact),
                "command": raw.command("lake", config),
            }
        )
    print(f"{len(tests)} runs, {lines[0]['questions']} questions, 95 % intervals over runs\n")
    print("| learner | error, % |\n|---|---|")
    for line in lines:
        print(f"| {line['method']} | {line['error']:.2f} ± {line['interval']:.2f} |")
    if known:
        print(
            f"\nNot Lake's test as it is meant: the artifact was trained on {len(known)} characters of "
            f"{lines[0]['seen_alphabets']} of the alphabets that the runs are drawn from.",
        )
    print(f"{time.perf_counter() - begun:.1f} s", file=sys.stderr)
    if config.json_out:
        raw.append(config.json_out, lines)
    return lines
