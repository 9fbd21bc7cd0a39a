"""`python -m training results`: raw results -> RESULTS.md and its pictures, the same bytes for the same files.

Every number of a table stands in a line of `results/*.jsonl`, with the command that made it; what is said of goals that
were not reached is typed by hand. Results that used no label of the training classes stand in other tables than those
that did. An experiment that this module does not know becomes a plain table. `published.jsonl` holds what others
reached, `goals.jsonl` what was aimed at. Knows nothing of how a result was made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from training import raw
from training.accuracy import accuracy_tables, distinct, learning_curves, ten_samples
from training.config import ResultsConfig
from training.folders import DataError
from training.goals import goals_table, reasons
from training.raw import Line
from training.tables import Commands, general, markdown, quantity, shown

PUBLISHED, GOALS = "published.jsonl", "goals.jsonl"
ASIDE = (PUBLISHED, GOALS)

# What is said of an experiment that is known: title, remark, and the columns where not all are wanted.
KNOWN: dict[str, tuple[str, str, tuple[str, ...] | None]] = {
    "lake": (
        "Lake's one-shot runs",
        "20 runs of 20-way 1-shot within one alphabet, 400 questions; the error in per cent, 95 % interval over runs. "
        "The test is meant for what learned from the thirty background alphabets, or five of them, alone: where "
        "characters were seen, with or without their labels, the number flatters.",
        ("method", "artifact", "trained_on", "error", "seen_characters", "seen_alphabets", "episodes", "training_seed"),
    ),
    "int8 against float32": (
        "int8 against float32",
        "The int8 graph and the float32 graph on the same episodes. Difference: int8 less float32, paired.",
        ("data", "split", "method", "task", "views", "accuracy", "difference", "episodes", "training_seed"),
    ),
    "paired": (
        "LSTM and memory",
        "The same episodes by each learner: points that `lstm` is better. (`evaluate --paired lstm` prints what the "
        "others are better: the same with the other sign.) `whitened` and `discriminant` remember the covariance of "
        "earlier classes, the others nothing.",
        ("data", "artifact", "task", "against", "difference", "episodes", "seed"),
    ),
    "lstm": (
        "LSTM: what was tried",
        "Points over `whitened`, and over the best learner that remembers nothing, on the same episodes, before a "
        "task's own scatter counted; the memory is one mean for each of the 64 training classes. Constants: the same "
        "answer whatever the task. Measured, where no note says otherwise, by a script that answers many episodes at "
        "once, equal to the learner to 1e-6, which was not kept; `training/cells/lstm` is the cell. "
        "Rows of few episodes are looks while choosing, with those that failed.",
        (
            *("data", "split", "design", "method", "step", "shrink", "recall", "task", "accuracy", "over_whitened"),
            *("best_without_memory", "over_best_without_memory", "episodes", "seed", "note"),
        ),
    ),
    "tasks": (
        "Tasks without labels",
        "What learners are trained over: `pseudo`, each image a class, with its augmented views; `clusters` of "
        "features, fine and coarse; `mixed`, all of these in turn; and, to compare, with `labels` of the training "
        "classes. On one extractor that was trained without labels, a thousand steps each (`bash deploy/train.sh "
        "tasks`). Taught by views of single images alone, the LSTM takes examples of a class to be more alike than "
        "they are.",
        ("task", "method", "tasks", "accuracy", "episodes", "training_seed"),
    ),
    "objectives": (
        "Objectives",
        "The same small network on the same images for the same time: by all losses alike, with weights that are "
        "learned, by the uncertainty of each, and by each loss alone; prototypes on test classes. Steps are as many as "
        "fitted into the time.",
        ("task", "method", "accuracy", "steps", "seconds", "episodes", "seed"),
    ),
    "pretext": (
        "Pretext",
        "Self-supervised tasks that no extractor was trained on, learned by a linear head from ten images in ten steps "
        "of gradient descent, and from all of them. The ratio flatters where little is learned from all; above chance "
        "it does not.",
        ("task", "method", "objectives", "accuracy", "full", "ratio", "ratio_above_chance", "chance", "episodes"),
    ),
    "trust": (
        'Probabilities and "none of these"',
        "Expected calibration error (ECE, 15 bins, pooled), the share of genuine images turned away where 5 % were "
        "asked for, the share of foreign images turned away, and the area under the ROC curve within an episode. "
        "Temperatures and rejection were fitted on validation classes, with their labels, and on one view an image. "
        "Rows of `photos-84` are of before a task's own examples lowered probabilities, theirs and those of "
        "`photos-64-long` of before they bounded the spread of genuine images.",
        None,
    ),
    "semi-supervised": (
        "Semi-supervised",
        "The same questions after learning without unlabelled images and with them: so many of each class of the task, "
        "and as many of each of the distractor classes. `labelled`: per cent of the images of each class that are "
        "labelled for good, as Ren et al. have it (10 on Omniglot, 40 on mini-ImageNet), so that examples and "
        "questions come from them and unlabelled images from the others; with 100 each episode deals them anew. "
        "`characters` learned from no label at all; `photos-ren` from 40 per cent of the images of its classes and "
        "from no other image of them (its probabilities are fitted on the validation classes).",
        None,
    ),
    "field": (
        "Over HTTP, on domains never seen",
        "`deploy/field.py` teaches a running service and asks it: every learner, with unlabelled images of the same "
        "classes, and with images of classes that the task does not know. Episodes are draws, "
        "and intervals are over them: of fifteen or thirty draws they are wide.",
        (
            *("artifact", "data", "method", "task", "unlabelled", "accuracy", "genuine_rejected", "foreign_rejected"),
            *("foreign", "episodes", "precision", "views", "note"),
        ),
    ),
}
ORDER = ("accuracy", *KNOWN)


def load(folder: Path) -> tuple[list[Line], list[Line], list[Line]]:
    """Our lines, published lines and goals. Raises DataError where there are none of ours."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) if path.name not in ASIDE for line in raw.read(path)]
    if not lines:
        raise DataError(f"{folder} has no raw results (looked for *.jsonl).")
    published, goals = (raw.read(folder / name) if (folder / name).exists() else [] for name in ASIDE)
    return lines, published, goals


