"""The files of a zip or a tar that a client sent, with their paths.

The entries and what they unpack to are counted before any is read, links and devices are refused, and no name that a
client made reaches the file system. Knows nothing of labels.
"""

from __future__ import annotations

import io
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from models.errors import InvalidRequest, TooLarge, UnsupportedMedia
from models.leftovers import left_behind

DRIVE = re.compile(r"[A-Za-z]:")  # of Windows; a label may hold a colon


@dataclass(frozen=True, slots=True)
class Most:
    """What one request may bring."""

    parts: int  # files of a multipart body, or entries of an archive
    unpacked: int  # bytes of all entries of an archive together
    entry: int  # bytes of one entry


def _checked(name: str, index: int) -> PurePosixPath | None:
    """The path of an archive entry; None for what operating systems leave behind. Raises InvalidRequest."""
    path = PurePosixPath(name)
    if "\\" in name or "\0" in name or path.is_absolute() or ".." in path.parts or DRIVE.match(name):
        raise InvalidRequest("An entry of the archive leads out of it.", index=index)
    return None if left_behind(path) else path


@dataclass(frozen=True, slots=True)
class Opened:
    """An archive whose entries were counted and none read."""

    size: int  # bytes that its files unpack to, as it says
    files: Callable[[], Iterator[tuple[PurePosixPath, bytes]]]


def open_zip(body: bytes, most: Most) -> Opened:
    """Raises InvalidRequest or TooLarge, as its `files` does."""
    # Every entry, folders too, has such a header; zipfile would make an object of each before anything can be counted.
    if body.count(b"PK\x01\x02") > most.parts + 1000:
        raise TooLarge(f"The archive has too many entries; the limit is {most.parts}.")
    try:
        archive = zipfile.ZipFile(io.BytesIO(body))
        infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError):
        raise InvalidRequest("The body is not a zip archive, or it is cut off.") from None
    size = _check_entries([info.file_size for info in infos if not info.is_dir()], most)
    return Opened(size, lambda: _zip_files(archive, infos, most))


def _zip_files(
    archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo], most: Most
) -> Iterator[tuple[PurePosixPath, bytes]]:
    for index, info in enumerate(infos):
        path = _checked(info.filename, index)
        if info.is_dir() or path is None:
            continue
        mode = info.external_attr >> 16
        if info.flag_bits & 1 or (mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
            raise InvalidRequest("An entry of the archive is encrypted, a link or a device.", index=index)
        # Other ways take, to unpack, as large a dictionary as the archive asks for.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InvalidRequest("An entry of the archive is compressed by another way than deflate.", index=index)
        try:
            with archive.open(info) as file:
                data = file.read(most.entry + 1)  # the header's size may lie
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, zlib.error, RuntimeError, OSError):
            raise InvalidRequest("An entry of the archive is damaged.", index=index) from None
        yield path, data


def open_tar(body: bytes, most: Most) -> Opened:
    """Raises InvalidRequest, TooLarge or UnsupportedMedia, as its `files` does."""
    if body[:2] == b"\x1f\x8b":
        raise UnsupportedMedia("The archive is compressed; send a plain tar, images hardly shrink.")
    infos = []
    try:
        archive = tarfile.open(fileobj=io.BytesIO(body), mode="r:")  # noqa: SIM115 - of bytes there is nothing to close
        for info in archive:
            infos.append(info)
            if len(infos) > most.parts + 1000:
                raise TooLarge(f"The archive has too many entries; the limit is {most.parts}.")
    except (tarfile.TarError, EOFError, ValueError, OSError):
        raise InvalidRequest("The body is not a tar archive, or it is cut off.") from None
    if not body.startswith(bytes(tarfile.BLOCKSIZE), archive.offset):  # tarfile takes one that just stops for whole
        raise InvalidRequest("The tar archive has no end: it is cut off.")
    size = _check_entries([info.size for info in infos if info.isreg()], most)
    return Opened(size, lambda: _tar_files(archive, infos))


def _tar_files(archive: tarfile.TarFile, infos: list[tarfile.TarInfo]) -> Iterator[tuple[PurePosixPath, bytes]]:
    try:
        for index, info in enumerate(infos):
            path = _checked(info.name, index)
            if info.isdir() or path is None:
                continue
            if not info.isreg():
                raise InvalidRequest("An entry of the archive is a link or a device.", index=index)
            file = archive.extractfile(info)
            yield path, file.read() if file else b""
    except (tarfile.TarError, EOFError, ValueError, OSError):
        raise InvalidRequest("The body is not a tar archive, or it is cut off.") from None


def _check_entries(sizes: list[int], most: Most) -> int:
    """What they are together."""
    if len(sizes) > most.parts:
        raise TooLarge(f"The archive has {len(sizes)} files; the limit is {most.parts}.")
    if sum(sizes) > most.unpacked:
        raise TooLarge(f"The archive unpacks to {sum(sizes)} bytes; the limit is {most.unpacked}.")
    if any(size > most.entry for size in sizes):
        raise TooLarge(f"A file of the archive has more than {most.entry} bytes (MAX_EXAMPLE_BYTES).")
    return sum(sizes)
