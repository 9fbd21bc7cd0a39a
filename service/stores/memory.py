"""A store in a dict, for tests and for users' tests: what it keeps ends with the process.

It seals its values like the others, so what passes over it passes over them. Knows nothing of files or networks.
"""

from __future__ import annotations

import time

from models.head import Head
from service.stores import Pointer, Record, SealBroken, Sealer
from service.stores.sealed import Sealed, next_version


class MemoryStore:
    name = "memory"

    def __init__(self, *, key: bytes = b"memory", head_ttl_s: float = 7 * 24 * 3600):
        self.sealer = Sealer(key)
        self.head_ttl_s = head_ttl_s
        # (tenant, kind, name) -> sealed bytes and when they expire; the name of a record is (task, version)
        self.values: dict[tuple[str, str, str | tuple[str, int]], tuple[bytes, float | None]] = {}

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
        self._sealed = Sealed(store.sealer, tenant)

    def _get(self, kind: str, name: str | tuple[str, int]) -> bytes | None:
        data, expires = self._store.values.get((self.tenant, kind, name), (None, None))
        return None if expires is not None and expires <= time.time() else data

    def _names(self, kind: str) -> list[str | tuple[str, int]]:
        return [name for tenant, other, name in self._store.values if (tenant, other) == (self.tenant, kind)]

    def _versions(self, task: str) -> list[int]:
        # Found by name, not through the pointer, so that a damaged pointer loses neither count nor record.
        return [name[1] for name in self._names("record") if isinstance(name, tuple) and name[0] == task]

    def _pointer(self, task: str) -> Pointer | None:
        data = self._get("pointer", task)
        return None if data is None else self._sealed.open_pointer(task, data)

    async def pointer(self, task: str) -> Pointer | None:
        return self._pointer(task)

    async def record(self, task: str) -> tuple[Pointer, Record] | None:
        pointer = self._pointer(task)
        if pointer is None:
            return None
        data = self._get("record", (task, pointer.version))
        if data is None:
            raise SealBroken("The task has no record.")
        return pointer, self._sealed.open_record(task, pointer.version, data=data)

    async def head(self, head_id: str) -> Head | None:
        return self._sealed.open_head(head_id, self._get("head", head_id))

    async def keep_head(self, head_id: str, head: Head) -> None:
        sealed = self._sealed.seal_head(head_id, head)
        self._store.values[self.tenant, "head", head_id] = sealed, time.time() + self._store.head_ttl_s

    async def commit(self, task: str, record: Record, head_id: str, head: Head, *, expect: int | None) -> Pointer:
        old = self._versions(task)
        exists = self._get("pointer", task) is not None
        version = next_version(max(old, default=0) if exists else 0, expect)
        for gone in old:
            del self._store.values[self.tenant, "record", (task, gone)]
        pointer = Pointer(version, head_id)
        sealed = self._sealed.seal_record(task, version, record=record)
        self._store.values[self.tenant, "record", (task, version)] = sealed, record.expires
        self._store.values[self.tenant, "pointer", task] = self._sealed.seal_pointer(task, pointer), record.expires
        await self.keep_head(head_id, head)
        return pointer

    async def delete(self, task: str) -> bool:
        found = self._get("pointer", task) is not None
        try:
            pointer = self._pointer(task)
        except SealBroken:
            pointer = None  # which head it was is lost; that ends by itself
        if pointer is not None:
            self._store.values.pop((self.tenant, "head", pointer.head), None)
        for version in self._versions(task):
            del self._store.values[self.tenant, "record", (task, version)]
        self._store.values.pop((self.tenant, "pointer", task), None)
        return found

    async def tasks(self, *, limit: int, after: str = "") -> list[tuple[str, Pointer]]:
        found: list[tuple[str, Pointer]] = []
        for task in sorted(name for name in self._names("pointer") if isinstance(name, str) and name > after):
            data = self._get("pointer", task)
            pointer = None if data is None else self._sealed.list_pointer(task, data)
            if pointer is not None:
                found.append((task, pointer))
        return found[:limit]
