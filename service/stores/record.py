"""Records as bytes: whole, or as what was added to one that is stored already.

A task that grows one image at a time would else be written anew for each of them, a megabyte for a thousand examples. A
difference names the value it starts from, its **base**, by that one's seal, and is whole again with it alone: there are
no chains. What was taken away is in no base that is written after it, so that it lies about no longer than the versions
that had it. Knows nothing of stores or seals.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from service.stores.seal import SealBroken

FORMAT = "fewshot-record-2"
FORMATS = ("fewshot-record-1", FORMAT)  # that are read; the first one had no images
DIFFERENCE = "fewshot-difference-1"
LEAST = 100  # examples of a base: less is quickly written
MOST_NEW = 0.25  # examples of a difference that its base has not, as a share of those that it has
MOST_BYTES = 48 * 2**20  # of the records in memory, and of the bases as they are stored


class Base(NamedTuple):
    """A whole record as it is stored, from which others are differences."""

    version: int
    seal: str  # hex


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
            "format": FORMAT,
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
            text = _text(data)
            if text["format"] not in FORMATS:
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
                images=() if text["format"] == FORMATS[0] else _images(arrays, len(text["ids"])),
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


def difference(base: Base, before: Record, record: Record) -> bytes | None:
    """What leads from `before`, which is stored at `base`, to a record; None where it had better be written whole."""
    known, kept = set(before.ids), len(before.ids)
    there = [name in known for name in record.ids]
    fits = (
        kept >= LEAST
        and len(there) - kept <= MOST_NEW * kept
        and before.artifact == record.artifact
        and bool(before.images) == bool(record.images)
        and tuple(itertools.compress(record.ids, there)) == before.ids
    )
    if not fits:
        return None
    old = np.array(there)
    features, new = _all(record), np.flatnonzero(~old)
    if not _holds(features, _all(before), new):
        return None  # looked at anew, perhaps in another batch, they end in other bits
    images = [record.images[index] for index in new] if record.images else []
    text = {
        "format": DIFFERENCE,
        "base": base,
        "artifact": record.artifact,
        "method": record.method,
        "labels": record.labels,
        "ids": [record.ids[index] for index in new],
        "times": [record.created, record.expires],
    }
    arrays = {
        "classes": record.classes,
        "rows": np.where(old, old.cumsum() - 1, kept + (~old).cumsum() - 1).astype(np.int32),
        "features": features[new],
        "images": np.frombuffer(b"".join(images), np.uint8),
        "sizes": np.array([len(image) for image in images], np.int64),
    }
    return save(arrays, metadata={"record": json.dumps(text)})


def _holds(features: np.ndarray, known: np.ndarray, new: np.ndarray) -> bool:
    """Whether features but for the rows `new` are those known, bit by bit; run by run, to copy nothing."""
    words = np.uint64 if features.shape[1] % 4 == 0 else np.uint16  # the wider, the fewer
    start = 0
    for before, end in enumerate([*new.tolist(), len(features)]):
        run, same = features[start:end], known[start - before : end - before]
        if not (run.view(words) == same.view(words)).all():
            return False
        start = end + 1
    return True


def _all(record: Record) -> np.ndarray:
    """Features of all examples, in the order of their ids."""
    return np.concatenate([record.features, record.unlabelled]) if len(record.unlabelled) else record.features


def base_of(data: bytes) -> Base | None:
    """What a difference starts from; None for a whole record. Raises SealBroken."""
    text = _text(data)
    try:
        return Base(*text["base"]) if text["format"] == DIFFERENCE else None
    except (KeyError, TypeError) as error:
        raise SealBroken("The record cannot be read.") from error


def applied(before: Record, data: bytes) -> Record:
    """The record that a difference and its base make. Raises SealBroken."""
    text = _text(data)
    try:
        arrays: dict[str, Any] = load(data)
        rows, labelled = arrays["rows"], len(arrays["classes"])
        ids = (*before.ids, *text["ids"])
        images = (*before.images, *_images(arrays, len(text["ids"]))) if before.images else ()
        features = np.concatenate([_all(before), arrays["features"]])[rows]
        created, expires = text["times"]
        return Record(
            artifact=text["artifact"],
            method=text["method"],
            labels=tuple(text["labels"]),
            ids=tuple(ids[row] for row in rows),
            classes=arrays["classes"],
            features=features[:labelled],
            unlabelled=features[labelled:],
            created=created,
            expires=expires,
            images=tuple(images[row] for row in rows) if images else (),
        )
    except Exception as error:  # any damage is the same to the reader
        raise SealBroken("The record cannot be read.") from error


def _text(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text: dict[str, Any] = json.loads(header["__metadata__"]["record"])
        return text
    except Exception as error:  # likewise
        raise SealBroken("The record cannot be read.") from error


class Recent(NamedTuple):
    owner: tuple[str, str]  # tenant and task
    record: Record
    sealed: bytes  # of a whole record, as it was read or written; others are differences to it

    @property
    def size(self) -> int:
        own = self.record
        arrays = own.features.nbytes + own.unlabelled.nbytes
        return arrays + sum(map(len, own.images)) + 100 * len(own.ids) + len(self.sealed)


class RecentRecords:
    """Records that were read or written of late, by their seals: what is changed next, and what it is a difference to.

    Small ones are quickly read, and have no place here. For several threads.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._records: OrderedDict[str, Recent] = OrderedDict()
        self._bytes = 0
        self._most = most_bytes
        self._lock = threading.Lock()

    def get(self, base: Base) -> Record | None:
        with self._lock:
            found = self._records.get(base.seal)
            if found is None:
                return None
            self._records.move_to_end(base.seal)
            return found.record

    def is_there(self, base: Base, stored: bytes | None) -> bool:
        """Whether what is stored of a whole record in memory still is what it was, byte for byte."""
        with self._lock:
            found = self._records.get(base.seal)
        return found is not None and found.sealed == stored

    def put(self, owner: tuple[str, str], base: Base, record: Record, *, sealed: bytes = b"") -> Record:
        recent = Recent(owner, record, sealed)
        with self._lock:
            if len(record.ids) >= LEAST and recent.size <= self._most and base.seal not in self._records:
                self._records[base.seal] = recent
                self._bytes += recent.size
                while self._bytes > self._most:
                    self._drop(next(iter(self._records)))
        return record

    def forget(self, owner: tuple[str, str], *, but: tuple[Base, ...] = ()) -> None:
        """Those of a task, but for some: after a change, what it was before."""
        kept = {base.seal for base in but}
        with self._lock:
            for seal in [seal for seal, recent in self._records.items() if recent.owner == owner and seal not in kept]:
                self._drop(seal)

    def _drop(self, seal: str) -> None:
        self._bytes -= self._records.pop(seal).size
