"""A store in a dict, for tests and for users' tests: what it keeps ends with the process.

It seals its values like the others, so what passes over it passes over them. Knows nothing of files or networks.
"""

from __future__ import annotations

import time

from models.head import Head
from service.stores import (
    CLAIM_S,
    MOST_REMEMBERED,
    MOST_REMEMBERED_BYTES,
    Expected,
    Pointer,
    Record,
    SealBroken,
    Sealer,
)
from service.stores.record import Base, RecentRecords
from service.stores.sealed import Sealed, ends, next_version, too_many

# Of a record the name is (task, version), of a remembered value (task, key).
Name = str | tuple[str, int | str]


class MemoryStore:
    name = "memory"

    def __init__(self, *, key: bytes = b"memory", head_ttl_s: float = 7 * 24 * 3600, versions_kept: int = 10):
        self.sealer = Sealer(key)
        self.head_ttl_s = head_ttl_s
        self.versions_kept = versions_kept
        self.recent = RecentRecords()
        # (tenant, kind, name) -> sealed bytes and when they expire
        self.values: dict[tuple[str, str, Name], tuple[bytes, float | None]] = {}

    async def open(self) -> None:
        pass

    async def ping(self) -> bool:
        return True

    async def close(self) -> None:
        pass

    def scope(self, tenant: str) -> MemoryScope:
        return MemoryScope(self, tenant)


