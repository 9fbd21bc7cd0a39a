"""Labelled examples in a folder or a zip with one folder per class, found and not yet read.

`<root>/<class>/<image>`, where a class may be a path of several levels; or zips with such members, either named
directly or inside the folder. Texts also come as lines of a file: see texts.py. Knows nothing of splits.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from models.extractor import Decoder
from models.leftovers import left_behind
from models.text import TextDecoder
from training import texts

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class DataError(Exception):
    """The folder or zip cannot be read as labelled images; the message says why."""


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


def examples(source: Path, decoder: Decoder, others: Counter[str]) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
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


def named_few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
