"""What callers have, as files with labels: folders, zips, patterns, paths, bytes, open files, PIL images.

Files are read when they are sent and not before, so a folder may be larger than memory. Formats are the service's
business: here a name only tells pictures from what else lies in a folder. Knows nothing of requests.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable
from urllib.parse import unquote


@runtime_checkable
class Readable(Protocol):
    def read(self) -> bytes: ...


@runtime_checkable
class Saveable(Protocol):
    """An image of PIL, or whatever else can save itself as one does."""

    def save(self, fp: Any, format: str) -> None: ...


Content: TypeAlias = bytes | bytearray | memoryview | Readable | Saveable
Image: TypeAlias = str | os.PathLike[str] | Content
Images: TypeAlias = Image | Iterable[Image]
Support: TypeAlias = str | os.PathLike[str] | Mapping[str, Images]

# A format that the service does not read is sent all the same: its answer says so, silence would not.
PICTURES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
)
TEXTS = (".txt",)  # read where a folder or a zip holds no picture
UNLABELLED = "unlabelled"
NEARLY = {UNLABELLED, "unlabeled"}
PREFIX = "label:"  # of a folder whose label would otherwise mean something else


@dataclass(frozen=True, slots=True)
class File:
    name: str  # for people
    label: str | None  # None: unlabelled, or a question
    size: int
    load: Callable[[], bytes]


def example_id(label: str | None, data: bytes) -> str:
    """What the service calls this example; tells which file it speaks of."""
    return "ex_" + hashlib.sha256((label or "").encode() + b"\0" + data).hexdigest()[:32]


def support(given: Support, unlabelled: Images = ()) -> list[File]:
    """Every file of a support set with its label, those without one last. Raises OSError or ValueError."""
    if isinstance(given, Mapping):
        files = [file for label, some in given.items() for file in _class(label, some)]
    else:
        files = _tree(Path(given))
    files += [_unlabelled(file) for file in many(unlabelled)]
    return sorted(files, key=lambda file: file.label is None)


def many(given: Images) -> list[File]:
    """Files without labels. A folder counts for the pictures in it, a pattern for those that it finds."""
    if isinstance(given, Mapping):
        raise TypeError("Images are wanted here, not a mapping from labels to images.")
    if isinstance(given, str | os.PathLike):
        return [_path(path) for path in _found(os.fspath(given))]
    if isinstance(given, bytes | bytearray | memoryview | Readable | Saveable):
        return [one(given)]
    return [one(item, number) for number, item in enumerate(given)]


def one(given: Image, number: int = 0) -> File:
    """One image. Raises OSError or TypeError."""
    if isinstance(given, str | os.PathLike):
        return _path(Path(given))
    if isinstance(given, bytes | bytearray | memoryview):
        data = bytes(given)
    elif isinstance(given, Readable):
        data = given.read()
    elif isinstance(given, Saveable):
        out = io.BytesIO()
        given.save(out, format="PNG")
        data = out.getvalue()
    else:
        raise TypeError(f"An image is a path, bytes, an open file or a PIL image, not {type(given).__name__}.")
    return File(f"[{number}]", None, len(data), lambda: data)


def is_one(given: Images) -> TypeGuard[Image]:
    """Whether this is an image rather than several, as a folder and a pattern are."""
    if isinstance(given, str | os.PathLike):
        return _is_file(os.fspath(given))
    return isinstance(given, bytes | bytearray | memoryview | Readable | Saveable)


def _class(label: str, given: Images) -> Iterator[File]:
    if not isinstance(label, str):
        raise TypeError(f"A label is text, not {type(label).__name__}.")
    files = many(given)
    if not files:
        raise ValueError(f"The class {label!r} has no images.")
    for file in files:
        name = f"{label}{file.name}" if file.name.startswith("[") else file.name
        yield File(name, normal(label), file.size, file.load)


def normal(label: str) -> str:
    """A label as the service will spell it."""
    return unicodedata.normalize("NFC", label).strip()


def _unlabelled(file: File) -> File:
    return File(f"{UNLABELLED}{file.name}" if file.name.startswith("[") else file.name, None, file.size, file.load)


def _path(path: Path) -> File:
    return File(str(path), None, path.stat().st_size, path.read_bytes)


def _is_file(text: str) -> bool:
    """Whether a path means one file, there or not; one whose name looks like a pattern is there."""
    path = Path(text)
    return not path.is_dir() and (path.exists() or not glob.has_magic(text))


def _found(text: str) -> list[Path]:
    """The files that a path or a pattern means, by name. Raises FileNotFoundError."""
    path = Path(text)
    if _is_file(text):
        return [path]
    if path.is_dir():
        files = list(_walk(path))
        found = [file for file in files if _is_of(file, PICTURES)] or [file for file in files if _is_of(file, TEXTS)]
    else:
        found = sorted(Path(name) for name in glob.glob(text, recursive=True) if Path(name).is_file())
    if not found:
        raise FileNotFoundError(f"There is no picture in {text}.")
    return found


def _tree(root: Path) -> list[File]:
    """A folder or a zip with one folder per label, of pictures or, where it holds none, of texts."""
    files = _within(root, PICTURES) or _within(root, TEXTS)
    if not files:
        raise FileNotFoundError(
            f"There is no picture in {root}, nor a text (*.txt); it should hold one folder of them for each label."
        )
    loose = [path for path, _, _ in files if len(path.parts) == 1]
    if loose:
        raise ValueError(f"{root / str(loose[0])} lies in no sub-folder; the name of a sub-folder is the label.")
    shared = _shared([path.parent.parts for path, _, _ in files])
    out = []
    for path, size, load in files:
        folder = "/".join(path.parent.parts[shared:])
        if folder != UNLABELLED and folder.casefold() in NEARLY:
            raise ValueError(
                f"Is {UNLABELLED!r} meant by the folder {folder!r} of {root}? A class that is called so is in a folder "
                f"{PREFIX + folder!r}."
            )
        label = None if folder == UNLABELLED else normal(_decoded(folder.removeprefix(PREFIX)))
        out.append(File(str(path), label, size, load))
    return out


def _within(root: Path, suffixes: tuple[str, ...]) -> list[tuple[PurePosixPath, int, Callable[[], bytes]]]:
    """(path, bytes, how to read it) of the files of some endings in a folder or a zip."""
    if root.is_dir():
        files = [
            (PurePosixPath(path.relative_to(root).as_posix()), path.stat().st_size, path.read_bytes)
            for path in _walk(root)
            if _is_of(path, suffixes)
        ]
    elif not root.exists():
        raise FileNotFoundError(f"There is no folder {root}.")
    elif zipfile.is_zipfile(root):
        with zipfile.ZipFile(root) as archive:
            files = [
                (PurePosixPath(info.filename), info.file_size, _entry(root, info.filename))
                for info in archive.infolist()
                if _is_of(PurePosixPath(info.filename), suffixes) and not _is_hidden(PurePosixPath(info.filename))
            ]
    else:
        raise ValueError(f"{root} is neither a folder nor a zip archive.")
    return files


def _decoded(folder: str) -> str:
    """The label that a folder stands for, as the service reads it: percent-encoded is what no folder can be called."""
    try:
        return unquote(folder, errors="strict")
    except UnicodeDecodeError:
        return folder


def _shared(folders: list[tuple[str, ...]]) -> int:
    """How many outer folders all files share, which are then no part of a label; the innermost always is."""
    shared = 0
    while len({folder[: shared + 1] for folder in folders}) == 1 and all(len(f) > shared + 1 for f in folders):
        shared += 1
    return shared


def _entry(archive: Path, name: str) -> Callable[[], bytes]:
    def load() -> bytes:
        with zipfile.ZipFile(archive) as opened:
            return opened.read(name)

    return load


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _is_hidden(PurePosixPath(name)))
        yield from (Path(folder, name) for name in sorted(names))


def _is_of(path: Path | PurePosixPath, suffixes: tuple[str, ...]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
