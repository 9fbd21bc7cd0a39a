"""What a store keeps and promises, and the sealed form in which it is kept.

A **record** is the user's data: support features, labels and settings, from which a head can be made again. A **head**
is a cache of it. A **pointer** says at which version and head a task is. Stores see a tenant only through a `Scope`, so
none of their functions can take a task name without one. Knows nothing of HTTP, learners or extractors.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load, save

from models.errors import StoreUnavailable
from models.head import Head

RECORD_FORMAT = "fewshot-record-1"
SEAL = b"fs1\0"


class SealBroken(Exception):
    """A stored value is not what was written under that name; it is never served."""


class StoreMisconfigured(StoreUnavailable):
    """The store as it is set up cannot keep what it promises: a start is refused, a request answered 503."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where a task is: its version, counted from 1, and the id of its head."""

    version: int
    head: str
    stale: bool = False  # remembered from before the store went away; never written

    def to_bytes(self) -> bytes:
        return json.dumps([self.version, self.head]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Pointer:
        """Raises SealBroken: only bytes that passed their seal get here, so anything else is our own fault."""
        try:
            version, head = json.loads(data)
        except (ValueError, TypeError) as error:
            raise SealBroken("The pointer cannot be read.") from error
        return cls(version, head)


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """All that a head is made from. Features are half precision, and heads are always made from them as such."""

    artifact: str
    method: str
    labels: tuple[str, ...]  # of the classes
    ids: tuple[str, ...]  # of the examples
    classes: np.ndarray  # [n] int32: class of each example
    features: np.ndarray  # [n, dim] float16
    unlabelled: np.ndarray  # [u, dim] float16
    created: float  # seconds since 1970
    expires: float | None = None

    def to_bytes(self) -> bytes:
        text = {
            "format": RECORD_FORMAT,
            "artifact": self.artifact,
            "method": self.method,
            "labels": self.labels,
            "ids": self.ids,
            "times": [self.created, self.expires],
        }
        arrays = {"classes": self.classes, "features": self.features, "unlabelled": self.unlabelled}
        # safetensors writes the memory behind a view as it lies there: a slice would come back as other numbers.
        return save(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata={"record": json.dumps(text)}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Raises SealBroken when the bytes are no record of a known format."""
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            text = json.loads(header["__metadata__"]["record"])
            if text["format"] != RECORD_FORMAT:
                raise SealBroken(f"The record has the unknown format {text['format']!r}.")
            arrays: dict[str, Any] = load(data)
            created, expires = text["times"]
            return cls(
                artifact=text["artifact"],
                method=text["method"],
                labels=tuple(text["labels"]),
                ids=tuple(text["ids"]),
                classes=arrays["classes"],
                features=arrays["features"],
                unlabelled=arrays["unlabelled"],
                created=created,
                expires=expires,
            )
        except SealBroken:
            raise
        except Exception as error:  # any damage is the same to the reader
            raise SealBroken("The record cannot be read.") from error


class Scope(Protocol):
    """One tenant's view of a store. Every function raises StoreUnavailable when the store does not answer."""

    @property
    def tenant(self) -> str: ...

    async def pointer(self, task: str) -> Pointer | None:
        """Where the task is now; None when there is none. Raises SealBroken when the pointer is damaged."""
        ...

    async def record(self, task: str) -> tuple[Pointer, Record] | None:
        """The record that the task points at. Raises SealBroken when it is damaged."""
        ...

    async def head(self, head_id: str) -> Head | None:
        """A cached head; None when it is gone or damaged."""
        ...

    async def keep_head(self, head_id: str, head: Head) -> None:
        """Puts a head that was made again back into the cache."""
        ...

    async def commit(self, task: str, record: Record, head_id: str, head: Head, *, expect: int | None) -> Pointer:
        """Writes record and head and moves the pointer to the next version, all or nothing, durably.

        `expect` is the version the task must be at (0: it must not exist; None: any). Raises VersionConflict.
        """
        ...

    async def delete(self, task: str) -> bool:
        """Forgets a task, durably; False when there is none."""
        ...

    async def tasks(self, *, limit: int, after: str = "") -> list[tuple[str, Pointer]]:
        """Up to `limit` tasks whose names sort after `after`, by name."""
        ...


class Store(Protocol):
    name: str

    async def open(self) -> None:
        """Prepares files or connections. A shared store that is away is no reason to fail: it may come back."""
        ...

    async def ping(self) -> bool: ...

    def scope(self, tenant: str) -> Scope: ...

    async def close(self) -> None: ...


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
