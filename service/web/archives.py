"""The files of a zip or a tar that a client sent, with their paths.

The entries and what they unpack to are counted before any is read, links and devices are refused, and no name that a
client made reaches the file system. Knows nothing of labels.
"""

from __future__ import annotations

import io
import itertools
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
ZIP_HEADER = re.compile(rb"PK\x01\x02")
MAX_EXTRA = 256  # bytes of extra fields, of all entries of a zip in the mean; programs write some 30 each
MAX_FOLDERS = 1000  # that an entry lies in; each costs some bytes to send and many more to keep
# Of a tar: headers that tell of the entry behind them, of all entries and of a link, and what has no content, whatever
# its size. Of what the first tell, records of these names change how an entry is read.
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
OTHER = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
HOLLOW = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
MEANT = (b"path", b"size")
HOLES = b"GNU.sparse."
MAX_RECORDS = 64  # an entry, in the mean; macOS writes some 20, two for each attribute of a file


@dataclass(frozen=True, slots=True)
class Most:
    """What one request may bring."""

    parts: int  # files of a multipart body, or entries of an archive
    unpacked: int  # bytes of all entries of an archive together
    entry: int  # bytes of one entry


def _checked(name: str, index: int) -> PurePosixPath | None:
    """The path of an archive entry; None for what operating systems leave behind. Raises InvalidRequest."""
    if name.count("/") > MAX_FOLDERS:
        raise InvalidRequest(f"An entry of the archive lies in more than {MAX_FOLDERS} folders.", index=index)
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
    # Every entry, folders too, has such a header; zipfile would make an object of each before anything can be counted,
    # and goes through the extra fields of each, four bytes at a time.
    headers = [found.start() for found in itertools.islice(ZIP_HEADER.finditer(body), most.parts + 1001)]
    if len(headers) > most.parts + 1000:
        raise TooLarge(f"The archive has too many entries; the limit is {most.parts}.")
    if sum(int.from_bytes(body[at + 30 : at + 32], "little") for at in headers) > MAX_EXTRA * (most.parts + 1000):
        raise TooLarge("The entries of the archive have more extra fields than any program writes.")
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
    try:
        entries = _tar_entries(body, most)
    except (tarfile.TarError, ValueError):
        raise InvalidRequest("The body is not a tar archive, or it is cut off.") from None
    size = _check_entries([info.size for info, _ in entries if info.isreg()], most)
    return Opened(size, lambda: _tar_files(body, entries))


def _tar_entries(body: bytes, most: Most) -> list[tuple[tarfile.TarInfo, int]]:
    """Every entry, and where its content begins. Raises TarError or ValueError.

    tarfile reads a header here and no archive: all that it follows there, holes, headers for all entries, headers of
    headers, makes many times the memory and the time of what was sent.
    """
    entries: list[tuple[tarfile.TarInfo, int]] = []
    at = headers = records = 0
    told: dict[bytes, bytes] = {}  # of the entry that comes next, by headers of their own
    while any(block := body[at : at + tarfile.BLOCKSIZE]):
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        at += tarfile.BLOCKSIZE
        headers += 1
        if len(entries) > most.parts + 1000 or headers > 4 * (most.parts + 1000):
            raise TooLarge(f"The archive has too many entries; the limit is {most.parts}.")
        index, told_of = len(entries), info.type in (*PAX, tarfile.GNUTYPE_LONGNAME)
        if not told_of and info.type not in OTHER and b"size" in told:
            info.size = int(told[b"size"])
        size = 0 if info.type in HOLLOW else info.size
        if not 0 <= size <= len(body) - at:
            raise ValueError("an entry ends behind the archive")
        begins, at = at, at + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if info.type == tarfile.GNUTYPE_LONGNAME:
            told[b"path"] = body[begins : begins + size].partition(b"\0")[0]
        elif told_of:
            for key, value in _records(body, begins, begins + size):
                records += 1
                if records > MAX_RECORDS * (most.parts + 1000):
                    raise TooLarge("The headers of the archive tell more of its entries than any program writes.")
                if key in MEANT or key.startswith(HOLES):
                    told[key] = body[value]
        elif info.type not in OTHER:
            if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(HOLES) for key in told):
                raise InvalidRequest("An entry of the archive is stored with holes (--sparse).", index=index)
            if b"path" in told:
                info.name = told[b"path"].decode("utf-8", "surrogateescape")
            entries.append((info, begins))
            told = {}
    if len(block) < tarfile.BLOCKSIZE:
        raise InvalidRequest("The tar archive has no end: it is cut off.")
    return entries


def _records(body: bytes, at: int, end: int) -> Iterator[tuple[bytes, slice]]:
    """Of each record, "LENGTH KEY=VALUE\\n", of a pax header its key, and where its value stands. Raises ValueError."""
    while at < end:
        blank = body.index(b" ", at, at + 8)
        after = at + int(body[at:blank])
        if not blank < after <= end:
            raise ValueError("no record")
        equals = body.index(b"=", blank, after)
        yield body[blank + 1 : equals], slice(equals + 1, after - 1)
        at = after


def _tar_files(body: bytes, entries: list[tuple[tarfile.TarInfo, int]]) -> Iterator[tuple[PurePosixPath, bytes]]:
    for index, (info, begins) in enumerate(entries):
        path = _checked(info.name, index)
        if info.isdir() or path is None:
            continue
        if not info.isreg():
            raise InvalidRequest("An entry of the archive is a link or a device.", index=index)
        yield path, body[begins : begins + info.size]


def _check_entries(sizes: list[int], most: Most) -> int:
    """What they are together."""
    if len(sizes) > most.parts:
        raise TooLarge(f"The archive has {len(sizes)} files; the limit is {most.parts}.")
    if sum(sizes) > most.unpacked:
        raise TooLarge(f"The archive unpacks to {sum(sizes)} bytes; the limit is {most.unpacked}.")
    if any(size > most.entry for size in sizes):
        raise TooLarge(f"A file of the archive has more than {most.entry} bytes (MAX_EXAMPLE_BYTES).")
    return sum(sizes)
