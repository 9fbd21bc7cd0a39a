"""Labelled images from a folder or a zip with one folder per class, and splits by class.

`<root>/<class>/<image>`, where a class may be a path of several levels; or zips with such members, either named
directly or inside the folder. A `splits.json` beside them names the classes of "train", "val" and "test"; without
one, classes are dealt 60/20/20 by a seeded shuffle. Knows nothing of networks or episodes.
"""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from models.errors import FewshotError
from models.images import ImageDecoder

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SPLITS = ("train", "val", "test")


class DataError(Exception):
    """The folder or zip cannot be read as labelled images; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Decoded images of some classes, in the order of their names."""

    pixels: np.ndarray  # [n, H, W, C] uint8
    labels: np.ndarray  # [n] int64, 0..len(classes)-1
    classes: tuple[str, ...]
    groups: np.ndarray  # [n] int64: images of one physical thing share a number; -1 where nothing is known

    def __len__(self) -> int:
        return len(self.labels)


def members(source: Path) -> Iterator[tuple[str, str, zipfile.ZipFile | None]]:
    """Yields (class, member, archive or None) of every image under a folder or in a zip, sorted by name."""
    if source.is_file():
        archives = [source]
    elif source.is_dir():
        archives = sorted(source.glob("*.zip"))
    else:
        raise DataError(f"{source} does not exist.")
    if archives:
        for path in archives:
            try:
                archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile:
                raise DataError(f"{path} is no zip, or a damaged one.") from None
            for name in sorted(archive.namelist()):
                member = PurePosixPath(name)
                if member.suffix.lower() in SUFFIXES and len(member.parts) > 1:
                    yield str(member.parent), name, archive
        return
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.parent != source:
            yield path.parent.relative_to(source).as_posix(), str(path), None


def split_classes(source: Path, names: list[str], *, seed: int = 0) -> dict[str, list[str]]:
    """Class names of each split; from splits.json where there is one."""
    file = (source if source.is_dir() else source.parent) / "splits.json"
    if file.exists():
        splits = json.loads(file.read_text())
        return {split: list(splits.get(split, [])) for split in SPLITS}
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    first, second = round(0.6 * len(names)), round(0.8 * len(names))
    parts = (shuffled[:first], shuffled[first:second], shuffled[second:])
    return dict(zip(SPLITS, (sorted(part) for part in parts), strict=True))


def load(source: Path, split: str, decoder: ImageDecoder, *, per_class: int | None = None, group: str = "") -> Images:
    """Decodes every image of one split ("train", "val", "test" or "all") into memory.

    `group`: an expression; images of a class whose file names give the same match show one physical thing. Without
    it, `piece` in splits.json tells, where there is such an entry. Raises DataError when nothing is left, naming what
    was looked for.
    """
    if split not in (*SPLITS, "all"):
        raise DataError(f"'{split}' is no split; known are {', '.join(SPLITS)} and all.")
    found: dict[str, list[tuple[str, zipfile.ZipFile | None]]] = {}
    for name, member, archive in members(source):
        # Lake's one-shot runs lie beside Omniglot in an archive of another layout.
        if archive is not None and archive.filename and "one_shot" in archive.filename:
            continue
        found.setdefault(name, []).append((member, archive))
    if not found:
        raise DataError(f"{source} has no images in class folders (looked for {', '.join(sorted(SUFFIXES))}).")
    if split == "all":
        chosen = sorted(found)
    else:
        wanted = set(split_classes(source, list(found))[split])
        chosen = sorted(wanted & set(found))
    if not chosen:
        raise DataError(f"{source} has no classes in its split '{split}'.")
    group_of = Grouper(pieces(source), group)
    pixels, labels, groups = [], [], []
    for label, name in enumerate(chosen):
        for member, archive in found[name][:per_class]:
            data = archive.read(member) if archive is not None else Path(member).read_bytes()
            try:
                pixels.append(decoder(data))
            except FewshotError as error:
                raise DataError(f"{member}: {error.detail}") from None
            labels.append(label)
            groups.append(group_of(name, PurePosixPath(member).name))
    return Images(np.stack(pixels), np.array(labels, np.int64), tuple(chosen), np.array(groups, np.int64))


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
    file = (source if source.is_dir() else source.parent) / "splits.json"
    return dict(json.loads(file.read_text()).get("piece", {})) if file.exists() else {}