class MemoryScope:
    # No function waits in the middle, so on the event loop each of them is one transaction.

    def __init__(self, store: MemoryStore, tenant: str):
        self._store = store
        self.tenant = tenant
        self._sealed = Sealed(store.sealer, tenant, store.recent)

    def _get(self, kind: str, name: Name) -> bytes | None:
        data, expires = self._store.values.get((self.tenant, kind, name), (None, None))
        return None if expires is not None and expires <= time.time() else data

    def _put(self, kind: str, name: Name, *, data: bytes, expires: float | None) -> None:
        self._drop(kind, name)  # what is written last stands last
        self._store.values[self.tenant, kind, name] = data, expires

    def _drop(self, kind: str, name: Name) -> None:
        self._store.values.pop((self.tenant, kind, name), None)

    def _names(self, kind: str) -> list[Name]:
        return [name for tenant, other, name in self._store.values if (tenant, other) == (self.tenant, kind)]

    def _beside(self, task: str, kind: str) -> list[Name]:
        return [name for name in self._names(kind) if isinstance(name, tuple) and name[0] == task]

    async def pointer(self, task: str) -> Pointer | None:
        data = self._get("pointer", task)
        return None if data is None else self._sealed.open_pointer(task, data)

    async def record(self, task: str, *, version: int | None = None) -> tuple[Pointer, Record] | None:
        pointer = self._get("pointer", task)
        if pointer is None:
            return None
        at = self._sealed.at(task, version, pointer=pointer, history=self._get("history", task))
        data = None if at is None else self._get("record", (task, at.version))
        if at is not None and data is not None:
            record = self._sealed.open_record(task, at.version, data=data)
            if isinstance(record, Base):
                base = self._get("record", (task, record.version))
                record = self._sealed.open_record(task, at.version, data=data, base=base)
            if isinstance(record, Base):
                raise SealBroken("The base of the record is gone.")
            return at, record
        if version is None:
            raise SealBroken("The task has no record.")
        return None

    async def versions(self, task: str) -> list[Pointer]:
        pointer = self._get("pointer", task)
        if pointer is None:
            return []
        return self._sealed.versions(task, pointer=pointer, history=self._get("history", task))

    def head_in_memory(self, head_id: str) -> Head | None:
        return None

    async def head(self, head_id: str) -> Head | None:
        return self._sealed.open_head(head_id, self._get("head", head_id))

    async def keep_head(self, task: str, pointer: Pointer, head: Head) -> None:
        if await self.pointer(task) == pointer:
            _, expires = self._store.values[self.tenant, "pointer", task]
            self._put_head(pointer.head, head, expires=expires)

    def _put_head(self, head_id: str, head: Head, *, expires: float | None) -> None:
        sealed = self._sealed.seal_head(head_id, head)
        self._put("head", head_id, data=sealed, expires=ends(self._store.head_ttl_s, expires, now=time.time()))

    async def commit(
        self, task: str, record: Record, head_id: str, head: Head | None, *, expect: Expected, instead: bool = False
    ) -> Pointer:
        at, records = self._get("pointer", task), self._beside(task, "record")
        # Counted by the names of records, so that a damaged pointer loses neither count nor record.
        current = max((int(name[1]) for name in records), default=0) if at is not None else 0
        known = self._sealed.history(task, current, pointer=at, history=self._get("history", task))
        after = next_version(current, known, expect)
        if at is None:
            self._forget_earlier(task)
        if known.versions and known.base is None:
            known = self._sealed.with_base(task, known, self._get("record", (task, current)))
        pointer = Pointer(after, head_id)
        stored = None if known.base is None else self._get("record", (task, known.base.version))
        sealed, base = self._sealed.seal_record(task, pointer.version, record=record, base=known.base, stored=stored)
        most = self._store.versions_kept
        history = known.then(pointer, base, record, most=most, instead=instead)
        for dropped in known.dropped(history):
            self._drop("head", dropped)
        for name in records:
            data = self._get("record", name)
            self._drop("record", name)
            if data is not None and name[1] in history.records:
                self._put("record", name, data=data, expires=record.expires)
        self._put("record", (task, pointer.version), data=sealed, expires=record.expires)
        self._put("history", task, data=self._sealed.seal_history(task, history), expires=record.expires)
        self._put("pointer", task, data=self._sealed.seal_pointer(task, pointer), expires=record.expires)
        if head is not None:
            self._put_head(head_id, head, expires=record.expires)
        return pointer

    def _forget_earlier(self, task: str) -> None:
        """What is remembered beside a name that is no task was asked of an earlier one, but for claims."""
        until = time.time() + CLAIM_S
        for name in self._beside(task, "remembered"):
            _, expires = self._store.values[self.tenant, "remembered", name]
            if expires is not None and expires > until:
                self._drop("remembered", name)

    async def delete(self, task: str, *, expect: Expected = None) -> bool:
        at, records = self._get("pointer", task), self._beside(task, "record")
        current = max((int(name[1]) for name in records), default=0)
        history = self._sealed.history(task, current, pointer=at, history=self._get("history", task))
        if at is not None:
            next_version(current, history, expect)
        for known in history.versions:
            self._drop("head", known.head)
        for kind in ("record", "remembered"):
            for name in self._beside(task, kind):
                self._drop(kind, name)
        for kind in ("pointer", "history"):
            self._drop(kind, task)
        self._sealed.forget(task)
        return at is not None

    async def full(self, most: int) -> bool:
        return sum(self._get("pointer", name) is not None for name in self._names("pointer")) >= most

    async def tasks(self, *, limit: int, after: str = "") -> list[tuple[str, Pointer]]:
        found: list[tuple[str, Pointer]] = []
        for task in sorted(name for name in self._names("pointer") if isinstance(name, str) and name > after):
            data = self._get("pointer", task)
            pointer = None if data is None else self._sealed.list_pointer(task, data)
            if pointer is not None:
                found.append((task, pointer))
        return found[:limit]

    async def remember(self, task: str, key: str, value: bytes, *, ttl_s: float, new: bool = False) -> bool:
        if new and await self.recall(task, key) is not None:
            return False
        sealed = self._sealed.seal_remembered(task, key, value=value)
        if len(sealed) > MOST_REMEMBERED_BYTES:
            return False
        self._put("remembered", (task, key), data=sealed, expires=time.time() + ttl_s)
        live: dict[Name, int] = {}
        for name in self._beside(task, "remembered"):
            data = self._get("remembered", name)
            if data is None:
                self._drop("remembered", name)
            else:
                live[name] = len(data)
        for name in list(live)[: too_many(list(live.values()), MOST_REMEMBERED, MOST_REMEMBERED_BYTES)]:
            self._drop("remembered", name)
        return True

    async def recall(self, task: str, key: str) -> bytes | None:
        return self._sealed.open_remembered(task, key, data=self._get("remembered", (task, key)))

    async def forget_remembered(self, task: str, key: str) -> None:
        self._drop("remembered", (task, key))
