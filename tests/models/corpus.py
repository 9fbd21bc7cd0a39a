"""Image files made on the spot: pictures that must be read, and files that must be refused."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

WIDTH, HEIGHT = 96, 64


@cache
def scene(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A smooth picture, uint8 [height, width, 3], that looks different each way it is turned."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    wave = 20 * np.sin(9 * x) * np.cos(7 * y)
    channels = [40 + 170 * x + wave, 220 - 180 * y + wave, 60 + 150 * x * y + wave]
    return np.stack(channels, axis=2).round().astype(np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def encode(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int, *, order: str = "<") -> bytes:
    """EXIF with nothing but an orientation."""
    mark = b"II" if order == "<" else b"MM"
    return b"Exif\0\0" + mark + struct.pack(f"{order}HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


STORED_AS = {  # EXIF orientation -> how an upright picture lies in the file
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


def turned(orientation: int) -> np.ndarray:
    return np.ascontiguousarray(STORED_AS[orientation](scene()))


# PNG by hand, for what Pillow does not write.

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes = b"", *, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def header(width: int, height: int, *, depth: int = 8, colour: int = 2, interlaced: bool = False) -> bytes:
    return PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def rows(pixels: np.ndarray) -> bytes:
    """Every row after a filter byte, 16-bit samples with the high byte first."""
    return b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)


def png(
    pixels: np.ndarray, *, interlaced: bool = False, missing: int = 0, extra: bytes = b"", after: bytes = b""
) -> bytes:
    """A grey or RGB PNG; so many bytes are missing from its rows, in a stream that ends properly all the same."""
    colour = 2 if pixels.ndim == 3 else 0
    depth = 8 * pixels.dtype.itemsize
    passes = [pixels[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [pixels]
    data = b"".join(rows(part) for part in passes if part.size)
    start = header(pixels.shape[1], pixels.shape[0], depth=depth, colour=colour, interlaced=interlaced)
    stream = zlib.compress(data[: len(data) - missing])
    return start + extra + chunk(b"IDAT", stream) + after + chunk(b"IEND")


def promise(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header promises a size, with next to no data."""
    start = header(width, height, depth=depth, colour=colour)
    return start + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND")


