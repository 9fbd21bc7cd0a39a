"""What a store keeps and promises.

A **record** is the user's data: support features, labels and settings, from which a head can be made again. A **head**
is a cache of it. A **pointer** says at which version and head a task is. Stores see a tenant only through a `Scope`, so
none of their functions can take a task name without one. Knows nothing of HTTP, learners or extractors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from models.errors import StoreUnavailable
from models.head import Head
from service.stores.record import Record as Record
from service.stores.seal import SealBroken as SealBroken
from service.stores.seal import Sealer as Sealer

MOST_REMEMBERED = 1000  # values beside one task
MOST_REMEMBERED_BYTES = 2**20  # of them all, sealed
# What ends within it may be the claim of the very request that makes a task: that stays, where all else that is
# remembered beside the name is of an earlier one. Twice as long as a claim (web/idempotency.py), for clocks differ.
CLAIM_S = 120


class StoreMisconfigured(StoreUnavailable):
    """The store as it is set up cannot keep what it promises: a start is refused, a request answered 503."""


class Told(NamedTuple):
    """What a version of a task is, in short."""

    written: float  # seconds since the epoch
    method: str
    classes: int
    examples: int  # with a label


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where a task is: its version, counted from 1, and the id of its head."""

    version: int
    head: str
    stale: bool = False  # remembered from before the store went away; never written
    told: Told | None = field(default=None, compare=False)  # in a list of versions, of those that this program wrote

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


class Scope(Protocol):
    """One tenant's view of a store. Every function raises StoreUnavailable when the store does not answer.

    One that only reads may raise CallerLeft.
    """

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

    async def commit(
        self, task: str, record: Record, head_id: str, head: Head | None, *, expect: Expected, instead: bool = False
    ) -> Pointer:
        """Writes a record, with its head where there is one yet, and moves the pointer to the next version.

        All or nothing, durably.

        `expect` is where the task must be: a version (0: it must not exist; None: any), or a version and its head,
        which tells it from a task of the same name that was deleted and made anew. Raises VersionConflict. Earlier
        records are kept, as many as the store was made for, and end when this one does; heads of those that are not
        go with them. `instead`: the newest of them is not, for this one says the same.

        Where there was no task, what is remembered beside the name was asked of an earlier one, and is forgotten; but
        for what ends within two minutes: that may be the claim of who makes the task.
        """
        ...

    async def delete(self, task: str, *, expect: Expected = None) -> bool:
        """Forgets a task, all its versions and what is remembered beside it, durably; False when there is none.

        `expect` is where the task must be, as for a commit. Raises VersionConflict.
        """
        ...

    async def remember(self, task: str, key: str, value: bytes, *, ttl_s: float, new: bool = False) -> bool:
        """Keeps a small value beside a task for `ttl_s` seconds, durably; says whether it was written.

        With `new` only when there is none under that key; of several who try at once, one succeeds. The task need not
        exist. Of more than MOST_REMEMBERED values beside one task, or more than MOST_REMEMBERED_BYTES of them, those
        written first are forgotten; one that is larger by itself is not written, and what was there stays.
        """
        ...

    async def recall(self, task: str, key: str) -> bytes | None:
        """What is remembered under that key; None when there is none, or it is damaged."""
        ...

    async def forget_remembered(self, task: str, key: str) -> None:
        """Forgets one remembered value, durably, if there is one."""
        ...

    async def full(self, most: int) -> bool:
        """Whether there are so many tasks, or more. Damaged ones count; ones that ended do not for long."""
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
