"""What a store keeps and promises, and the sealed form in which it is kept.

A **record** is the user's data: support features, labels and settings, from which a head can be made again. A **head**
is a cache of it. A **pointer** says at which version and head a task is. Stores see a tenant only through a `Scope`, so
none of their functions can take a task name without one. Knows nothing of HTTP, learners or extractors.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load, save

from models.errors import StoreUnavailable
from models.head import Head

RECORD_FORMAT = "fewshot-record-2"
RECORD_FORMATS = ("fewshot-record-1", RECORD_FORMAT)  # that are read; the first one had no images
MOST_REMEMBERED = 1000  # values beside one task
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


Expected = int | Pointer | None  # where a task must be for a change: see Scope.commit


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
    images: tuple[bytes, ...] = ()  # encoded, in the order of `ids`; none when they are not retained

    def to_bytes(self) -> bytes:
        """Raises ValueError when there are images, but not one for each id."""
        if self.images and len(self.images) != len(self.ids):
            raise ValueError(f"There are {len(self.images)} images for {len(self.ids)} ids.")
        text = {
            "format": RECORD_FORMAT,
            "artifact": self.artifact,
            "method": self.method,
            "labels": self.labels,
            "ids": self.ids,
            "times": [self.created, self.expires],
        }
        arrays = {
            "classes": self.classes,
            "features": self.features,
            "unlabelled": self.unlabelled,
            "images": np.frombuffer(b"".join(self.images), np.uint8),
            "sizes": np.array([len(image) for image in self.images], np.int64),
        }
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
            if text["format"] not in RECORD_FORMATS:
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
                images=() if text["format"] == RECORD_FORMATS[0] else _images(arrays, len(text["ids"])),
            )
        except SealBroken:
            raise
        except Exception as error:  # any damage is the same to the reader
            raise SealBroken("The record cannot be read.") from error


def _images(arrays: dict[str, Any], count: int) -> tuple[bytes, ...]:
    """The images of `count` examples, cut apart. Raises ValueError unless the sizes are those of all of them."""
    images, sizes = arrays["images"], arrays["sizes"]
    ends = [0, *itertools.accumulate(sizes.tolist())]
    fits = (
        images.dtype == np.uint8
        and sizes.dtype == np.int64
        and images.shape == (ends[-1],)
        and len(sizes) in (0, count)
        and all(size >= 0 for size in sizes)
    )
    if not fits:
        raise ValueError("The images do not fit their sizes.")
    data = images.tobytes()
    return tuple(data[start:end] for start, end in itertools.pairwise(ends))


class Scope(Protocol):
    """One tenant's view of a store. Every function raises StoreUnavailable when the store does not answer."""

    @property
    def tenant(self) -> str: ...

    async def pointer(self, task: str) -> Pointer | None:
        """Where the task is now; None when there is none. Raises SealBroken when the pointer is damaged."""
        ...

    async def record(self, task: str, *, version: int | None = None) -> tuple[Pointer, Record] | None:
        """The record of a version (None: of the current one), and where that was; None when it is not kept.

        An earlier one has the `expires` that it was written with; it ends with the current one. Raises SealBroken when
        it is damaged.
        """
        ...

    async def versions(self, task: str) -> list[Pointer]:
        """The kept versions, newest first, the current one included; none when there is no such task.

        Raises SealBroken when the pointer or the history is damaged.
        """
        ...

    def head_in_memory(self, head_id: str) -> Head | None:
        """A head that is there without waiting; None when `head` has to be asked."""
        ...

    async def head(self, head_id: str) -> Head | None:
        """A cached head; None when it is gone or damaged."""
        ...

    async def keep_head(self, task: str, pointer: Pointer, head: Head) -> None:
        """Puts a head that was made again back into the cache, unless the task is not at `pointer` any more."""
        ...

    async def commit(self, task: str, record: Record, head_id: str, head: Head | None, *, expect: Expected) -> Pointer:
        """Writes a record, with its head where there is one yet, and moves the pointer to the next version.

        All or nothing, durably.

        `expect` is where the task must be: a version (0: it must not exist; None: any), or a version and its head,
        which tells it from a task of the same name that was deleted and made anew. Raises VersionConflict. Earlier
        records are kept, as many as the store was made for, and end when this one does; heads of those that are not
        go with them.
        """
        ...

    async def delete(self, task: str) -> bool:
        """Forgets a task, all its versions and what is remembered beside it, durably; False when there is none."""
        ...

    async def remember(self, task: str, key: str, value: bytes, *, ttl_s: float, new: bool = False) -> bool:
        """Keeps a small value beside a task for `ttl_s` seconds, durably; says whether it was written.

        With `new` only when there is none under that key; of several who try at once, one succeeds. The task need not
        exist. Of more than MOST_REMEMBERED values beside one task, those written first are forgotten.
        """
        ...

    async def recall(self, task: str, key: str) -> bytes | None:
        """What is remembered under that key; None when there is none, or it is damaged."""
        ...

    async def forget_remembered(self, task: str, key: str) -> None:
        """Forgets one remembered value, durably, if there is one."""
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
