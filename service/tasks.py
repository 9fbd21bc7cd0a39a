"""A task in its store: where it is, how it changes, how its head is made again. Knows nothing of images or requests.

A task is changed by making its record anew and adapting to it again, which takes a millisecond: so a task is at all
times what its examples make of it, whatever way it came there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from models.errors import (
    FewshotError,
    Overloaded,
    StoreUnavailable,
    TaskNotFound,
    TaskStale,
    VersionConflict,
    VersionNotFound,
)
from models.head import Head
from models.report import Report
from service.batcher import Embedded
from service.callers import has_left, stays
from service.flights import Flights
from service.learning import Learning
from service.metrics import Metrics
from service.stores import Expected, Pointer, Record, Scope, SealBroken
from service.support import Rejected, like, record_id, task_name

log = logging.getLogger(__name__)

CHANGES = 16  # how often a change is tried again when others are faster
MOST_BEHIND = 64  # tasks that wait to be learned behind an answer; the head of any other is made when it is asked for
LULL_S = 0.05  # without another change, before a task is learned behind the answer: who adds image after image
MOST_LULLS = 20  # is not to have all that was learned so far in the way of the next; but it is learned by then
STALE_ADVICE = "Learned with another artifact; it is learned again when it is used, if its images were kept."


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """A task as it is after an adaptation, or as it was found."""

    task: str
    pointer: Pointer
    record: Record
    report: Report | None  # None: it is learned behind the answer
    rejects: bool  # whether its method can say "none of these"; False without a report
    created: bool = False  # whether the task name is new
    known: bool = False  # whether that very support set was there already, and nothing was done
    rejected: tuple[Rejected, ...] = ()
    timings_ms: dict[str, float] = field(default_factory=dict)


class Tasks:
    def __init__(self, learning: Learning, flights: Flights, metrics: Metrics):
        self._learning = learning
        self._flights = flights
        self._metrics = metrics
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        # By tenant and task, what was stored last and is to be learned; and who does that.
        self._to_learn: dict[tuple[str, str], tuple[Pointer, Record] | None] = {}  # None: not any more
        self._learning_behind: set[asyncio.Task[None]] = set()
        self._one_behind = asyncio.Semaphore(1)  # at a time, or whoever changes much would keep those who ask waiting

    async def at(self, scope: Scope, task: str) -> Pointer:
        """Where a task is now, without its record."""
        try:
            pointer = await scope.pointer(task_name(task))
        except SealBroken:
            raise _damaged(task) from None
        if pointer is None:
            raise TaskNotFound(f"There is no task {task!r}.")
        return pointer

    async def found(self, scope: Scope, task: str, *, version: int | None = None) -> tuple[Pointer, Record]:
        try:
            found = await scope.record(task_name(task), version=version)
        except SealBroken:
            raise _damaged(task) from None
        if found is None and version is not None:
            await self.at(scope, task)
            raise VersionNotFound(f"Version {version} of the task {task!r} is not kept.")
        if found is None:
            raise TaskNotFound(f"There is no task {task!r}.")
        return found

    async def versions(self, scope: Scope, task: str) -> list[Pointer]:
        """The versions that can be rolled back to, newest first."""
        try:
            found = await scope.versions(task_name(task))
        except SealBroken:
            raise _damaged(task) from None
        if not found:
            raise TaskNotFound(f"There is no task {task!r}.")
        return found

    async def change(
        self,
        scope: Scope,
        task: str,
        make: Callable[[Record], Awaitable[tuple[Record, tuple[Rejected, ...]]]],
        *,
        expect: Expected,
        embedded: Embedded | None = None,
        brief: bool,
    ) -> Adapted:
        """Makes of the record of a task another one and commits it; a task that is gone by then stays so.

        Again, when another was faster, unless `expect` forbids it. Changes of one task take turns, so that only those
        of other processes can be faster.
        """
        async with self._turns.setdefault((scope.tenant, task), asyncio.Lock()):
            for _ in range(CHANGES):
                pointer, before = await self.found(scope, task)
                if isinstance(expect, Pointer) and pointer != expect:
                    raise VersionConflict(f"The task is at version {pointer.version} now, and not what it was.")
                if isinstance(expect, int) and pointer.version != expect:
                    raise VersionConflict(f"The task is at version {pointer.version}, not {expect}.")
                made, rejected = await make(before)
                record = like(made, before)  # it ends when it was to end
                head_id = record_id(record)
                if head_id == pointer.head:
                    told = Adapted(task, pointer, record, None, False, known=True)
                    if not brief:
                        told = await self.told(task, pointer, record, known=True, admitted=embedded is not None)
                    return replace(told, rejected=rejected)
                try:
                    return await self.store(
                        scope, task, record, head_id, pointer, rejected=rejected, embedded=embedded, brief=brief
                    )
                except VersionConflict:
                    if expect is not None:
                        raise
        raise VersionConflict("The task kept moving while it was being changed; try again.")

    async def store(
        self,
        scope: Scope,
        task: str,
        record: Record,
        head_id: str,
        expect: Expected,
        *,
        rejected: tuple[Rejected, ...] = (),
        embedded: Embedded | None = None,
        brief: bool = False,
    ) -> Adapted:
        """Adapts to a record and commits both; `brief`: commits it, and adapts behind."""
        start = time.perf_counter()
        head, report = None, None
        if not brief:
            head, report = await self._learning.head_and_report(record, admitted=embedded is not None)
        adapted = time.perf_counter()
        try:
            pointer = await scope.commit(task, record, head_id, head, expect=expect)
        finally:  # what is still to be told was of before; also where nobody knows whether this was written
            self._flights.leave_alone(scope.tenant, task)
        self._overtaken(scope.tenant, task)
        timings = {
            **(embedded.stages() if embedded else {}),
            **({} if brief else {"adapt": (adapted - start) * 1e3}),
            "store": (time.perf_counter() - adapted) * 1e3,
        }
        good = len(embedded.items) - len(rejected) if embedded else 0
        self._metrics.observe("adapt", timings, good=good, bad=len(rejected))
        if brief:
            self._learn_behind(scope, task, pointer, record)
        created, rejects = pointer.version == 1, head is not None and head.gauge is not None
        return Adapted(task, pointer, record, report, rejects, created, rejected=rejected, timings_ms=timings)

    def _learn_behind(self, scope: Scope, task: str, pointer: Pointer, record: Record) -> None:
        """Has what was just stored learned in a moment, or when it is asked about: of changes in a row few are."""
        key = scope.tenant, task
        at_work = key in self._to_learn
        if not at_work and len(self._to_learn) >= MOST_BEHIND:
            return
        self._to_learn[key] = pointer, replace(record, images=())  # which would fill the memory, and nothing is made of
        if not at_work:
            task_of_ours = asyncio.create_task(self._learn_all(scope, task))
            self._learning_behind.add(task_of_ours)
            task_of_ours.add_done_callback(self._learning_behind.discard)

    async def forget(self, scope: Scope, task: str, *, expect: Expected) -> None:
        """When this returns, the task is gone for good. Raises TaskNotFound."""
        try:
            found = await scope.delete(task_name(task), expect=expect)
        finally:  # also where nobody knows whether it was deleted
            # What an earlier caller still waits to be told was undone with it: who asks again is not told the same.
            self._flights.leave_alone(scope.tenant, task)
        self._overtaken(scope.tenant, task)
        if not found:
            raise TaskNotFound(f"There is no task {task!r}.")

    def _overtaken(self, tenant: str, task: str) -> None:
        if (tenant, task) in self._to_learn:
            self._to_learn[tenant, task] = None

    async def _learn_all(self, scope: Scope, task: str) -> None:
        has_left.set(stays)  # who asked for the change may: it was made
        key, done = (scope.tenant, task), None
        try:
            while self._to_learn[key] is not done:
                done = await self._rests(key)
                if done is not None:
                    await self._learn_one(scope, task, *done)
        finally:
            del self._to_learn[key]  # nobody came between the last look and this

    async def _rests(self, key: tuple[str, str]) -> tuple[Pointer, Record] | None:
        """What is to be learned of a task, if anything, once it has not been changed for a moment."""
        found = self._to_learn[key]
        for _ in range(MOST_LULLS):
            await asyncio.sleep(LULL_S)
            before, found = found, self._to_learn[key]
            if found is before:
                break
        return found

    async def _learn_one(self, scope: Scope, task: str, pointer: Pointer, record: Record) -> None:
        """From its record, not from the store, which may be away by now: the task can be asked about all the same."""
        flight = scope.tenant, task, pointer.head
        try:
            async with self._one_behind:
                if scope.head_in_memory(pointer.head) is None and await self._is_at(scope, task, pointer):
                    await self._flights.once(flight, lambda: self._made(scope, task, pointer, record))
        except Overloaded:  # the service ends
            return
        except FewshotError as error:  # whoever asks about the task is told
            log.warning("Version %d of task %s is kept, but was not learned: %s", pointer.version, task, error)

    async def _is_at(self, scope: Scope, task: str, pointer: Pointer) -> bool:
        """Whether a task still is where it was, as far as can be told: another replica may have changed it."""
        if self._to_be_learned(scope, task, pointer) is None:
            return False
        try:
            at = await scope.pointer(task)
        except StoreUnavailable:
            return True
        except SealBroken:
            return False
        return at is not None and (at.version, at.head) == (pointer.version, pointer.head)

    async def _made(self, scope: Scope, task: str, pointer: Pointer, record: Record) -> tuple[Pointer, Head]:
        head = await self._learning.head(record)
        await scope.keep_head(task, pointer, head)
        return pointer, head

    async def told(
        self, task: str, pointer: Pointer, record: Record, *, known: bool = False, admitted: bool = False
    ) -> Adapted:
        """A task with its report, which is made again each time: it takes a millisecond and needs no place."""
        if self._learning.is_ours(record):
            head, report = await self._learning.head_and_report(record, admitted=admitted)
            return Adapted(task, pointer, record, report, head.gauge is not None, known=known)
        return Adapted(task, pointer, record, Report(None, None, "none", (), (), STALE_ADVICE), False, known=known)

    async def _rebuild(self, scope: Scope, task: str) -> tuple[Pointer, Head]:
        """Makes a head again from its record, and tells whose it is: the task may have moved meanwhile."""
        pointer, record = await self.found(scope, task)
        if not self._learning.is_ours(record):
            before, record = record, await self._learning.renewed(task, record)
            head = await self._learning.head(record)
            # Instead of the version that it was, or two artifacts that take turns would push out what came before; but
            # not of one whose method this artifact lacks.
            instead = record.method == before.method
            try:
                return await scope.commit(task, record, record_id(record), head, expect=pointer, instead=instead), head
            except VersionConflict:
                return await self._rebuild(scope, task)
        return await self._made(scope, task, pointer, record)

    def in_memory(self, scope: Scope, pointer: Pointer) -> Head | None:
        """The head at `pointer`, where it is at hand and of the artifact that is served."""
        head = scope.head_in_memory(pointer.head)
        if head is None or not self._learning.is_ours(head):
            return None
        self._metrics.head_found.inc()
        return head

    async def head(self, scope: Scope, task: str, pointer: Pointer) -> tuple[Pointer, Head]:
        """The head of a task from the store, or made again; and where the task is then."""
        fresh = self._to_be_learned(scope, task, pointer)
        try:
            head = await scope.head(pointer.head)
        except StoreUnavailable:
            if fresh is None:
                raise
            head = scope.head_in_memory(pointer.head)  # it may have been learned while the store was waited for
        if head is not None and self._learning.is_ours(head):
            self._metrics.head_found.inc()
            return pointer, head
        if fresh is not None:  # there was none yet
            return await self._flights.once(
                (scope.tenant, task, pointer.head), lambda: self._made(scope, task, pointer, fresh)
            )
        self._metrics.head_made_again.inc()
        return await self.made_again(scope, task, pointer)

    async def made_again(self, scope: Scope, task: str, pointer: Pointer) -> tuple[Pointer, Head]:
        """The same, from its record, whatever the store has; once for all who ask."""
        return await self._flights.once((scope.tenant, task, pointer.head), lambda: self._rebuild(scope, task))

    def _to_be_learned(self, scope: Scope, task: str, pointer: Pointer) -> Record | None:
        """The record of a task at `pointer` that was just stored, and will be learned behind that answer."""
        at, record = self._to_learn.get((scope.tenant, task)) or (None, None)
        return record if at is not None and (at.version, at.head) == (pointer.version, pointer.head) else None


def _damaged(task: str) -> TaskStale:
    return TaskStale(f"What was stored of the task {task!r} is damaged; send its examples again.")