def blank(width: int, height: int) -> bytes:
    """A black 1-bit PNG, all there: a few kB whatever its size."""
    start = header(width, height, depth=1, colour=0)
    return start + chunk(b"IDAT", zlib.compress(bytes(height * (1 + (width + 7) // 8)))) + chunk(b"IEND")


def deflated_zeros(megabytes: int) -> bytes:
    """A compressed stream a thousandth as long as what it holds; it has no end."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"\x78\x9c" + (deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)) * megabytes


def with_right_checksums(file: bytes) -> bytes:
    """Of a damaged PNG, as far as its chunks can be followed; so that the damage gets past the checksums."""
    data, at = bytearray(file), 8
    while file.startswith(PNG) and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


# JPEG and WEBP by the knife.


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    return jpeg[:2] + segment + jpeg[2:]


def plain_rgb() -> bytes:
    """A JPEG that stores red, green and blue as they are. Only Adobe's segment, in place of JFIF's, says so."""
    bands = [Image.fromarray(band) for band in scene().transpose(2, 0, 1)]
    jpeg = encode(Image.merge("YCbCr", bands), "JPEG", quality=95, subsampling=0)
    assert jpeg[2:4] == b"\xff\xe0"
    return with_segment(jpeg[:2] + jpeg[20:], b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0")


def with_jpeg_size(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def with_webp_size(webp: bytes, width: int, height: int) -> bytes:
    """Of one with a VP8X header."""
    assert webp[12:16] == b"VP8X"
    return webp[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + webp[30:]


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that repeats its last, empty scan."""
    jpeg = encode(Image.new("RGB", (side, side), (9, 99, 200)), "JPEG", progressive=True)
    last = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    return jpeg[:-2] + last * scans + b"\xff\xd9"


def crowded_exif(entries: int) -> bytes:
    """An EXIF directory of many entries that all claim the rest of the file."""
    directory = b"".join(struct.pack("<HHII", tag, 1, 60_000, 0) for tag in range(1, entries + 1))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, entries) + directory + bytes(4)


@cache
def transparent() -> np.ndarray:
    """RGBA [height, width, 4]: the scene, with its left half invisible."""
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, : WIDTH // 2] = 0
    return np.concatenate([scene(), alpha], axis=2)


def on_white() -> np.ndarray:
    seen = scene().copy()
    seen[:, : WIDTH // 2] = 255
    return seen


def quantised() -> Image.Image:
    return Image.fromarray(scene()).quantize(256)


def readable() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Name -> file, the pixels it shows [height, width, 3], and how far, on average, it may be from them."""
    rgb, shades = scene(), grey(scene())
    rgb_of_grey = np.repeat(shades[:, :, None], 3, axis=2)
    ink = shades > 128
    palette = quantised()
    see_through = Image.fromarray(transparent())
    jpeg = encode(rgb, "JPEG", quality=95)
    mpo = encode(rgb, "MPO", save_all=True, append_images=[Image.fromarray(255 - rgb)], quality=95)
    masked = quantised()
    masked.info["transparency"] = 0
    index = np.asarray(masked)
    through_index = np.where((index == 0)[:, :, None], 255, np.asarray(masked.convert("RGB")))
    deep = rgb.astype(np.uint16) * 257
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lossy, exact = 1.0, 0.0
    return {
        "jpeg": (jpeg, rgb, lossy),
        "jpeg grey": (encode(shades, "JPEG", quality=95), rgb_of_grey, lossy),
        "jpeg progressive": (encode(rgb, "JPEG", quality=95, progressive=True), rgb, lossy),
        "jpeg cmyk": (encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95), rgb, lossy),
        "jpeg restart markers": (encode(rgb, "JPEG", quality=95, restart_marker_blocks=2), rgb, lossy),
        "jpeg with a profile": (
            encode(rgb, "JPEG", quality=95, icc_profile=profile),
            rgb,
            lossy,
        ),
        "jpeg padded between segments": (jpeg[:2] + b"\xff" * 9 + jpeg[2:20] + b"\0\0" + jpeg[20:], rgb, lossy),
        "jpeg with a second picture": (mpo, rgb, lossy),
        "jpeg of plain rgb": (plain_rgb(), rgb, lossy),
        "png": (encode(rgb, "PNG"), rgb, exact),
        "png grey": (encode(shades, "PNG"), rgb_of_grey, exact),
        "png 1 bit": (encode(ink, "PNG"), np.repeat(ink[:, :, None] * np.uint8(255), 3, axis=2), exact),
        "png 16 bit grey": (encode(shades.astype(np.uint16) * 257, "PNG"), rgb_of_grey, exact),
        "png 16 bit rgb": (png(deep), rgb, exact),
        "png palette": (encode(palette, "PNG"), np.asarray(palette.convert("RGB")), exact),
        "png palette, one colour clear": (encode(masked, "PNG", transparency=0), through_index, exact),
        "png alpha": (encode(see_through, "PNG"), on_white(), exact),
        "png grey and alpha": (
            encode(see_through.convert("LA"), "PNG"),
            np.where(transparent()[:, :, 3:] == 0, 255, rgb_of_grey),
            exact,
        ),
        "png interlaced": (png(rgb, interlaced=True), rgb, exact),
        "png interlaced 16 bit grey": (png(shades.astype(np.uint16) * 257, interlaced=True), rgb_of_grey, exact),
        "png in tiny chunks": (in_tiny_chunks(encode(rgb, "PNG")), rgb, exact),
        "webp lossy": (encode(rgb, "WEBP", quality=95), rgb, lossy),
        "webp lossless": (encode(rgb, "WEBP", lossless=True), rgb, exact),
        "webp alpha": (encode(see_through, "WEBP", lossless=True), on_white(), exact),
        "webp lossy alpha": (encode(see_through, "WEBP", quality=95), on_white(), lossy),
    }


def in_tiny_chunks(file: bytes) -> bytes:
    """The same PNG with its data in chunks of 7 bytes, some empty."""
    at = file.index(b"IDAT")
    (length,) = struct.unpack_from(">I", file, at - 4)
    data = file[at + 4 : at + 4 + length]
    pieces = b"".join(chunk(b"IDAT", data[i : i + 7]) + chunk(b"IDAT") for i in range(0, len(data), 7))
    return file[: at - 4] + pieces + file[at + 8 + length :]


def cut(file: bytes, percent: int) -> bytes:
    return file[: len(file) * percent // 100]


def refused() -> dict[str, bytes]:
    """Name -> a file that is no single whole picture of an accepted kind and size."""
    rgb = scene()
    jpeg, whole = encode(rgb, "JPEG", quality=95), encode(rgb, "PNG")
    webp = encode(Image.fromarray(transparent()), "WEBP", quality=95)
    small = {f"{kind.lower()} 1 x 1": encode(rgb[:1, :1], kind) for kind in ("JPEG", "PNG", "WEBP")}
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("photo.jpg", jpeg)
    data, row = whole.index(b"IDAT"), 1 + 3 * WIDTH
    cuts = {
        f"{name} cut at {percent} %": cut(file, percent)
        for name, file in {
            "jpeg": jpeg,
            "progressive jpeg": encode(rgb, "JPEG", quality=95, progressive=True),
            "png": whole,
            "lossy webp": encode(rgb, "WEBP", quality=95),
            "lossless webp": encode(rgb, "WEBP", lossless=True),
            "webp with alpha": webp,
        }.items()
        for percent in (1, 10, 50, 99)
    }
    others = {
        "gif": encode(quantised(), "GIF"),
        "tiff": encode(rgb, "TIFF"),
        "bmp": encode(rgb, "BMP"),
        "ico": encode(rgb, "ICO"),
        "pdf": encode(rgb, "PDF"),
        "zip": archive.getvalue(),
        "html": b"<!doctype html><img src='http://example.org/0x1.png'>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>",
        "text": b"not a picture",
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
        "psd": b"8BPS\0\1" + bytes(200),
        "base64": b"iVBORw0KGgoAAAANSUhEUgAAAGAAAABACAIAAABqTuVOAAAA",
    }
    if features.check("jpg_2000"):
        others["jpeg 2000"] = encode(rgb, "JPEG2000")
    if features.check("avif"):
        others["avif"] = encode(rgb, "AVIF")
    return {
        "0 bytes": b"",
        **cuts,
        **small,
        **others,
        "png without its end": png(rgb)[:-12],
        "png of half its rows": png(rgb, missing=HEIGHT // 2 * row),
        "png without its last row": png(rgb, missing=row),
        "png without the end of its last row": png(rgb, missing=1),
        "interlaced png without the end of its last row": png(rgb, missing=1, interlaced=True),
        "interlaced png of half its rows": png(rgb, missing=HEIGHT // 2 * row, interlaced=True),
        "interlaced png without its last row": png(rgb, missing=row, interlaced=True),
        "interlaced png of odd height without the last row of its last pass": png(
            rgb[:-1], missing=row, interlaced=True
        ),
        "png with data cut inside": whole[: data + 400] + chunk(b"IEND"),
        "png with a cut stream": header(96, 64) + chunk(b"IDAT", zlib.compress(rows(rgb))[:-900]) + chunk(b"IEND"),
        "png with a wrong checksum of its data": whole[:-14] + bytes([whole[-14] ^ 1]) + whole[-13:],
        "png with a wrong checksum of its header": whole[:29] + bytes([whole[29] ^ 1]) + whole[30:],
        "png without data": header(96, 64) + chunk(b"IEND"),
        "png 65000 x 65000": promise(65_000, 65_000),
        "png 65000 x 65000, header only": header(65_000, 65_000),
        "png of 144 megapixels of 1 bit": promise(12_000, 12_000, depth=1, colour=0),
        "png 1 x 100000": promise(1, 100_000),
        "png 100000 x 1": promise(100_000, 1),
        "png 0 x 64": promise(0, 64),
        "png 2^31 x 2^31": promise(2**31, 2**31),
        "png of 600,000 chunks": png(rgb, extra=chunk(b"teSt") * 600_000),
        "png of 600,000 empty data chunks": png(rgb, extra=chunk(b"IDAT") * 600_000),
        "png of two frames": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "webp of two frames": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "webp 16000 x 16000": with_webp_size(webp, 16_000, 16_000),
        "webp of another size than its frame": with_webp_size(webp, 97, 64),
        "jpeg 65000 x 65000": with_jpeg_size(jpeg, 65_000, 65_000),
        "jpeg 65000 x 65000, header only": cut(with_jpeg_size(jpeg, 65_000, 65_000), 60),
        "jpeg 0 x 0": with_jpeg_size(jpeg, 0, 0),
        "jpeg of two million segments": with_segment(jpeg, b"\xff\xed\0\2" * 1_900_000),
        "jpeg of a million tables": with_segment(jpeg, b"\xff\xdd\0\4\0\0" * 1_000_000),
        "jpeg of 300 scans": many_scans(2048, 300),
        "jpeg of nothing but markers": b"\xff\xd8" + b"\xff" * 7_000_000,
        "jpeg with 70 kB of junk": jpeg[:20] + bytes(70_000) + jpeg[20:],
        "jpeg without a scan": jpeg[: jpeg.index(b"\xff\xda")],
        "jpeg signature alone": b"\xff\xd8\xff",
        "png signature alone": PNG,
        "webp signature alone": b"RIFF\x04\0\0\0WEBP",
    }