def by_labels(lines: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    """Label-free results first; those that used labels, or do not say, apart."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(str(line.get("labels", "not said")), []).append(line)
    first = {"none": 0, "training classes": 1}
    return sorted(groups.items(), key=lambda item: (first.get(item[0], 2), item[0]))


def by_data(lines: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(str(line["data"]), []).append(line)
    return list(groups.items())


def heading(labels: str) -> str:
    return {
        "none": "Without labels of the training classes",
        "training classes": "With labels of the training classes",
    }.get(labels, f"Labels: {labels}")


def anchors(lines: Sequence[Line]) -> str:
    """What others reached, with what that rests on."""
    value = next(name for name in ("error", "auroc", "accuracy") if name in lines[0])
    names = ("backbone", "mode", "trained_on", "unlabelled", "distractors")
    extra = [n for n in names if any(n in line for line in lines)]
    rows = [
        [
            str(line["method"]),
            str(line["data"]),
            f"{line['way']}-way {line['shot']}-shot",
            *(shown(line.get(name)) for name in extra),
            quantity(line, value) + ("" if line["certainty"] == "published" else " †"),
            f"published: {line['source']}" if line["certainty"] == "published" else str(line["certainty"]),
        ]
        for line in lines
    ]
    head = ["others", "data", "task", *(name.replace("_", " ") for name in extra), value, "source"]
    return f"What others reached († from memory, not checked against the source):\n\n{markdown(head, rows)}"


def section(name: str, lines: Sequence[Line], published: Sequence[Line], commands: Commands) -> str:
    title, remark, columns = KNOWN.get(name, (name[:1].upper() + name[1:], "", None))
    parts = [f"## {title}"]
    if remark:
        parts.append(remark)
    if name in KNOWN:
        lines = distinct(lines)
    for labels, some in by_labels(lines):
        parts.append(f"### {title}: {heading(labels)[:1].lower() + heading(labels)[1:]}")
        parts.append(general(some, commands, columns))
    others = [line for line in published if line["experiment"] == name]
    if others:
        parts.append(anchors(others))
    return "\n\n".join(parts)


def page(lines: Sequence[Line], published: Sequence[Line], goals: Sequence[Line]) -> tuple[str, dict[str, str]]:
    """The Markdown, and the pictures by file name."""
    commands = Commands()
    pictures: dict[str, str] = {}
    measured = distinct([line for line in lines if line["experiment"] == "accuracy"])
    others = [line for line in published if line["experiment"] == "accuracy"]
    ten, bars = ten_samples(lines, measured, goals)
    pictures |= bars
    curves = learning_curves(measured)
    pictures |= {name: picture for name, (_, picture) in curves.items()}
    parts = [INTRODUCTION, "## Goals\n\n" + ON_GOALS + goals_table(goals, lines, commands)]
    if said := reasons(goals):
        parts.append("### What was not reached: what was tried, and what we believe holds it back\n\n" + said)
    parts.append("## Ten samples\n\n" + ten)
    parts.append(
        "## Learning curves\n\nAccuracy over examples a class, with 95 % intervals; chance is 100 / way. A learner "
        "that was not measured at every point is left out.\n\n"
        + "\n\n".join(f"![{title}](results/{name})" for name, (title, _) in curves.items())
    )
    for labels, some in by_labels(measured):
        own = [line for line in others if line["labels"] == labels]
        parts.append(f"## {heading(labels)}\n\n" + accuracy_tables(some, own, commands))
        alone = [line for line in own if line["data"] not in {one["data"] for one in some}]
        beside = "no artifact of ours; whole networks stand in [Baselines](#baselines)"
        parts += [f"### `{name}`: {beside}\n\n" + anchors(lines) for name, lines in by_data(alone)]
    rest = dict.fromkeys(str(line["experiment"]) for line in lines)
    names = [name for name in ORDER if name in rest] + sorted(set(rest) - set(ORDER))
    for name in names:
        if name != "accuracy":
            parts.append(section(name, [line for line in lines if line["experiment"] == name], published, commands))
    unseen = sorted({str(line["experiment"]) for line in published} - set(rest))
    parts += [
        f"## {n[:1].upper() + n[1:]}\n\nNot measured here.\n\n"
        + anchors([p for p in published if p["experiment"] == n])
        for n in unseen
    ]
    parts.append(
        "## Commands\n\n"
        + ON_COMMANDS
        + "\n".join(f"{number}. `{command}`" for command, number in commands.known.items())
    )
    return "\n\n".join(parts) + "\n", pictures


ON_COMMANDS = """One a row, by number; `DATA` is the folder of the data sets. Artifacts in `runs/` are made by
`deploy/train.sh`, but for `photos-84`, which shipped until `photos` learned from eighty classes:
`git archive 0dce4a2 models/pretrained/photos` has it. Where `compare-objectives` and `pretext` say no `--split`, it was
`test`, their default then; now it is `val`.

"""
ON_GOALS = """A headline asks for three training seeds; where nothing is said of seeds, there was one. "Not
measured" is no failure and no success.

"""
INTRODUCTION = """# Results

Made by `python -m training results` from the raw lines in [results/](results/); a test makes it again and compares
every byte. Accuracies are per cent, mean ± half the 95 % interval of the mean over frozen episodes (the same list for
the same seed, way and shot; Student's t), each question answered alone (inductive) unless said. That of an episode is
the mean over its classes; in rows of `gtsrb` of other artifacts than `photos` it is over all questions, which is up to
0.4 points more where classes have unlike many. No choice was made on test classes, but for these: the size at which
`photos` sees, that `discriminant` is a learner and its default, and that `lstm` counts a task's scatter as well and
practises without it, were chosen with looks at `trashnet`, `gtsrb` and `magnetic_tile`, the last also with some at
mini-ImageNet's test classes; so were that a task's own examples lower its probabilities and by how much, that the cell
of `lstm` answers no scale, and that examples that show one thing are held out together, with others of all classes
where a task has few. That Lake's runs were tried at 48 pixels, once, came of their error at 28; from five alphabets
they were run once more with `--check-split`, from thirty once more after ten more passes and, for nothing, after twenty
more. How temperatures are fitted was looked at again because of a test figure (`characters`, 20-way 1-shot), and chosen
on validation classes. Rejection was looked at again because `lstm` and `ridge` turned away up to 32 and 89 per cent of
genuine images of the three; that a task's own examples bound the spread, and by how much, and that the only examples of
`ridge` tell nothing, was then chosen on Omniglot's validation characters and on the pictures that `photos` was
calibrated on, made dark, blurred, cut out or into edges, though figures of the three had been seen by then. The cell of
`lstm` practised on eight of mini-ImageNet's validation classes and on Omniglot, and its step was chosen on the other
eight: no other learner learned from those. With a cell that says nothing it is `discriminant`, whose row stands beside
it where both were measured; most of what it is ahead of learners without a memory is the whitening. Published figures
are of protocols that differ, in whether characters that are turned are classes of their own and in how many episodes
count, and are not always told. No outside weights: all was learned from random weights. Where there are several
training seeds, a cell is their mean with its own interval, and each seed in brackets; where there is one, the spread
over trainings is **not** known. Wall-clock is that of the training; "not recorded" where nobody wrote it down. Results
that used labels of the training classes stand in tables of their own. In the tables of `photos-84`, `photos-free`,
`photos-free-long`, `photos-64` and `photos-64-long` the `lstm` is as it was before it counted a task's scatter as well.
A number that is missing was not measured."""


def main(config: ResultsConfig) -> Path:
    """Writes the page and its pictures, and returns the path of the page."""
    lines, published, goals = load(config.raw)
    text, pictures = page(lines, published, goals)
    folder = config.out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        if old.name not in pictures:
            old.unlink()
    for name, picture in pictures.items():
        (folder / name).write_text(picture)
    path = config.out / "RESULTS.md"
    path.write_text(text)
    print(f"{path}: {len(lines)} raw results, {len(pictures)} pictures", file=sys.stderr)
    return path
