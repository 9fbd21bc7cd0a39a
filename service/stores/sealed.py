"""One tenant's values as sealed bytes: how every store writes them and reads them back.

Each value is sealed for the tenant, its kind and its name, so one that was moved, swapped or left to rot is noticed.
Knows nothing of where the bytes are kept.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple

from models.errors import VersionConflict
from models.head import Head, HeadInvalid
from service.stores import Expected, Pointer, Record, SealBroken, Sealer, Told
from service.stores.record import Base, RecentRecords, applied, base_of, difference

log = logging.getLogger(__name__)


class History(NamedTuple):
    """The kept versions of a task, and when all of them expire (nan: that is not known)."""

    versions: list[Pointer]  # newest first
    expires: float | None = math.nan
    bases: Mapping[int, Base] = MappingProxyType({})  # by version; a whole record is its own
    told: Mapping[int, Told] = MappingProxyType({})  # by version

    @property
    def base(self) -> Base | None:
        """Of the newest version, where it is known."""
        return self.bases.get(self.versions[0].version) if self.versions else None

    @property
    def records(self) -> set[int]:
        """The versions whose records are needed."""
        return {n for known in self.versions for n in (known.version, *self.bases.get(known.version, ())[:1])}

    def then(self, pointer: Pointer, base: Base, record: Record, *, most: int, instead: bool) -> History:
        """The history after a commit: at most so many versions, the new one included. `instead`: see Scope.commit.

        Of two that say the same the older goes first: who goes back step by step pushes out none that lies before.
        """
        kept = [pointer, *self.versions[instead:]]
        while len(kept) > most:
            heads = [known.head for known in kept]
            again = [place for place, head in enumerate(heads) if head in heads[:place]]
            del kept[again[-1] if again else -1]
        numbers = {known.version for known in kept}
        told = Told(round(time.time(), 3), record.method, len(record.labels), len(record.classes))
        return History(
            kept,
            record.expires,
            {**{n: known for n, known in self.bases.items() if n in numbers}, pointer.version: base},
            {**{n: known for n, known in self.told.items() if n in numbers}, pointer.version: told},
        )

    def dropped(self, after: History) -> set[str]:
        """The heads that go with a commit: of versions that are not kept, or that would end at another time."""
        kept = after.versions if self.expires == after.expires else after.versions[:1]
        return {known.head for known in self.versions} - {known.head for known in kept}


def next_version(current: int, history: History, expect: Expected) -> int:
    """The version that follows `current` (0: no task). Raises VersionConflict unless the task is where it must be."""
    at = history.versions[0] if history.versions else None  # none where the pointer is damaged
    version = expect.version if isinstance(expect, Pointer) else expect
    if version is not None and version != current:
        raise VersionConflict(f"The task is at version {current}, not {version}.")
    if isinstance(expect, Pointer) and at is not None and at.head != expect.head:
        raise VersionConflict(f"The task was deleted and made anew, up to the same version {current}.")
    return current + 1


def ends(ttl_s: float, expires: float | None, *, now: float) -> float:
    """When a head is thrown away: after its time, or with its task."""
    return now + ttl_s if expires is None or math.isnan(expires) else min(now + ttl_s, expires)


class Noted(NamedTuple):
    """What an index tells of a remembered value."""

    end: float
    size: int  # sealed


def too_many(sizes: Sequence[int], most: int, most_bytes: int) -> int:
    """How many of the first have to go, so that the others are so many, of so many bytes, at most."""
    left, kept = most_bytes, 0
    for size in reversed(sizes[-most:]):
        left -= size
        if left < 0:
            break
        kept += 1
    return len(sizes) - kept


class Sealed:
    def __init__(self, sealer: Sealer, tenant: str, recent: RecentRecords):
        self._sealer = sealer
        self._tenant = tenant
        self._recent = recent

    def seal_pointer(self, task: str, pointer: Pointer) -> bytes:
        return self._sealer.seal(pointer.to_bytes(), self._tenant, "pointer", task)

    def open_pointer(self, task: str, data: bytes) -> Pointer:
        return Pointer.from_bytes(self._sealer.open(data, self._tenant, "pointer", task))

    def list_pointer(self, task: str, data: bytes) -> Pointer | None:
        """For listings, which one damaged task must not end: None, and a line in the log."""
        try:
            return self.open_pointer(task, data)
        except SealBroken:
            log.warning("The pointer of task %s is damaged; the task is left out of the listing.", task)
            return None

    def seal_history(self, task: str, history: History) -> bytes:
        versions = [[at.version, at.head, *history.bases.get(at.version, ())] for at in history.versions]
        payload = [history.expires, versions, history.told]
        return self._sealer.seal(json.dumps(payload).encode(), self._tenant, "history", task)

    def open_history(self, task: str, data: bytes | None) -> History:
        """The history as it was written, whether it fits the pointer or not. Raises SealBroken."""
        if data is None:  # the task was written before there were histories
            return History([])
        payload = self._sealer.open(data, self._tenant, "history", task)
        try:
            expires, versions, *more = json.loads(payload)
            told = {int(version): Told(*facts) for version, facts in (more[0] if more else {}).items()}
            pointers = [Pointer(version, head, told=told.get(version)) for version, head, *_ in versions]
            return History(pointers, expires, {version: Base(*base) for version, _, *base in versions if base}, told)
        except (ValueError, TypeError) as error:
            raise SealBroken("The history cannot be read.") from error

    def versions(self, task: str, *, pointer: bytes, history: bytes | None) -> list[Pointer]:
        """The kept versions, newest first. Raises SealBroken."""
        at = self.open_pointer(task, pointer)
        found = self.open_history(task, history).versions
        # One that does not end at the pointer is older than it: a program that knew no histories wrote since.
        return found if found[:1] == [at] else [at]

    def at(self, task: str, version: int | None, *, pointer: bytes, history: bytes | None) -> Pointer | None:
        """Where the task was at a version (None: where it is); None when that is not kept. Raises SealBroken."""
        current = self.open_pointer(task, pointer)
        if version is None or version == current.version:
            return current
        kept = self.versions(task, pointer=pointer, history=history)
        return next((known for known in kept if known.version == version), None)

    def history(self, task: str, version: int, *, pointer: bytes | None, history: bytes | None) -> History:
        """What a change finds that goes on from `version`. What is damaged is left out: the history begins anew."""
        at, known = None, History([])
        with suppress(SealBroken):
            at = None if pointer is None else self.open_pointer(task, pointer)
        with suppress(SealBroken):
            known = self.open_history(task, history)
        last = known.versions[0] if known.versions else None
        if last is not None and last.version == version and at in (last, None):
            return known
        return History([at] if at is not None and at.version == version else [])

    def seal_remembered(self, task: str, key: str, *, value: bytes) -> bytes:
        return self._sealer.seal(value, self._tenant, "remembered", task, key)

    def open_remembered(self, task: str, key: str, *, data: bytes | None) -> bytes | None:
        """None when there is none, and when it is damaged."""
        try:
            return None if data is None else self._sealer.open(data, self._tenant, "remembered", task, key)
        except SealBroken:
            log.warning("A value remembered beside task %s is damaged and counts as forgotten.", task)
            return None

    def seal_index(self, task: str, index: dict[str, Noted]) -> bytes:
        rows = [[name, *noted] for name, noted in index.items()]
        return self._sealer.seal(json.dumps(rows).encode(), self._tenant, "index", task)

    def open_index(self, task: str, data: bytes | None) -> dict[str, Noted]:
        """The names of what is remembered, by age; of a damaged index, none."""
        with suppress(SealBroken, ValueError, TypeError):
            rows = [] if data is None else json.loads(self._sealer.open(data, self._tenant, "index", task))
            if isinstance(rows, dict):  # as it was written before sizes were: they count as nothing, for a day
                return {name: Noted(end, 0) for name, end in rows.items()}
            return {name: Noted(end, size) for name, end, size in rows}
        log.warning("The index of what is remembered beside task %s is damaged; all of it counts as forgotten.", task)
        return {}

    def seal_record(
        self, task: str, version: int, *, record: Record, base: Base | None, stored: bytes | None
    ) -> tuple[bytes, Base]:
        """The record sealed, as a difference to `base` where that is worth it; and its base.

        `stored` is what is there of the base: on what is damaged or gone nothing is built.
        """
        before = None if base is None else self._recent.get(base)
        payload = None
        if base is not None and before is not None and self._recent.is_there(base, stored):
            payload = difference(base, before, record)
        data = self._sealer.seal(payload or record.to_bytes(), self._tenant, "record", task, str(version))
        own, owner = Base(version, self._sealer.name(data)), (self._tenant, task)
        base = base if base is not None and payload else own
        self._recent.put(owner, own, record, sealed=data if base is own else b"")
        self._recent.forget(owner, but=(base, own))
        return data, base

    def wants(self, base: Base) -> bool:
        """Whether a difference to a base could be made, so that it is worth looking at what is stored of it."""
        return self._recent.get(base) is not None

    def open_record(self, task: str, version: int, *, data: bytes, base: bytes | None = None) -> Record | Base:
        """A record; or its base, where that is needed and neither in memory nor given. Raises SealBroken."""
        payload = self._sealer.open(data, self._tenant, "record", task, str(version))
        owner, own = (self._tenant, task), Base(version, self._sealer.name(data))
        known = self._recent.get(own)
        if known is not None:
            return known
        needed = base_of(payload)
        if needed is None:
            return self._recent.put(owner, own, Record.from_bytes(payload), sealed=data)
        before = self._recent.get(needed)
        if before is None and base is not None and self._sealer.name(base) == needed.seal:
            whole = self._sealer.open(base, self._tenant, "record", task, str(needed.version))
            before = self._recent.put(owner, needed, Record.from_bytes(whole), sealed=base)
        return needed if before is None else self._recent.put(owner, own, applied(before, payload))

    def with_base(self, task: str, history: History, data: bytes | None) -> History:
        """A history that does not know it with the base of its newest version, from what is stored of that one."""
        if data is None:
            return history
        at = history.versions[0]
        with suppress(SealBroken):
            payload = self._sealer.open(data, self._tenant, "record", task, str(at.version))
            base = base_of(payload) or Base(at.version, self._sealer.name(data))
            return history._replace(bases={**history.bases, at.version: base})
        return history

    def forget(self, task: str) -> None:
        """Of a task that was deleted nothing stays in memory."""
        self._recent.forget((self._tenant, task))

    def seal_head(self, head_id: str, head: Head) -> bytes:
        return self._sealer.seal(head.to_bytes(), self._tenant, "head", head_id)

    def open_head(self, head_id: str, data: bytes | None) -> Head | None:
        """None when there is none, and when it cannot be read: it will be made again from its record."""
        try:
            return None if data is None else Head.from_bytes(self._sealer.open(data, self._tenant, "head", head_id))
        except SealBroken:
            log.warning("The cached head %s is damaged and counts as gone.", head_id)
        except HeadInvalid:  # it is as it was written: by an earlier version, or a later one
            log.info("The cached head %s has another format and counts as gone.", head_id)
        return None
