"""The seal on every stored value. Knows nothing of what is in one."""

from __future__ import annotations

import hashlib
import hmac
import json

SEAL = b"fs1\0"


class SealBroken(Exception):
    """A stored value is not what was written under that name; it is never served."""


class Sealer:
    """Seals values with a keyed digest over where they belong and what they are.

    Rot, a value put under another name, or one that somebody else wrote does not pass `open`.
    """

    def __init__(self, key: bytes):
        self._key = hashlib.blake2b(key, digest_size=32, person=b"fewshot-store").digest()

    def _digest(self, place: tuple[str, ...], payload: bytes) -> bytes:
        name = json.dumps(place).encode()
        message = hashlib.blake2b(key=self._key, digest_size=32)
        message.update(len(name).to_bytes(4, "big") + name)
        message.update(payload)
        return message.digest()

    def seal(self, payload: bytes, *place: str) -> bytes:
        return SEAL + self._digest(place, payload) + payload

    def open(self, data: bytes, *place: str) -> bytes:
        """The payload. Raises SealBroken unless it was sealed by this key for this place."""
        start = len(SEAL) + 32
        if not isinstance(data, bytes) or data[: len(SEAL)] != SEAL or len(data) < start:
            raise SealBroken("The value is not sealed.")
        payload = data[start:]
        if not hmac.compare_digest(data[len(SEAL) : start], self._digest(place, payload)):
            raise SealBroken("The value does not match its seal.")
        return payload

    @staticmethod
    def name(data: bytes) -> str:
        """The seal of a sealed value, in hex: it tells it from every other."""
        return data[len(SEAL) : len(SEAL) + 32].hex()
