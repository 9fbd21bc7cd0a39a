"""Texts from files.

A text is a file: `<root>/<class>/<name>.txt`, in a folder or in zips as images are. Or a line: of a .jsonl file with
objects {"text": ..., "label": ...}, where the label may be missing. Or a piece: of one .txt file, which is cut at line
ends, as for a book that is only read to learn the language. Knows nothing of networks or episodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {".txt"}
UNNAMED = "texts"  # the class of what has none


class BadText(Exception):
    """A file cannot be read as texts; the message says where and why."""


def lines(source: Path) -> Iterator[tuple[str, str, bytes]]:
    """(class, name, text) of each line of a .jsonl file. Raises BadText."""
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name = f"{source}:{number}"
            try:
                row = json.loads(line)
                text, label = row["text"], row.get("label", UNNAMED)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise BadText(f'{name} is no object with a "text".') from None
            if not isinstance(text, str) or not isinstance(label, str):
                raise BadText(f'{name}: "text" and "label" are strings.')
            yield label, name, text.encode("utf-8", "surrogatepass")  # which the decoder then refuses


def pieces(source: Path, length: int) -> Iterator[tuple[str, str, bytes]]:
    """(class, name, text) of the pieces of one .txt file, each of at most `length` bytes."""
    for number, piece in enumerate(cut(source.read_bytes(), length)):
        yield UNNAMED, f"{source}, piece {number}", piece


def cut(data: bytes, length: int) -> Iterator[bytes]:
    """Stretches of at most `length` bytes: whole lines, where a line is not longer than that. Blank ones are left out.

    A line that is too long is cut between two characters.
    """
    piece = b""
    for line in data.splitlines(keepends=True):
        if piece and len(piece) + len(line) > length:
            yield from _filled(piece)
            piece = b""
        while len(line) > length:
            end = length
            while line[end] & 0xC0 == 0x80 and end > 1:
                end -= 1
            yield from _filled(line[:end])
            line = line[end:]
        piece += line
    yield from _filled(piece)


def _filled(piece: bytes) -> Iterator[bytes]:
    if piece.strip():
        yield piece
