"""Bytes of one text -> uint8 array of the length an artifact asks for.

The one place where texts are opened, used by training and serving alike, so both see the same bytes. A text is UTF-8;
what a trunk reads is its bytes, and no tokeniser stands between. Knows nothing of requests, tasks or networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.errors import TooLarge, UndecodableExample

FORMATS = ("UTF-8",)
MAX_BYTES = 16_384
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class TextDecoder:
    """Reads one UTF-8 text: without a byte order mark, line ends as one byte, its beginning, zeros behind it.

    Calling it gives uint8 [length]. Zero is no byte of a text, so whoever reads the array knows where the text ends.
    A text that is longer than the array is cut before the first character that does not fit, as a picture loses its
    edges. Raises UndecodableExample or TooLarge.
    """

    length: int
    max_bytes: int = MAX_BYTES

    @property
    def shape(self) -> tuple[int]:
        return (self.length,)

    def __call__(self, payload: bytes) -> np.ndarray:
        if len(payload) > self.max_bytes:
            raise TooLarge(f"The text has {len(payload)} bytes; the limit is {self.max_bytes} (MAX_TEXT_BYTES).")
        out = np.zeros(self.length, np.uint8)
        data = self._text(payload)
        out[: len(data)] = np.frombuffer(data, np.uint8)
        return out

    def _text(self, payload: bytes) -> bytes:
        data = payload.removeprefix(_BOM)
        if not data.strip():
            raise UndecodableExample("The text is empty.")
        try:
            data.decode()
        except UnicodeDecodeError:
            raise UndecodableExample(_why_not_a_text(data)) from None
        if b"\0" in data:
            raise UndecodableExample("The text holds a NUL character, which no text has.")
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = self.length
        if len(data) > end:
            while data[end] & 0xC0 == 0x80:  # within a character
                end -= 1
        return data[:end]


_SIGNATURES = (
    (b"\xff\xd8", "a JPEG"),
    (b"\x89PNG", "a PNG"),
    (b"RIFF", "a WEBP or another RIFF file"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"PK\3\4", "a zip archive or an office document"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "something compressed"),
)


def _why_not_a_text(data: bytes) -> str:
    for magic, name in _SIGNATURES:
        if data.startswith(magic):
            return f"This looks like {name}; plain text in UTF-8 is accepted."
    return "This is not UTF-8; plain text in UTF-8 is accepted."
