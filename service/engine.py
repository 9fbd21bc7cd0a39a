"""The use cases, without HTTP: adapt, change, classify, describe, forget. Knows nothing of requests, statuses or keys.

A task is changed by making its record anew and adapting to it again, which takes a millisecond: so a task is at all
times what its examples make of it, whatever way it came there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import numpy as np

from models.artifact import Artifact
from models.errors import (
    ExtractorFailed,
    FewshotError,
    InvalidRequest,
    Overloaded,
    StoreUnavailable,
    TaskNotFound,
    TaskStale,
    TooLarge,
    VersionConflict,
    VersionNotFound,
)
from models.head import Head
from models.report import Report
from service.answering import Answer, Predictions, answered
from service.batcher import Batcher, Embedded, Payload
from service.flights import Flights, both
from service.learning import Learning
from service.metrics import Metrics
from service.quota import spending
from service.stores import Expected, Pointer, Record, Scope, SealBroken
from service.support import (
    Example,
    Limits,
    OnBadImage,
    Rejected,
    Rows,
    checked,
    like,
    normal_label,
    record_id,
    rows_of,
    task_name,
    usable,
    without_class,
    without_example,
)
from service.support import head_id as head_id_of

CHANGES = 16  # how often a change is tried again when others are faster
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


class Engine:
    def __init__(
        self,
        artifact: Artifact,
        batcher: Batcher,
        *,
        limits: Limits | None = None,
        default_method: str = "",
        adapt_device: str = "cpu",
        metrics: Metrics | None = None,
    ):
        """Raises UnknownMethod when the default is no learner of the artifact."""
        self.artifact = artifact
        self.batcher = batcher
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self._learning = Learning(artifact, batcher, self.limits, default_method=default_method, device=adapt_device)
        self.default_method = self._learning.default_method
        self._flights = Flights()
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def adapt(
        self,
        scope: Scope,
        task: str | None,
        examples: Sequence[Example],
        *,
        unlabelled: Sequence[bytes] = (),
        method: str = "",
        ttl_s: float | None = None,
        retain: bool = False,
        expect: Expected = None,
        on_bad_image: OnBadImage = "skip",
    ) -> Adapted:
        """Learns a task and stores it; without a name it is named after its head.

        When this returns, the record is on disk. `expect`: see Scope.commit. `retain`: the images are kept as well. A
        support set that is there already costs nothing. Raises the errors of models/errors.py.
        """
        method = method or self.default_method
        self._learning.learner(method)
        examples = checked(examples, unlabelled, self.limits)
        head_id = head_id_of(self.artifact.digest, method, examples, unlabelled)
        name = task_name(task) if task is not None else "t_" + head_id[3:27]

        async def known(head_id: str) -> Adapted | None:
            """The task, when it already is at this head, and to stay as it was asked to."""
            if expect is not None or ttl_s is not None:
                return None  # a condition was named, or an end: let the store decide
            try:
                pointer = await scope.pointer(name)
                if pointer is None or pointer.head != head_id or pointer.stale:
                    return None
                found = await scope.record(name)
            except SealBroken:
                return None  # damaged: learn it again, which repairs it
            if found is None or found[0].head != head_id or found[1].expires is not None:
                return None
            if retain != bool(found[1].images):
                return None
            return await self._told(name, found[0], found[1], known=True)

        async def work() -> Adapted:
            embedded = await self.batcher.embed([*(example.payload for example in examples), *unlabelled])
            rows, rejected = usable(examples, unlabelled, embedded.items, on_bad_image=on_bad_image, retain=retain)
            record = self._learning.record(rows, method)
            if ttl_s is not None:
                record = replace(record, expires=record.created + ttl_s)
            # With images left out, the rest may be there already.
            there = await known(record_id(record)) if rejected else None
            if there:
                return replace(there, rejected=rejected)
            return await self._store(
                scope, name, record, record_id(record), expect, rejected=rejected, embedded=embedded
            )

        there = await known(head_id)
        if there:
            return there
        # What is left out is told by its place, so another order is another request.
        order = hash((*((example.label, example.payload) for example in examples), *unlabelled))
        flight = (scope.tenant, name, head_id, str(order), str(expect), str(ttl_s), str(retain), on_bad_image)
        with spending(len(examples) + len(unlabelled), Overloaded):
            return await self._flights.once(flight, work)

    async def add(
        self,
        scope: Scope,
        task: str,
        examples: Sequence[Example],
        *,
        unlabelled: Sequence[bytes] = (),
        expect: Expected = None,
        on_bad_image: OnBadImage = "skip",
        brief: bool = False,
    ) -> Adapted:
        """Adds examples, perhaps of new classes. The task is then what it would be had all been sent at once.

        `brief`, here and below: the change is on disk when this returns, but there is no report, for the task is
        learned behind the answer. Questions that come before that wait for it.
        """
        examples = checked(examples, unlabelled, self.limits, whole=False)
        await self._at(scope, task)  # an unknown task costs no work
        embedded = await self._embed([*(example.payload for example in examples), *unlabelled])
        errors = [item for item in embedded.items if isinstance(item, FewshotError)]
        if len(errors) == len(embedded.items):
            raise errors[0]

        def change(rows: Rows, retain: bool) -> tuple[Rows, tuple[Rejected, ...]]:
            return usable(examples, unlabelled, embedded.items, on_bad_image=on_bad_image, retain=retain, have=rows)

        return await self._change_rows(scope, task, change, expect=expect, embedded=embedded, brief=brief)

    async def remove_example(
        self, scope: Scope, task: str, example: str, *, expect: Expected = None, brief: bool = False
    ) -> Adapted:
        """Takes an example back: the task is then equal to one that never saw it."""

        def change(rows: Rows, _: bool) -> tuple[Rows, tuple[Rejected, ...]]:
            return without_example(rows, example), ()

        return await self._change_rows(scope, task, change, expect=expect, brief=brief)

    async def remove_class(
        self, scope: Scope, task: str, label: str, *, expect: Expected = None, brief: bool = False
    ) -> Adapted:
        label = normal_label(label, index=None, limits=self.limits)

        def change(rows: Rows, _: bool) -> tuple[Rows, tuple[Rejected, ...]]:
            return without_class(rows, label), ()

        return await self._change_rows(scope, task, change, expect=expect, brief=brief)

    async def learn_with(
        self, scope: Scope, task: str, method: str, *, expect: Expected = None, brief: bool = False
    ) -> Adapted:
        """Learns the task's examples with another method; no image is sent or read again."""
        self._learning.learner(method)

        async def made(before: Record) -> tuple[Record, tuple[Rejected, ...]]:
            renewed = before if self._learning.is_ours(before) else await self._learning.renewed(task, before)
            return replace(renewed, method=method), ()

        return await self._change(scope, task, made, expect=expect, brief=brief)

    async def rollback(
        self, scope: Scope, task: str, version: int, *, expect: Expected = None, brief: bool = False
    ) -> Adapted:
        """Makes an earlier version the newest. Raises VersionNotFound when it is not kept any more."""

        async def earlier(before: Record) -> tuple[Record, tuple[Rejected, ...]]:
            _, record = await self._found(scope, task, version=version)
            if not self._learning.is_ours(record):
                record = await self._learning.renewed(task, record)
            return record, ()

        return await self._change(scope, task, earlier, expect=expect, brief=brief)

    async def classify(
        self,
        scope: Scope,
        task: str,
        payloads: Sequence[Payload],
        *,
        explain: bool = False,
        on_bad_image: OnBadImage = "skip",
    ) -> Predictions:
        """Classifies encoded images with a task. The task is looked up first: an unknown one costs nothing.

        A head that is not in memory is fetched, or made again, while the images are looked at.
        """
        self._check_queries(payloads)
        pointer = await self._at(scope, task)
        head = scope.head_in_memory(pointer.head)
        if head is not None and head.artifact == self.artifact.digest:
            self.metrics.head_found.inc()
        elif explain:
            pointer, head = await self._head(scope, task, pointer)
        else:
            with spending(len(payloads), Overloaded, StoreUnavailable, TaskNotFound, TaskStale):
                embedded, found = await both(self.batcher.embed(payloads), self._head(scope, task, pointer))
            pointer, head = found
            rows, timings = self._rows(head, embedded, on_bad_image, None)
            return Predictions(task, pointer, head, pointer.head, rows, timings)
        record = None
        if explain:
            at, record = await self._found(scope, task, version=pointer.version)
            if at.head != pointer.head:  # the task was deleted and made anew since
                return await self.classify(scope, task, payloads, explain=True, on_bad_image=on_bad_image)
        embedded = await self._embed(payloads)
        rows, timings = self._rows(head, embedded, on_bad_image, record)
        return Predictions(task, pointer, head, pointer.head, rows, timings)

    async def _head(self, scope: Scope, task: str, pointer: Pointer) -> tuple[Pointer, Head]:
        """The head of a task from the store, or made again; and where the task is then."""
        head = await scope.head(pointer.head)
        if head is not None and head.artifact == self.artifact.digest:
            self.metrics.head_found.inc()
            return pointer, head
        self.metrics.head_made_again.inc()
        return await self._flights.once((scope.tenant, task, pointer.head), lambda: self._rebuild(scope, task))

    async def classify_once(
        self,
        examples: Sequence[Example],
        payloads: Sequence[Payload],
        *,
        unlabelled: Sequence[bytes] = (),
        method: str = "",
        explain: bool = False,
        on_bad_image: OnBadImage = "skip",
    ) -> tuple[Predictions, tuple[Rejected, ...]]:
        """Support and questions in one call; nothing is stored."""
        method = method or self.default_method
        self._learning.learner(method)
        examples = checked(examples, unlabelled, self.limits)
        self._check_queries(payloads)
        embedded = await self._embed([*(example.payload for example in examples), *unlabelled, *payloads])
        split = len(examples) + len(unlabelled)
        support = _part(embedded, 0, split)
        given, rejected = usable(examples, unlabelled, support.items, on_bad_image=on_bad_image)
        record = self._learning.record(given, method)
        head = await self._learning.head(record)
        questions = _part(embedded, split, len(embedded.items))
        rows, timings = self._rows(head, questions, on_bad_image, record if explain else None)
        return Predictions(None, None, head, record_id(record), rows, timings), rejected

    async def embed(self, payloads: Sequence[Payload], *, on_bad_image: OnBadImage = "skip") -> Embedded:
        """Features of images, for other systems; when none is good, the first error is raised."""
        self._check_queries(payloads)
        embedded = await self._embed(payloads)
        errors = [item for item in embedded.items if isinstance(item, FewshotError)]
        good = len(embedded.items) - len(errors)
        self._observe("embed", _stages(embedded), good=good, bad=len(errors))
        if errors and (not good or on_bad_image == "fail" or isinstance(errors[0], ExtractorFailed)):
            raise errors[0]
        return embedded

    async def describe(self, scope: Scope, task: str, *, version: int | None = None) -> Adapted:
        """A task as it is, learned again for this artifact where that can be, or as it was at a version."""
        pointer, record = await self._found(scope, task, version=version)
        if version is None and record.images and not self._learning.is_ours(record):
            with suppress(TaskStale):  # it cannot be: then it is told as it was
                await self._flights.once((scope.tenant, task, pointer.head), lambda: self._rebuild(scope, task))
            pointer, record = await self._found(scope, task)
        return await self._told(task, pointer, record)

    async def head(self, scope: Scope, task: str) -> tuple[Pointer, Head]:
        """The head that a task is classified with now."""
        pointer, record = await self._found(scope, task)
        head = await scope.head(pointer.head)
        if head is not None and record.artifact == head.artifact == self.artifact.digest:
            return pointer, head
        return await self._flights.once((scope.tenant, task, pointer.head), lambda: self._rebuild(scope, task))

    async def record(self, scope: Scope, task: str) -> tuple[Pointer, Record]:
        return await self._found(scope, task)

    async def versions(self, scope: Scope, task: str) -> list[Pointer]:
        """The versions that can be rolled back to, newest first."""
        try:
            found = await scope.versions(task_name(task))
        except SealBroken:
            raise _damaged(task) from None
        if not found:
            raise TaskNotFound(f"There is no task {task!r}.")
        return found

    async def tasks(self, scope: Scope, *, limit: int, after: str) -> list[tuple[str, Pointer]]:
        return await scope.tasks(limit=limit, after=after)

    async def forget(self, scope: Scope, task: str) -> None:
        """When this returns, the task is gone for good. Raises TaskNotFound."""
        if not await scope.delete(task_name(task)):
            raise TaskNotFound(f"There is no task {task!r}.")

    async def _embed(self, payloads: Sequence[Payload]) -> Embedded:
        """Features of images, which count for the caller's quota unless there was no room for them."""
        with spending(len(payloads), Overloaded):
            return await self.batcher.embed(payloads)

    async def _at(self, scope: Scope, task: str) -> Pointer:
        """Where a task is now, without its record."""
        try:
            pointer = await scope.pointer(task_name(task))
        except SealBroken:
            raise _damaged(task) from None
        if pointer is None:
            raise TaskNotFound(f"There is no task {task!r}.")
        return pointer

    async def _found(self, scope: Scope, task: str, *, version: int | None = None) -> tuple[Pointer, Record]:
        try:
            found = await scope.record(task_name(task), version=version)
        except SealBroken:
            raise _damaged(task) from None
        if found is None and version is not None and await scope.pointer(task) is not None:
            raise VersionNotFound(f"Version {version} of the task {task!r} is not kept.")
        if found is None:
            raise TaskNotFound(f"There is no task {task!r}.")
        return found

    async def _change_rows(
        self,
        scope: Scope,
        task: str,
        change: Callable[[Rows, bool], tuple[Rows, tuple[Rejected, ...]]],
        *,
        expect: Expected,
        embedded: Embedded | None = None,
        brief: bool,
    ) -> Adapted:
        """Applies a change to the examples of a task."""

        async def made(before: Record) -> tuple[Record, tuple[Rejected, ...]]:
            renewed = before if self._learning.is_ours(before) else await self._learning.renewed(task, before)
            rows, rejected = change(rows_of(renewed), bool(renewed.images))
            return self._learning.record(rows, renewed.method), rejected

        return await self._change(scope, task, made, expect=expect, embedded=embedded, brief=brief)

    async def _change(
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
                pointer, before = await self._found(scope, task)
                if isinstance(expect, Pointer) and pointer != expect:
                    raise VersionConflict(f"The task is at version {pointer.version} now, and not what it was.")
                if isinstance(expect, int) and pointer.version != expect:
                    raise VersionConflict(f"The task is at version {pointer.version}, not {expect}.")
                made, rejected = await make(before)
                record = like(made, before)  # it ends when it was to end
                head_id = record_id(record)
                if head_id == pointer.head:
                    told = Adapted(task, pointer, record, None, False, known=True)
                    told = told if brief else await self._told(task, pointer, record, known=True)
                    return replace(told, rejected=rejected)
                try:
                    return await self._store(
                        scope, task, record, head_id, pointer, rejected=rejected, embedded=embedded, brief=brief
                    )
                except VersionConflict:
                    if expect is not None:
                        raise
        raise VersionConflict("The task kept moving while it was being changed; try again.")

    async def _store(
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
        head, report = (None, None) if brief else await self._learning.head_and_report(record)
        adapted = time.perf_counter()
        pointer = await scope.commit(task, record, head_id, head, expect=expect)
        timings = {
            **(_stages(embedded) if embedded else {}),
            **({} if brief else {"adapt": (adapted - start) * 1e3}),
            "store": (time.perf_counter() - adapted) * 1e3,
        }
        self._observe("adapt", timings, good=len(embedded.items) - len(rejected) if embedded else 0, bad=len(rejected))
        if brief:
            self._flights.once((scope.tenant, task), lambda: self._learn_behind(scope, task))
        created, rejects = pointer.version == 1, head is not None and head.gauge is not None
        return Adapted(task, pointer, record, report, rejects, created, rejected=rejected, timings_ms=timings)

    async def _learn_behind(self, scope: Scope, task: str) -> None:
        """Until the task does not move meanwhile: of many changes in a row only a few are learned."""
        pointer = None
        while (at := await scope.pointer(task)) is not None and at != pointer:
            pointer = at
            await self._flights.once((scope.tenant, task, at.head), lambda: self._rebuild(scope, task))

    async def _told(self, task: str, pointer: Pointer, record: Record, *, known: bool = False) -> Adapted:
        """A task with its report, which is made again each time: it takes a millisecond and needs no place."""
        if self._learning.is_ours(record):
            head, report = await self._learning.head_and_report(record)
            return Adapted(task, pointer, record, report, head.gauge is not None, known=known)
        return Adapted(task, pointer, record, Report(None, None, "none", (), (), STALE_ADVICE), False, known=known)

    async def _rebuild(self, scope: Scope, task: str) -> tuple[Pointer, Head]:
        """Makes a head again from its record, and tells whose it is: the task may have moved meanwhile."""
        pointer, record = await self._found(scope, task)
        if not self._learning.is_ours(record):
            record = await self._learning.renewed(task, record)
            head = await self._learning.head(record)
            try:
                return await scope.commit(task, record, record_id(record), head, expect=pointer), head
            except VersionConflict:
                return await self._rebuild(scope, task)
        head = await self._learning.head(record)
        await scope.keep_head(task, pointer, head)
        return pointer, head

    def _check_queries(self, payloads: Sequence[Payload]) -> None:
        kind, most = self.artifact.kind, self.limits.max_queries
        if not payloads:
            raise InvalidRequest(f"There is no {kind} to classify.")
        if len(payloads) > most:
            raise TooLarge(f"There are {len(payloads)} {kind}s; the limit is {most} (MAX_QUERIES).")

    def _rows(
        self, head: Head, embedded: Embedded, on_bad_image: OnBadImage, explain: Record | None
    ) -> tuple[list[Answer | FewshotError], dict[str, float]]:
        """The answer for each image, or its error; when none is good, the first error is raised."""
        start = time.perf_counter()
        good = [item for item in embedded.items if isinstance(item, np.ndarray)]
        errors = [item for item in embedded.items if isinstance(item, FewshotError)]
        self._observe("classify", _stages(embedded), good=len(good), bad=len(errors))
        if errors and (not good or on_bad_image == "fail" or isinstance(errors[0], ExtractorFailed)):
            raise errors[0]
        rejection = self.artifact.manifest.rejections.get(head.method)
        answers = iter(answered(np.array(good), head, rejection, explain))
        rows = [item if isinstance(item, FewshotError) else next(answers) for item in embedded.items]
        return rows, {**_stages(embedded), "head": (time.perf_counter() - start) * 1e3}

    def _observe(self, op: str, timings_ms: dict[str, float], *, good: int, bad: int) -> None:
        for stage, value in timings_ms.items():
            self.metrics.observe_stage(op, stage, value / 1e3)
        self.metrics.observe_images(op, good=good, bad=bad)


def _damaged(task: str) -> TaskStale:
    return TaskStale(f"What was stored of the task {task!r} is damaged; send its examples again.")


def _stages(embedded: Embedded) -> dict[str, float]:
    return {"queue": embedded.queued_s * 1e3, "decode": embedded.decode_s * 1e3, "embed": embedded.embed_s * 1e3}


def _part(embedded: Embedded, start: int, stop: int) -> Embedded:
    items = embedded.items[start:stop]
    for index, item in enumerate(items):
        if isinstance(item, FewshotError):
            item.index = index
    return Embedded(items, embedded.queued_s, embedded.decode_s, embedded.embed_s)
