"""The outer structure of image files. What comes of it for pictures as a whole is told in test_images.py."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from models.containers import MAX_PARTS, MAX_SCANS, Container, Look, look, png_ends_early, unwrap
from tests.models import corpus
from tests.models.corpus import HEIGHT, WIDTH, encode, scene

READABLE = corpus.readable()
UNREADABLE = (ValueError, IndexError, struct.error)


@pytest.mark.parametrize("name", READABLE)
def test_a_header_gives_format_and_size(name: str) -> None:
    found = unwrap(READABLE[name][0])
    assert found.format == name.split()[0].upper()
    assert found.size == (WIDTH, HEIGHT)
    assert (found.orientation, found.frames) == (1, 1)


@pytest.mark.parametrize("name", READABLE)
def test_a_look_at_the_header_gives_the_pixels_at_once(name: str) -> None:
    found = look(READABLE[name][0])
    if "padded" in name:  # which is rare, and would take longer
        assert found is None
    else:
        assert found is not None
        assert (found.pixels, found.one_pass) == (WIDTH * HEIGHT, unwrap(READABLE[name][0]).one_pass)


def test_a_sequential_jpeg_of_several_scans_is_held_in_full_and_looked_at_so() -> None:
    file = READABLE["jpeg"][0]
    scan = file.index(b"\xff\xda") + 4
    assert look(file) == Look(WIDTH * HEIGHT, 1.0, True)
    apart = file[:scan] + b"\x01" + file[scan + 1 :]
    assert look(apart) == Look(WIDTH * HEIGHT, 1.0, False)
    assert not unwrap(apart).one_pass


@pytest.mark.parametrize("name", READABLE)
def test_what_cannot_be_looked_at_has_no_pixels_that_are_known(name: str) -> None:
    file = READABLE[name][0]
    for cut in (0, 1, 3, 11, 15, 17, 22):
        assert (look(file[:cut]) or (0,))[0] <= 1
    assert look(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 10_000) is None
    assert look(b"RIFF....WEBPVP8 " + bytes(20)) is None
    assert look(b"GIF89a" + bytes(40)) is None


@pytest.mark.parametrize("name", READABLE)
def test_what_is_kept_shows_the_same_picture(name: str) -> None:
    file = READABLE[name][0]
    kept = Image.open(io.BytesIO(unwrap(file).data)).convert("RGBA")
    assert np.array_equal(np.asarray(kept), np.asarray(Image.open(io.BytesIO(file)).convert("RGBA")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_gives_the_orientation_and_the_size_is_that_of_the_file(kind: str, orientation: int) -> None:
    found = unwrap(encode(scene(), kind, exif=corpus.exif(orientation)))
    assert (found.orientation, found.size) == (orientation, (WIDTH, HEIGHT))


def test_of_two_orientations_in_a_jpeg_the_first_counts() -> None:
    segments = [b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif for exif in map(corpus.exif, (6, 3))]
    assert unwrap(corpus.with_segment(encode(scene(), "JPEG"), b"".join(segments))).orientation == 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_is_upright(kind: str, orientation: int) -> None:
    assert unwrap(encode(scene(), kind, exif=corpus.exif(orientation))).orientation == 1


def test_what_makes_no_pixels_does_not_go_on() -> None:
    secret = b"taken at 52.1 N, 11.6 E"
    jpeg = encode(scene(), "JPEG", exif=corpus.exif(6) + secret, icc_profile=secret, comment=secret, xmp=secret)
    start = corpus.header(WIDTH, HEIGHT)
    png = corpus.png(scene(), extra=corpus.chunk(b"tEXt", b"a\0" + secret), after=corpus.chunk(b"prVt", secret))
    assert jpeg.count(secret) == 4
    assert png.count(secret) == 2
    assert secret not in unwrap(jpeg).data
    assert secret not in unwrap(png).data
    assert unwrap(png).data.startswith(start)


def test_frames_beyond_the_first_are_counted() -> None:
    frames = [Image.fromarray(scene()), Image.fromarray(255 - scene())]
    for kind in ("PNG", "WEBP"):
        assert unwrap(encode(frames[0], kind, save_all=True, append_images=frames[1:])).frames == 2


def with_segments(n: int) -> bytes:
    return corpus.with_segment(encode(scene(), "JPEG"), b"\xff\xfe\0\2" * n)


def with_chunks(n: int) -> bytes:
    return corpus.png(scene(), extra=corpus.chunk(b"teSt") * n)


@pytest.mark.parametrize("make", [with_segments, with_chunks])
def test_parts_are_counted_and_limited(make: Callable[[int], bytes]) -> None:
    assert isinstance(unwrap(make(MAX_PARTS - 50)), Container)
    with pytest.raises(ValueError, match="too many"):
        unwrap(make(MAX_PARTS))


def test_scans_are_counted_and_limited() -> None:
    own = corpus.many_scans(64, 0).count(b"\xff\xda")
    assert 5 < own < 15  # of an ordinary progressive JPEG
    assert isinstance(unwrap(corpus.many_scans(64, MAX_SCANS - own)), Container)
    with pytest.raises(ValueError, match="too many scans"):
        unwrap(corpus.many_scans(64, MAX_SCANS - own + 1))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("colours", [(), (3,)])
def test_a_png_ends_early_when_a_single_byte_of_its_rows_is_missing(
    interlaced: bool, kind: type, colours: tuple[int, ...]
) -> None:
    for height, width in [(8, 8), (9, 13), (17, 31), (1, 5)]:
        pixels = np.ones((height, width, *colours), kind)
        assert not png_ends_early(corpus.png(pixels, interlaced=interlaced))
        assert png_ends_early(corpus.png(pixels, interlaced=interlaced, missing=1))


@pytest.mark.parametrize("name", [name for name in READABLE if name.startswith("png")])
def test_a_whole_png_of_any_depth_does_not_end_early(name: str) -> None:
    assert not png_ends_early(READABLE[name][0])


@pytest.mark.parametrize("file", [b"", b"RIFF", b"\x89PNG", b"GIF89a", b"\xff\xd8", bytes(100)])
def test_what_is_none_of_the_three_is_said_to_be_so(file: bytes) -> None:
    with pytest.raises(UNREADABLE):
        unwrap(file)
