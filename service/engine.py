"""The use cases, without HTTP: adapt, classify, describe, list, forget. Knows nothing of requests, statuses or keys."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from models.artifact import Artifact
from models.errors import (
    ExtractorFailed,
    FewshotError,
    InvalidRequest,
    TaskNotFound,
    TaskStale,
    TooLarge,
    UnknownMethod,
)
from models.head import Head
from models.learners import Learner
from service.batcher import Batcher, Embedded
from service.metrics import Metrics
from service.stores import Pointer, Record, Scope, SealBroken
from service.support import (
    Example,
    Limits,
    OnBadImage,
    Rejected,
    checked,
    head_of,
    record_id,
    record_of,
    task_name,
)
from service.support import head_id as head_id_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Adapted:
    """A task as it is after an adaptation, or as it was found."""

    task: str
    pointer: Pointer
    record: Record
    created: bool = False  # whether the task name is new
    known: bool = False  # whether that very support set was there already, and nothing was done
    rejected: tuple[Rejected, ...] = ()
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    task: str | None
    pointer: Pointer | None
    head: Head
    head_id: str
    rows: list[np.ndarray | FewshotError]  # probabilities [way] of each image, or its error
    timings_ms: dict[str, float]


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
        self.learners = artifact.learners(adapt_device)
        self.default_method = default_method or artifact.manifest.default
        self._device = adapt_device
        self._learner(self.default_method)
        self._flights: dict[tuple[str, ...], asyncio.Task[Any]] = {}

    async def adapt(
        self,
        scope: Scope,
        task: str | None,
        examples: Sequence[Example],
        *,
        unlabelled: Sequence[bytes] = (),
        method: str = "",
        ttl_s: float | None = None,
        expect: int | None = None,
        on_bad_image: OnBadImage = "skip",
    ) -> Adapted:
        """Learns a task and stores it; without a name it is named after its head.

        When this returns, the record is on disk. `expect`: see Scope.commit. A support set that is there already
        costs nothing. Raises the errors of models/errors.py.
        """
        method = method or self.default_method
        learner = self._learner(method)
        examples = checked(examples, unlabelled, self.limits)
        head_id = head_id_of(self.artifact.digest, method, examples, unlabelled)
        name = task_name(task) if task is not None else "t_" + head_id[3:27]

        known = await self._known(scope, name, head_id, expect, ttl_s)
        if known:
            return known

        async def work() -> Adapted:
            return await self._adapt(scope, name, examples, unlabelled, method, learner, ttl_s, expect, on_bad_image)

        flight = (scope.tenant, name, head_id, str(expect), str(ttl_s), on_bad_image)
        return await self._once(flight, work)

    async def _known(
        self, scope: Scope, name: str, head_id: str, expect: int | None, ttl_s: float | None
    ) -> Adapted | None:
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
        return Adapted(name, found[0], found[1], known=True)

    async def _adapt(
        self,
        scope: Scope,
        name: str,
        examples: Sequence[Example],
        unlabelled: Sequence[bytes],
        method: str,
        learner: Learner,
        ttl_s: float | None,
        expect: int | None,
        on_bad_image: OnBadImage,
    ) -> Adapted:
        embedded = await self.batcher.embed([*(example.payload for example in examples), *unlabelled])
        record, rejected = self._record(examples, unlabelled, embedded, method, on_bad_image)
        if ttl_s is not None:
            record = _expiring(record, ttl_s)
        start = time.perf_counter()
        head = await self.batcher.run(lambda: self._head(record, learner))
        adapt_s = time.perf_counter() - start
        head_id = record_id(record)
        if rejected:  # the same support set may have been sent with another bad image
            known = await self._known(scope, name, head_id, expect, ttl_s)
            if known:
                return Adapted(name, known.pointer, known.record, known=True, rejected=rejected)
        start = time.perf_counter()
        pointer = await scope.commit(name, record, head_id, head, expect=expect)
        timings = {**_stages(embedded), "adapt": adapt_s * 1e3, "store": (time.perf_counter() - start) * 1e3}
        self._observe("adapt", timings, good=len(record.ids), bad=len(rejected))
        return Adapted(name, pointer, record, created=pointer.version == 1, rejected=rejected, timings_ms=timings)

    async def classify(
        self, scope: Scope, task: str, payloads: Sequence[bytes], *, on_bad_image: OnBadImage = "skip"
    ) -> Predictions:
        """Classifies encoded images with a task. The head is looked up first: an unknown task costs nothing."""
        self._check_queries(payloads)
        try:
            pointer = await scope.pointer(task_name(task))
        except SealBroken:
            raise _damaged(task) from None
        if pointer is None:
            raise TaskNotFound(f"There is no task {task!r}.")
        cached = await scope.head(pointer.head)
        self.metrics.heads.labels("found" if cached else "made_again").inc()
        if cached is None:
            flight = (scope.tenant, task, pointer.head)
            at, head = await self._once(flight, lambda: self._rebuild(scope, task))
        else:
            at, head = pointer, cached
        if head.artifact != self.artifact.digest:
            raise _stale(task)
        embedded = await self.batcher.embed(payloads)
        rows, timings = self._rows(head, embedded, on_bad_image)
        return Predictions(task, at, head, at.head, rows, timings)

    async def classify_once(
        self,
        examples: Sequence[Example],
        payloads: Sequence[bytes],
        *,
        unlabelled: Sequence[bytes] = (),
        method: str = "",
        on_bad_image: OnBadImage = "skip",
    ) -> tuple[Predictions, tuple[Rejected, ...]]:
        """Support and questions in one call; nothing is stored."""
        method = method or self.default_method
        learner = self._learner(method)
        examples = checked(examples, unlabelled, self.limits)
        self._check_queries(payloads)
        embedded = await self.batcher.embed([*(example.payload for example in examples), *unlabelled, *payloads])
        split = len(examples) + len(unlabelled)
        record, rejected = self._record(examples, unlabelled, _part(embedded, 0, split), method, on_bad_image)
        head = await self.batcher.run(lambda: self._head(record, learner))
        rows, timings = self._rows(head, _part(embedded, split, len(embedded.items)), on_bad_image)
        return Predictions(None, None, head, record_id(record), rows, timings), rejected

    async def describe(self, scope: Scope, task: str) -> Adapted:
        found = await self._found(scope, task)
        return Adapted(task, found[0], found[1])

    async def tasks(self, scope: Scope, *, limit: int, after: str) -> list[tuple[str, Pointer]]:
        return await scope.tasks(limit=limit, after=after)

    async def forget(self, scope: Scope, task: str) -> None:
        """When this returns, the task is gone for good. Raises TaskNotFound."""
        if not await scope.delete(task_name(task)):
            raise TaskNotFound(f"There is no task {task!r}.")

    async def _found(self, scope: Scope, task: str) -> tuple[Pointer, Record]:
        try:
            found = await scope.record(task_name(task))
        except SealBroken:
            raise _damaged(task) from None
        if found is None:
            raise TaskNotFound(f"There is no task {task!r}.")
        return found

    async def _rebuild(self, scope: Scope, task: str) -> tuple[Pointer, Head]:
        """Makes an evicted head again from its record, and tells whose it is: the task may have moved meanwhile."""
        pointer, record = await self._found(scope, task)
        if record.artifact != self.artifact.digest:
            raise _stale(task)
        learner = self._learner(record.method)
        head = await self.batcher.run(lambda: self._head(record, learner))
        await scope.keep_head(pointer.head, head)
        return pointer, head

    async def _once(self, key: tuple[str, ...], work: Callable[[], Awaitable[T]]) -> T:
        """Twins share one piece of work, and a caller who leaves does not end it for the others."""
        flight = self._flights.get(key)
        if flight is None:

            async def fly() -> T:
                return await work()

            flight = self._flights[key] = asyncio.create_task(fly())

            def landed(done: asyncio.Task[Any]) -> None:
                self._flights.pop(key, None)
                if not done.cancelled():
                    done.exception()  # seen, even if every caller has left

            flight.add_done_callback(landed)
        result: T = await asyncio.shield(flight)
        return result

    # Support sets and heads.

    def _learner(self, method: str) -> Learner:
        try:
            return self.learners[method]
        except KeyError:
            known = ", ".join(self.learners)
            raise UnknownMethod(f"There is no method {method[:64]!r}; this artifact has {known}.") from None

    def _check_queries(self, payloads: Sequence[bytes]) -> None:
        if not payloads:
            raise InvalidRequest("There is no image to classify.")
        if len(payloads) > self.limits.max_queries:
            raise TooLarge(f"There are {len(payloads)} images; the limit is {self.limits.max_queries} (MAX_QUERIES).")

    def _record(
        self,
        examples: Sequence[Example],
        unlabelled: Sequence[bytes],
        embedded: Embedded,
        method: str,
        on_bad_image: OnBadImage,
    ) -> tuple[Record, tuple[Rejected, ...]]:
        return record_of(
            examples,
            unlabelled,
            embedded.items,
            artifact=self.artifact.digest,
            method=method,
            dim=self.artifact.manifest.dim,
            on_bad_image=on_bad_image,
        )

    def _head(self, record: Record, learner: Learner) -> Head:
        """Adapts; runs on a lane."""
        return head_of(record, learner, self.artifact.manifest.methods[record.method], device=self._device)

    def _rows(
        self, head: Head, embedded: Embedded, on_bad_image: OnBadImage
    ) -> tuple[list[np.ndarray | FewshotError], dict[str, float]]:
        """Probabilities of each image, or its error; when none is good, the first error is raised."""
        start = time.perf_counter()
        good = [item for item in embedded.items if isinstance(item, np.ndarray)]
        errors = [item for item in embedded.items if isinstance(item, FewshotError)]
        self._observe("classify", _stages(embedded), good=len(good), bad=len(errors))
        if errors and (not good or on_bad_image == "fail" or isinstance(errors[0], ExtractorFailed)):
            raise errors[0]
        probabilities = iter(head.probabilities(np.stack(good)))
        rows = [item if isinstance(item, FewshotError) else next(probabilities) for item in embedded.items]
        return rows, {**_stages(embedded), "head": (time.perf_counter() - start) * 1e3}

    def _observe(self, op: str, timings_ms: dict[str, float], *, good: int, bad: int) -> None:
        for stage, value in timings_ms.items():
            self.metrics.observe_stage(op, stage, value / 1e3)
        if good:
            self.metrics.images.labels(op, "used").inc(good)
        if bad:
            self.metrics.images.labels(op, "rejected").inc(bad)


def _damaged(task: str) -> TaskStale:
    return TaskStale(f"What was stored of the task {task!r} is damaged; send its examples again.")


def _stale(task: str) -> TaskStale:
    return TaskStale(f"The task {task!r} was learned with another artifact; send its examples again.")


def _stages(embedded: Embedded) -> dict[str, float]:
    return {"queue": embedded.queued_s * 1e3, "decode": embedded.decode_s * 1e3, "embed": embedded.embed_s * 1e3}


def _part(embedded: Embedded, start: int, stop: int) -> Embedded:
    items = embedded.items[start:stop]
    for index, item in enumerate(items):
        if isinstance(item, FewshotError):
            item.index = index
    return Embedded(items, embedded.queued_s, embedded.decode_s, embedded.embed_s)


def _expiring(record: Record, ttl_s: float) -> Record:
    return dataclasses.replace(record, expires=record.created + ttl_s)
