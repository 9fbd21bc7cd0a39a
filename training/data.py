"""Labelled images or texts from a folder or a zip with one folder per class, and splits by class.

`<root>/<class>/<image>`, where a class may be a path of several levels; or zips with such members, either named
directly or inside the folder. A `splits.json` beside them names the classes of "train", "val" and "test"; without
one, classes are dealt 60/20/20 by a seeded shuffle. Texts also come as lines of a file: see texts.py. Knows nothing of
networks or episodes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from models.errors import FewshotError
from models.extractor import Decoder
from models.leftovers import left_behind
from models.text import TextDecoder
from training import texts

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SPLITS = ("train", "val", "test")
# The parts of Omniglot that its makers learned from, all of it or as little as five alphabets (Lake et al., 2015, see
# training/lake.py), and the twenty alphabets that their one-shot runs are drawn from.
FIVE = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
BY_ALPHABET = ("background30", "background5", "evaluation20")
# Folders that deal the images of each class, as torchvision's ImageFolder is used, and not the classes.
BY_IMAGE = {"train", "training", "val", "valid", "validation", "test", "testing"}


class DataError(Exception):
    """The folder or zip cannot be read as labelled images; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Decoded images, or texts, of some classes, in the order of their names."""

    pixels: np.ndarray  # [n, H, W, C] uint8; the bytes of texts, [n, length]
    labels: np.ndarray  # [n] int64, 0..len(classes)-1
    classes: tuple[str, ...]
    groups: np.ndarray  # [n] int64: images of one physical thing share a number; -1 where nothing is known

    def __len__(self) -> int:
        return len(self.labels)


def members(
    source: Path, suffixes: Container[str] = SUFFIXES, others: Counter[str] | None = None
) -> Iterator[tuple[str, str, zipfile.ZipFile | None]]:
    """Yields (class, member, archive or None) of every image under a folder or in a zip, sorted by name.

    What is hidden, and what operating systems leave behind, is passed over; what else is no image but lies in a class
    folder is counted in `others` by its ending.
    """
    if source.is_file():
        archives = [source]
    elif source.is_dir():
        archives = sorted(path for path in source.glob("*.zip") if not left_behind(path.relative_to(source)))
    else:
        raise DataError(f"{source} does not exist.")
    if archives:
        loose = source.is_dir() and next(_loose(source, suffixes), None)
        if loose:
            raise DataError(
                f"{source} has class folders, as of {loose.name}, and {archives[0].name} beside them, which would be "
                "read in their place: move one of the two away."
            )
        for path in archives:
            try:
                archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile:
                raise DataError(f"{path} is no zip, or a damaged one.") from None
            for name in sorted(archive.namelist()):
                member = PurePosixPath(name)
                if len(member.parts) < 2 or left_behind(member):
                    continue
                if member.suffix.lower() in suffixes:
                    yield str(member.parent), name, archive
                elif others is not None and not name.endswith("/") and not _one_shot(path.name):
                    others[member.suffix.lower()] += 1
        return
    for path in sorted(_loose(source, suffixes, others)):
        yield path.parent.relative_to(source).as_posix(), str(path), None


def _one_shot(archive: str) -> bool:
    """Lake's one-shot runs lie beside Omniglot in an archive of another layout."""
    return "one_shot" in archive


def _loose(source: Path, suffixes: Container[str], others: Counter[str] | None = None) -> Iterator[Path]:
    """The examples in class folders, in the order of the disk."""
    for path in source.rglob("*"):
        if path.parent == source or left_behind(path.relative_to(source)):
            continue
        if path.suffix.lower() in suffixes:
            yield path
        elif others is not None and path.is_file():
            others[path.suffix.lower()] += 1


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


def named_few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    named = _named(source) & set(found)
    if split == "all":  # where splits.json names a class in one place, that one stands for it
        known = {_itself(name) for name in named} - set(found)
        found = {name: rows for name, rows in found.items() if name in named or _itself(name) not in known}
    if split == "all" or not named:
        _each_once(source, set(found) - named)  # whoever names two that are called alike means two
    if split == "all":
        classes = sorted(found)
    elif split in BY_ALPHABET:
        wanted = alphabets(source, split)
        classes = sorted(name for name in found if name.split("/")[0] in wanted)
    else:
        wanted = set(split_classes(source, list(found))[split])
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
    for name, member, read in _examples(source, decoder, others):
        found.setdefault(name, []).append((member, read))
    if others and not quiet:
        told = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in sorted(others.items()))
        print(f"Passed over in the class folders of {source}: {told}.", file=sys.stderr)
    return found


def _named(source: Path) -> set[str]:
    """The classes that splits.json names, whatever their split; none where it does not say."""
    return {name for split in SPLITS for name in said(source).get(split, [])}


def _itself(name: str) -> str:
    """The name of a class without the first folder that deals images, where it lies in one."""
    parts = name.split("/")
    dealt = next((place for place, part in enumerate(parts) if part.lower() in BY_IMAGE), len(parts))
    return "/".join([*parts[:dealt], *parts[dealt + 1 :]]) or name


def digests(names: Iterable[str]) -> str:
    """A short digest of each name, in order, with blanks: what an artifact knows classes again by without naming them.

    Of the whole path, for characters of many alphabets are called alike.
    """
    return " ".join(sorted({hashlib.sha256(_itself(name).encode()).hexdigest()[:8] for name in names}))


def together(*parts: str) -> str:
    """What several `digests` name."""
    return " ".join(sorted({digest for part in parts for digest in part.split()}))


def alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of classes of one name under two folders that deal images: likely one class."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        rest = _itself(name)
        if rest == name:
            continue
        if rest in seen:
            yield seen[rest], name
        seen[rest] = name


def _each_once(source: Path, names: Iterable[str]) -> None:
    """Raises DataError where a class lies under two folders that deal its images: it would be two classes."""
    for first, second in alike(names):
        raise DataError(
            f"{source} has one class in two places, {first} and {second}, and what is learned from can measure "
            "nothing. The split is by class: give one folder in which each class is once, and say in splits.json "
            "which classes are for what, or leave it out."
        )


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
    classes = sorted(_named(source) & set(found))
    if not classes:
        classes = sorted(found)
        _each_once(source, classes)
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


def _examples(source: Path, decoder: Decoder, others: Counter[str]) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """(class, name, how to read it) of everything in the source that is of the decoder's kind. Raises DataError.

    What else lies in class folders is counted in `others`.
    """
    kind, suffixes = ("texts", texts.SUFFIXES) if isinstance(decoder, TextDecoder) else ("images", SUFFIXES)
    if isinstance(decoder, TextDecoder) and source.is_file() and source.suffix in (".jsonl", ".txt"):
        rows = texts.lines(source) if source.suffix == ".jsonl" else texts.pieces(source, decoder.length)
        try:
            for name, member, data in rows:
                yield name, member, partial(bytes, data)
        except texts.BadText as error:
            raise DataError(str(error)) from None
        return
    nothing = True
    for name, member, archive in members(source, suffixes, others):
        if archive is not None and archive.filename and _one_shot(archive.filename):
            continue
        nothing = False
        yield name, member, partial(archive.read, member) if archive is not None else Path(member).read_bytes
    if nothing:
        raise DataError(f"{source} has no {kind} in class folders (looked for {', '.join(sorted(suffixes))}).")


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
    found = said(source).get("piece", {})
    if not isinstance(found, dict):
        raise DataError(f"'piece' in the splits.json of {source} is no JSON object.")
    return found
