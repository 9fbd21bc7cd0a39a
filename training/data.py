"""Labelled images or texts of a split, decoded; which of them show one thing, and which count as labelled.

Where examples lie is told by folders.py, which classes are for what by splits.py. Knows nothing of networks or
episodes.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from models.errors import FewshotError
from models.extractor import Decoder
from training import splits
from training.folders import DataError, examples, named_few
from training.splits import BY_ALPHABET, SPLITS


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Decoded images, or texts, of some classes, in the order of their names."""

    pixels: np.ndarray  # [n, H, W, C] uint8; the bytes of texts, [n, length]
    labels: np.ndarray  # [n] int64, 0..len(classes)-1
    classes: tuple[str, ...]
    groups: np.ndarray  # [n] int64: images of one physical thing share a number; -1 where nothing is known

    def __len__(self) -> int:
        return len(self.labels)


def load(
    source: Path,
    split: str,
    decoder: Decoder,
    *,
    labelled: float = 1,
    per_class: int | None = None,
    group: str = "",
) -> Images:
    """Decodes every image or text of one split ("train", "val", "test", one of BY_ALPHABET, or "all") into memory.

    `labelled`: the share of each class that is labelled: no other image is read. Of these the first `per_class`.

    `group`: an expression; images of a class whose file names give the same match show one physical thing. Without
    it, `piece` in splits.json tells, where there is such an entry. Raises DataError when nothing is left, naming what
    was looked for.
    """
    found, classes = _of_split(source, split, decoder)
    group_of = Grouper(pieces(source), group)
    pixels, labels, groups = [], [], []
    for label, name in enumerate(classes):
        numbers = np.array([group_of(name, PurePosixPath(member).name) for member, _ in found[name]])
        for place in chosen(numbers, labelled, label)[:per_class]:
            member, read = found[name][place]
            try:
                pixels.append(decoder(read()))
            except FewshotError as error:
                raise DataError(f"{member}: {error.detail}") from None
            labels.append(label)
            groups.append(numbers[place])
    return Images(np.stack(pixels), np.array(labels, np.int64), tuple(classes), np.array(groups, np.int64))


def _of_split(
    source: Path, split: str, decoder: Decoder, *, quiet: bool = False
) -> tuple[dict[str, list[tuple[str, Callable[[], bytes]]]], list[str]]:
    """Everything in the source by class, and which classes the split means."""
    if split not in (*SPLITS, *BY_ALPHABET, "all"):
        raise DataError(f"'{split}' is no split; known are {', '.join((*SPLITS, *BY_ALPHABET))} and all.")
    found = _by_class(source, decoder, quiet=quiet)
    named = splits.named(source) & set(found)
    if split == "all":  # where splits.json names a class in one place, that one stands for it
        known = {splits.itself(name) for name in named} - set(found)
        found = {name: rows for name, rows in found.items() if name in named or splits.itself(name) not in known}
    if split == "all" or not named:
        splits.each_once(source, set(found) - named)  # whoever names two that are called alike means two
    if split == "all":
        classes = sorted(found)
    elif split in BY_ALPHABET:
        wanted = splits.alphabets(source, split)
        classes = sorted(name for name in found if name.split("/")[0] in wanted)
    else:
        wanted = set(splits.split_classes(source, list(found))[split])
        classes = sorted(wanted & set(found))
        lacking = sorted(wanted - set(found))
        if lacking and not quiet:
            print(f"splits.json names classes that {source} does not have: {named_few(lacking)}.", file=sys.stderr)
    if not classes:
        raise DataError(f"{source} has no classes in its split '{split}'.")
    return found, classes


def _by_class(source: Path, decoder: Decoder, *, quiet: bool) -> dict[str, list[tuple[str, Callable[[], bytes]]]]:
    """Everything in the source by class."""
    found: dict[str, list[tuple[str, Callable[[], bytes]]]] = {}
    others: Counter[str] = Counter()
    for name, member, read in examples(source, decoder, others):
        found.setdefault(name, []).append((member, read))
    if others and not quiet:
        told = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in sorted(others.items()))
        print(f"Passed over in the class folders of {source}: {told}.", file=sys.stderr)
    return found


def census(counts: Mapping[str, int]) -> dict[str, Any]:
    """Tells what is trained on from anything else: how much it is, and a digest of its names and of how many each has.

    Where it lies does not matter, so that data may move.
    """
    text = json.dumps(sorted(counts.items()))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"classes": len(counts), "examples": sum(counts.values()), "digest": digest}


def counted(images: Images) -> dict[str, int]:
    """How many each class has."""
    numbers = np.bincount(images.labels, minlength=len(images.classes))
    return {name: int(number) for name, number in zip(images.classes, numbers, strict=True)}


