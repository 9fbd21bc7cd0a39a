"""Which classes are learned from and which are measured on; and when two names mean one class.

A `splits.json` beside the examples names the classes of "train", "val" and "test"; without one, classes are dealt
60/20/20 by a seeded shuffle. Knows nothing of examples.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from training.folders import DataError, named_few

SPLITS = ("train", "val", "test")
# The parts of Omniglot that its makers learned from, all of it or as little as five alphabets (Lake et al., 2015, see
# training/lake.py), and the twenty alphabets that their one-shot runs are drawn from.
FIVE = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
BY_ALPHABET = ("background30", "background5", "evaluation20")
# Folders that deal the images of each class, as torchvision's ImageFolder is used, and not the classes.
BY_IMAGE = {"train", "training", "val", "valid", "validation", "test", "testing"}


def said(source: Path) -> dict[str, Any]:
    """What splits.json holds, nothing where there is none. Raises DataError where it is not to be understood."""
    file = (source if source.is_dir() else source.parent) / "splits.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise DataError(f'{file} is no JSON object such as {{"train": [...], "val": [...], "test": [...]}}.')
    for split in SPLITS:
        names = found.get(split, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{file}: '{split}' is no list of names of classes.")
    for one, other in combinations(SPLITS, 2):
        both = sorted(set(found.get(one, [])) & set(found.get(other, [])))
        if both:
            raise DataError(
                f"{file}: '{one}' and '{other}' share {named_few(both)}: what is learned from can measure nothing."
            )
    return found


def split_classes(source: Path, names: list[str], *, seed: int = 0) -> dict[str, list[str]]:
    """Class names of each split; from splits.json where there is one."""
    if splits := said(source):
        return {split: list(splits.get(split, [])) for split in SPLITS}
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    first, second = round(0.6 * len(names)), round(0.8 * len(names))
    parts = (shuffled[:first], shuffled[first:second], shuffled[second:])
    return dict(zip(SPLITS, (sorted(part) for part in parts), strict=True))


def alphabets(source: Path, split: str) -> set[str]:
    """The first folders that a split by alphabet means; from `lake_alphabets` in splits.json."""
    named = said(source).get("lake_alphabets", {})
    if not isinstance(named, dict) or not {"background", "evaluation"} <= set(named):
        file = (source if source.is_dir() else source.parent) / "splits.json"
        raise DataError(f"'{split}' needs lake_alphabets in {file}.")
    background, evaluation = set(named["background"]), set(named["evaluation"])
    return {"background30": background, "background5": background & set(FIVE), "evaluation20": evaluation}[split]


def named(source: Path) -> set[str]:
    """The classes that splits.json names, whatever their split; none where it does not say."""
    return {name for split in SPLITS for name in said(source).get(split, [])}


def itself(name: str) -> str:
    """The name of a class without the first folder that deals images, where it lies in one."""
    parts = name.split("/")
    dealt = next((place for place, part in enumerate(parts) if part.lower() in BY_IMAGE), len(parts))
    return "/".join([*parts[:dealt], *parts[dealt + 1 :]]) or name


def digests(names: Iterable[str]) -> str:
    """A short digest of each name, in order, with blanks: what an artifact knows classes again by without naming them.

    Of the whole path, for characters of many alphabets are called alike.
    """
    return " ".join(sorted({hashlib.sha256(itself(name).encode()).hexdigest()[:8] for name in names}))


def together(*parts: str) -> str:
    """What several `digests` name."""
    return " ".join(sorted({digest for part in parts for digest in part.split()}))


def alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of classes of one name under two folders that deal images: likely one class."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        rest = itself(name)
        if rest == name:
            continue
        if rest in seen:
            yield seen[rest], name
        seen[rest] = name


def each_once(source: Path, names: Iterable[str]) -> None:
    """Raises DataError where a class lies under two folders that deal its images: it would be two classes."""
    for first, second in alike(names):
        raise DataError(
            f"{source} has one class in two places, {first} and {second}, and what is learned from can measure "
            "nothing. The split is by class: give one folder in which each class is once, and say in splits.json "
            "which classes are for what, or leave it out."
        )
