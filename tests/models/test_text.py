from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from models.errors import TooLarge, UndecodableExample
from models.text import TextDecoder


def read(text: str | bytes, *, length: int = 16) -> bytes:
    array = TextDecoder(length)(text.encode() if isinstance(text, str) else text)
    assert array.dtype == np.uint8
    assert array.shape == TextDecoder(length).shape == (length,)
    return array.tobytes()


def test_a_text_is_its_bytes_with_zeros_behind_its_end() -> None:
    assert read("Grüße") == "Grüße".encode() + b"\0" * 9
    assert read("x" * 16) == b"x" * 16


def test_how_a_text_was_saved_makes_no_difference() -> None:
    assert read("\ufeffone\r\ntwo\rthree") == read("one\ntwo\nthree")


@pytest.mark.parametrize("character", ["e", "é", "€", "🙂"])
@pytest.mark.parametrize("before", range(5))
def test_a_long_text_is_cut_between_two_characters(character: str, before: int) -> None:
    text = "a" * before + character * 20
    found = read(text).rstrip(b"\0")
    assert text.startswith(found.decode())
    assert 16 - len(found) < len(character.encode())


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "empty"),
        (b" \r\n\t", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"a\0b", "NUL"),
        (b"caf\xe9", "not UTF-8"),
        (b"\xed\xa0\x80", "not UTF-8"),  # half a pair of UTF-16
        (b"\xc0\xaf", "not UTF-8"),  # a slash in more bytes than it needs
        ("text".encode("utf-16"), "UTF-16"),
        (png(), "a PNG"),
    ],
)
def test_what_is_no_text_is_refused_with_a_sentence(payload: bytes, words: str) -> None:
    with pytest.raises(UndecodableExample, match=words):
        TextDecoder(16)(payload)


def test_the_limit_lets_through_what_it_names_and_no_more() -> None:
    decoder = TextDecoder(16, max_bytes=20)
    assert decoder(b"x" * 20).tobytes() == b"x" * 16
    with pytest.raises(TooLarge, match=r"21 bytes; the limit is 20 .MAX_TEXT_BYTES."):
        decoder(b"x" * 21)


def test_bytes_of_any_kind_are_read_or_refused_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    decoder, outcomes = TextDecoder(16), set()
    for size in rng.integers(0, 40, 500):
        high = int(rng.choice([0x80, 0x100]))
        try:
            found = decoder(rng.integers(0, high, size, dtype=np.uint8).tobytes())
            assert found.tobytes().rstrip(b"\0").decode()
            outcomes.add("read")
        except UndecodableExample:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