def listed(source: Path, split: str, decoder: Decoder, *, per_class: int | None = None) -> dict[str, int]:
    """How many each class of a split has, read or not; of each the first `per_class`."""
    found, classes = _of_split(source, split, decoder, quiet=True)
    return {name: len(found[name][:per_class]) for name in classes}


def things(source: Path, decoder: Decoder) -> dict[str, int]:
    """How many things each class of any split shows; what shows one thing splits.json tells, if anything."""
    found = _by_class(source, decoder, quiet=True)
    classes = sorted(splits.named(source) & set(found))
    if not classes:
        classes = sorted(found)
        splits.each_once(source, classes)
    group_of = Grouper(pieces(source), "")
    counts = {}
    for name in classes:
        numbers = [group_of(name, PurePosixPath(member).name) for member, _ in found[name]]
        counts[name] = numbers.count(-1) + len(set(numbers) - {-1})
    return counts


def unchanged(state: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> None:
    """Raises DataError where a checkpoint says that it was trained on something else. Older ones do not say it."""
    before = state.get("trained_on", known)
    if before != known:
        raise DataError(
            f"{path} was trained on other data: {before['examples']} examples of {before['classes']} classes, where "
            f"--data now has {known['examples']} of {known['classes']}, or others. Choose another --out or delete it."
        )


def hold_out(images: Images, count: int) -> tuple[Images, Images]:
    """The images without `count` of their classes, and those of these classes alone; labels are 0..way-1 in both.

    Every so manyth name is held out, for names that are neighbours are often kin: neither part lacks a kind. Raises
    DataError where fewer than two classes would be left on one side.
    """
    total = len(images.classes)
    if not 2 <= count <= total - 2:
        raise DataError(f"--hold-out {count}: of {total} classes, between 2 and {total - 2} can be held out.")
    held = {position * total // count for position in range(count)}
    return _of(images, [k for k in range(total) if k not in held]), _of(images, sorted(held))


def dealt(count: int, share: float, label: int) -> np.ndarray:
    """Which of the images of a class count as labelled where only a share of them does, in order: at least two.

    Drawn at random, and the same for the same arguments, for ever. With a share of 1 all of them are.
    """
    return np.sort(np.random.default_rng([0, label]).permutation(count)[: max(2, round(share * count))])


def chosen(groups: np.ndarray, share: float, label: int) -> np.ndarray:
    """The same for images of a class of which several may show one thing, `groups` [n]: places of whole things."""
    alone = [np.array([place]) for place in np.flatnonzero(groups < 0)]
    things = alone + [np.flatnonzero(groups == number) for number in np.unique(groups[groups >= 0])]
    return np.sort(np.concatenate([things[k] for k in dealt(len(things), share, label)]))


def named(images: Images, share: float) -> np.ndarray:
    """The same for the images of all classes, [n] bool.

    Raises DataError where a class has fewer than two things on either side, unless all of it is labelled.
    """
    found = np.zeros(len(images), bool)
    for label, name in enumerate(images.classes):
        rows = np.flatnonzero(images.labels == label)
        groups = images.groups[rows]
        found[rows[chosen(groups, share, label)]] = True
        others = groups[~found[rows]]
        if share < 1 and (others < 0).sum() + len(np.unique(others[others >= 0])) < 2:
            raise DataError(f"--labelled {share:g}: of {name} too few images are left without a label.")
    return found


def _of(images: Images, chosen: list[int]) -> Images:
    """The images of some classes."""
    place = np.full(len(images.classes), -1)
    place[chosen] = np.arange(len(chosen))
    rows = place[images.labels] >= 0
    return Images(
        images.pixels[rows],
        place[images.labels[rows]],
        tuple(images.classes[k] for k in chosen),
        images.groups[rows],
    )


class Grouper:
    """Numbers the physical things that several images show, as far as the names tell."""

    def __init__(self, pieces: dict[str, str], pattern: str):
        self.pieces = pieces
        self.pattern = re.compile(pattern) if pattern else None
        self.numbers: dict[tuple[str, str], int] = {}

    def __call__(self, name: str, file: str) -> int:
        match = self.pattern.search(file) if self.pattern else None
        piece = match.group(0) if match else self.pieces.get(f"{name}/{file}")
        if piece is None:
            return -1
        return self.numbers.setdefault((name, piece), len(self.numbers))


def pieces(source: Path) -> dict[str, str]:
    """Which images show one thing, `class/file` -> a name, as far as splits.json tells."""
    found = splits.said(source).get("piece", {})
    if not isinstance(found, dict):
        raise DataError(f"'piece' in the splits.json of {source} is no JSON object.")
    return found
