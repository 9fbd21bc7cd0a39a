"""The outer structure of a JPEG, PNG or WEBP file, read before a decoder sees it: its size, which way is up, its parts.

Files carry much besides pixels: text, profiles, thumbnails, a second picture. Decoders parse it all, at a price that
whoever made the file can set (Pillow 13, 8 MB: 2 s for empty JPEG segments, over 10 minutes for empty scans). So parts
are counted, and only those that make pixels go on. Knows nothing of pixels, limits on size, or requests.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MAX_PARTS = 10_000  # JPEG segments, PNG or WEBP chunks; an encoder that writes 8 MB in pieces of 4 kB makes 2,000
FEW_PARTS = 50  # JPEG segments before the picture, of those that a look at its size goes through
MAX_SCANS = 24  # of a progressive JPEG; encoders write about ten, and each costs a pass over all pixels
MAX_JUNK = 65_536  # bytes between two JPEG segments; some cameras leave a few


@dataclass(frozen=True, slots=True)
class Container:
    format: str
    size: tuple[int, int]  # width, height: as stored, before it is turned upright
    orientation: int  # 1 to 8, as EXIF counts; 1 is upright
    frames: int
    data: bytes  # the same picture, without the parts that make no pixels
    one_pass: bool = False  # a JPEG that is decoded row by row, at a fraction of its size if one likes


def unwrap(payload: bytes) -> Container:
    """Raises ValueError, struct.error or IndexError unless these are the parts of a JPEG, PNG or WEBP."""
    if payload.startswith(b"\xff\xd8\xff"):
        return _jpeg(payload)
    if payload.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(payload)
    if payload.startswith(b"RIFF") and payload[8:12] == b"WEBP":
        return _webp(payload)
    raise ValueError("none of the three")


class Look(NamedTuple):
    """What a header tells of the work of decoding."""

    pixels: int
    weight: float = 1.0  # of a pixel, over one of eight bits a colour
    one_pass: bool = False  # see Container


def look(payload: bytes) -> Look | None:
    """Takes some microseconds; None where it is not found at once. Nothing is checked."""
    weight, one_pass = 1.0, False
    try:
        if payload.startswith(b"\x89PNG"):
            width, height, depth, kind = struct.unpack_from(">IIBB", payload, 16)
            weight = max(1.0, depth * _PNG_CHANNELS.get(kind, 4) / 24) * (2 if payload[28] else 1)
        elif payload.startswith(b"RIFF"):
            width, height = _webp_size(payload)
        elif payload.startswith(b"\xff\xd8"):
            at = 2
            for _ in range(FEW_PARTS):
                kind, length = struct.unpack_from(">xBH", payload, at)
                if kind in _FRAME_HEADERS:
                    break
                at += 2 + length
            else:
                return None
            height, width = struct.unpack_from(">HH", payload, at + 5)
            one_pass = kind in _SEQUENTIAL and _first_scan(payload, at) == payload[at + 9]
        else:
            return None
    except (struct.error, IndexError, ValueError):
        return None
    return Look(int(width * height), weight, one_pass)


def _first_scan(payload: bytes, at: int) -> int:
    """How many components the first scan behind a marker has; 0 where it is not found at once."""
    for _ in range(FEW_PARTS):
        kind, length = struct.unpack_from(">xBH", payload, at)
        if kind == 0xDA:
            return payload[at + 4]
        at += 2 + length
    return 0


_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_SEQUENTIAL = (0xC0, 0xC1)
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_NO_PIXELS = {*range(0xE1, 0xF0), 0xFE} - {0xEE}  # applications' segments and comments; JFIF and Adobe name the colours


def _jpeg(payload: bytes) -> Container:
    size = None
    orientation = rows = 0  # rows: how many components come row by row, where the frame is sequential
    kept = [payload[:2]]
    at = 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(payload, at, at + MAX_JUNK)
        if found is None:
            raise ValueError("no scan")
        at, kind = found.start(), found[1][0]
        if kind == 0xDA:
            break
        if kind in _STANDALONE:
            at += 2
            continue
        (length,) = struct.unpack_from(">H", payload, at + 2)
        segment = payload[at : at + 2 + length]
        at += 2 + length
        if kind in _FRAME_HEADERS and size is None:
            height, width = struct.unpack_from(">HH", segment, 5)
            size = (width, height)
            rows = segment[9] if kind in _SEQUENTIAL else 0
        if kind == 0xE1 and segment[4:10] == b"Exif\0\0":
            orientation = orientation or _orientation(segment[10:])
        if kind not in _NO_PIXELS:
            kept.append(segment)
    else:
        raise ValueError("too many segments")
    if size is None or payload.count(b"\xff\xda", at) > MAX_SCANS:
        raise ValueError("no frame, or too many scans")
    # With all components in its first scan it has no other: libjpeg goes by the same.
    one_pass = rows == payload[at + 4] > 0
    return Container("JPEG", size, orientation or 1, 1, b"".join([*kept, payload[at:]]), one_pass)


def _png(payload: bytes) -> Container:
    """Also checks every checksum and that the chunks run to IEND: Pillow accepts files where they do not."""
    if payload[12:16] != b"IHDR":
        raise ValueError("no IHDR")
    width, height = struct.unpack_from(">II", payload, 16)
    orientation = frames = 1
    kept = [payload[:8]]
    for kind, start, end in _png_chunks(payload):
        if zlib.crc32(memoryview(payload)[start - 4 : end]) != struct.unpack_from(">I", payload, end)[0]:
            raise ValueError("wrong checksum")
        if kind == b"eXIf":
            orientation = _orientation(payload[start:end])
        elif kind == b"fdAT":  # a frame beyond the picture that any viewer shows
            frames = 2
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(payload[start - 8 : end + 4])
    return Container("PNG", (width, height), orientation, frames, b"".join(kept))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the contents of each chunk up to IEND."""
    at = 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, at + 8 + length
        if kind == b"IEND":
            return
        at += 12 + length
    raise ValueError("too many chunks")


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def png_ends_early(data: bytes) -> bool:
    """Whether a PNG's compressed data ends, properly, before the last row. It is inflated once more to find out."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    missing = 0
    for x, y, step_x, step_y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * depth * _CHANNELS[colour] + 7) // 8)
    inflate = zlib.decompressobj()
    for kind, start, end in _png_chunks(data):
        rest = data[start:end] if kind == b"IDAT" else b""
        while rest and missing > 0:
            missing -= len(inflate.decompress(rest, 1 << 20))
            rest = inflate.unconsumed_tail
    return missing > 0


def _webp_size(payload: bytes) -> tuple[int, int]:
    kind = payload[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(payload[24:27], "little"), 1 + int.from_bytes(payload[27:30], "little")
    if kind == b"VP8L" and payload[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", payload, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and payload[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", payload, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no picture")


def _webp(payload: bytes) -> Container:
    size = _webp_size(payload)
    orientation, frames, at, parts = 1, 0, 12, 0
    while at + 8 <= len(payload) and parts < MAX_PARTS:
        kind, length = struct.unpack_from("<4sI", payload, at)
        if kind == b"EXIF":
            orientation = _orientation(payload[at + 8 : at + 8 + length])
        frames += kind == b"ANMF"
        at += 8 + length + length % 2
        parts += 1
    return Container("WEBP", size, orientation, max(1, frames), payload)


def _orientation(exif: bytes) -> int:
    """The orientation in the first directory of EXIF; 1 where there is none, or what is there makes no sense."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(min(entries, MAX_PARTS)):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == 0x0112 and kind == 3 and 1 <= value <= 8:
                return int(value)
    except struct.error:
        pass
    return 1
