"""The use cases, without HTTP: adapt, change, classify, describe, forget. Knows nothing of requests or keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace

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
    VersionNotFound,
)
from models.head import Head
from service.answering import Answer, Predictions, answered
from service.batcher import Batcher, Embedded
from service.flights import Flights, both
from service.learning import Learning
from service.metrics import Metrics
from service.places import Places
from service.quota import spending
from service.stores import Expected, Pointer, Record, Scope, SealBroken
from service.support import (
    Example,
    Limits,
    OnBadImage,
    Rejected,
    checked,
    grown,
    normal,
    record_id,
    rows_of,
    task_name,
    usable,
    without_class,
    without_example,
)
from service.support import head_id as head_id_of
from service.tasks import Adapted, Tasks
from service.waiting import Payload


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
        self._places = Places(self.limits.max_tasks)
        self._tasks = Tasks(self._learning, self._flights, self.metrics)

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
        """Learns a task and stores it; without a name it is named after the head of all that was sent.

        When this returns, the record is on disk. `expect`: see Scope.commit. `retain`: the images are kept as well. A
        support set that is there already costs nothing. Raises the errors of models/errors.py.
        """
        method = method or self.default_method
        self._learning.learner(method)
        examples = checked(examples, unlabelled, self.limits)
        head_id = head_id_of(self.artifact.digest, method, examples, unlabelled)
        name = task_name(task) if task is not None else _name_of(head_id)
        open_to_all = expect is None and ttl_s is None  # else a condition was named, or an end: let the store decide

        async def known(head_id: str, *, admitted: bool = False) -> Adapted | None:
            return await self._known(scope, name, head_id, retain=retain, admitted=admitted) if open_to_all else None

        async def work() -> Adapted:
            embedded = await self.batcher.embed([*(example.payload for example in examples), *unlabelled])
            rows, rejected = usable(examples, unlabelled, embedded.items, on_bad_image=on_bad_image, retain=retain)
            record = self._learning.record(rows, method)
            if ttl_s is not None:
                record = replace(record, expires=record.created + ttl_s)
            # With images left out, the rest may be there already.
            there = await known(record_id(record), admitted=True) if rejected else None
            if there:
                return replace(there, rejected=rejected)
            return await self._tasks.store(
                scope, name, record, record_id(record), expect, rejected=rejected, embedded=embedded
            )

        # What is left out is told by its place, so another order is another request.
        order = hash((*((example.label, example.payload) for example in examples), *unlabelled))
        flight = (scope.tenant, name, head_id, str(order), str(expect), str(ttl_s), str(retain), on_bad_image)
        async with self._places.kept(scope, name):
            there = None if self._flights.under_way(flight) else await known(head_id)
            if there:
                return there
            with spending(len(examples) + len(unlabelled), Overloaded):
                return await self._flights.once(flight, work)

    def name(self, examples: Sequence[Example], *, unlabelled: Sequence[bytes] = (), method: str = "") -> str:
        """What `adapt` will call a task that is given no name. Raises what it raises for such examples."""
        method = method or self.default_method
        self._learning.learner(method)
        examples = checked(examples, unlabelled, self.limits)
        return _name_of(head_id_of(self.artifact.digest, method, examples, unlabelled))

    async def name_of_copy(self, scope: Scope, other: str, *, method: str = "") -> str:
        """What `copy` will call a task that is given no name, while the other stays as it is."""
        return _name_of(record_id(await self._like(scope, other, method)))

    async def copy(
        self,
        scope: Scope,
        task: str | None,
        other: str,
        *,
        method: str = "",
        ttl_s: float | None = None,
        expect: Expected = None,
    ) -> Adapted:
        """Makes a task, in one version, what another one is now, its images included where those are kept.

        So what was tried under one name takes the place of another at once. Raises TaskNotFound where there is no such
        other, and what `adapt` raises.
        """
        record, now = await self._like(scope, other, method), time.time()
        record = replace(record, created=now, expires=None if ttl_s is None else now + ttl_s)
        head_id = record_id(record)
        name = task_name(task) if task is not None else _name_of(head_id)
        async with self._places.kept(scope, name):
            if expect is None and ttl_s is None:
                there = await self._known(scope, name, head_id, retain=bool(record.images))
                if there:
                    return there
            return await self._tasks.store(scope, name, record, head_id, expect)

    async def _like(self, scope: Scope, other: str, method: str) -> Record:
        """The record of another task, as it is learned with the method; with its own where that is empty."""
        if method:
            self._learning.learner(method)
        _, found = await self._tasks.found(scope, other)
        record = await self._learning.ours(other, found)
        return replace(record, method=method or record.method)

    async def _known(
        self, scope: Scope, name: str, head_id: str, *, retain: bool, admitted: bool = False
    ) -> Adapted | None:
        """The task, when it already is at this head, and to stay as it was asked to."""
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
        return await self._tasks.told(name, found[0], found[1], known=True, admitted=admitted)

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
        await self._tasks.at(scope, task)  # an unknown task costs no work
        embedded = await self._embed([*(example.payload for example in examples), *unlabelled])
        errors = [item for item in embedded.items if isinstance(item, FewshotError)]
        if len(errors) == len(embedded.items):
            raise copy(errors[0])

        async def made(before: Record) -> tuple[Record, tuple[Rejected, ...]]:
            record, retain = await self._learning.ours(task, before), bool(before.images)
            rows, rejected = usable(
                examples, unlabelled, embedded.items, on_bad_image=on_bad_image, retain=retain, have=record
            )
            return grown(record, rows, self.limits, retain=retain), rejected

        return await self._tasks.change(scope, task, made, expect=expect, embedded=embedded, brief=brief)

    async def remove_example(
        self, scope: Scope, task: str, example: str, *, expect: Expected = None, brief: bool = False
    ) -> Adapted:
        """Takes an example back: the task is then equal to one that never saw it."""

        def left(record: Record) -> Record:
            return self._learning.record(without_example(rows_of(record), example), record.method, known=True)

        return await self._changed(scope, task, left, expect=expect, brief=brief)

    async def remove_class(
        self, scope: Scope, task: str, label: str, *, expect: Expected = None, brief: bool = False
    ) -> Adapted:
        label = normal(label)

        def left(record: Record) -> Record:
            return self._learning.record(without_class(rows_of(record), label), record.method, known=True)

        return await self._changed(scope, task, left, expect=expect, brief=brief)

    async def learn_with(
        self, scope: Scope, task: str, method: str, *, expect: Expected = None, brief: bool = False
    ) -> Adapted:
        """Learns the task's examples with another method; no image is sent or read again."""
        self._learning.learner(method)
        return await self._changed(
            scope, task, lambda record: replace(record, method=method), expect=expect, brief=brief
        )

    async def rollback(
        self, scope: Scope, task: str, version: int, *, expect: Expected = None, brief: bool = False
    ) -> Adapted:
        """Makes an earlier version the newest. Raises VersionNotFound when it is not kept any more."""

        async def earlier(before: Record) -> tuple[Record, tuple[Rejected, ...]]:
            _, record = await self._tasks.found(scope, task, version=version)
            try:
                return await self._learning.ours(task, record), ()
            except TaskStale:
                raise TaskStale(
                    f"Version {version} of the task {task!r} was learned with another artifact, and cannot be learned "
                    "again; the task stays as it is."
                ) from None

        return await self._tasks.change(scope, task, earlier, expect=expect, brief=brief)

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
        pointer = await self._tasks.at(scope, task)
        head = self._tasks.in_memory(scope, pointer)
        if head is None and explain:
            pointer, head = await self._tasks.head(scope, task, pointer)
        elif head is None:
            with spending(len(payloads), Overloaded, StoreUnavailable, TaskNotFound, TaskStale):
                embedded, found = await both(self.batcher.embed(payloads), self._tasks.head(scope, task, pointer))
            pointer, head = found
            rows, timings = self._rows(head, embedded, on_bad_image, None)
            return Predictions(task, pointer, head, pointer.head, rows, timings)
        record = None
        if explain:
            try:
                at, record = await self._tasks.found(scope, task, version=pointer.version)
            except VersionNotFound:
                if await self._tasks.at(scope, task) == pointer:
                    raise  # it is where it was, and its record is gone: to look again would not end
                at = None  # another version took its place since
            if at is None or at.head != pointer.head:  # or the task was deleted and made anew
                return await self.classify(scope, task, payloads, explain=True, on_bad_image=on_bad_image)
        embedded = await self._embed(payloads)
        rows, timings = self._rows(head, embedded, on_bad_image, record)
        return Predictions(task, pointer, head, pointer.head, rows, timings)

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
        """Features of images, for other systems, or the error of each bad one; of a lone one it is raised."""
        self._check_queries(payloads)
        embedded = await self._embed(payloads)
        errors = [item for item in embedded.items if isinstance(item, FewshotError)]
        good = len(embedded.items) - len(errors)
        self.metrics.observe("embed", embedded.stages(), good=good, bad=len(errors))
        _check(embedded, on_bad_image)
        return embedded

    async def describe(self, scope: Scope, task: str, *, version: int | None = None) -> Adapted:
        """A task as it is, learned again for this artifact where that can be, or as it was at a version."""
        pointer, record = await self._tasks.found(scope, task, version=version)
        if version is None and record.images and not self._learning.is_ours(record):
            with suppress(TaskStale):  # it cannot be: then it is told as it was
                await self._tasks.made_again(scope, task, pointer)
            pointer, record = await self._tasks.found(scope, task)
        return await self._tasks.told(task, pointer, record)

    async def head(self, scope: Scope, task: str) -> tuple[Pointer, Head]:
        """The head that a task is classified with now."""
        pointer, record = await self._tasks.found(scope, task)
        head = await scope.head(pointer.head)
        if head is not None and record.artifact == head.artifact == self.artifact.digest:
            return pointer, head
        return await self._tasks.made_again(scope, task, pointer)

    async def at(self, scope: Scope, task: str) -> Pointer:
        """Where a task is now. Raises TaskNotFound."""
        return await self._tasks.at(scope, task)

    async def record(self, scope: Scope, task: str) -> tuple[Pointer, Record]:
        return await self._tasks.found(scope, task)

    async def versions(self, scope: Scope, task: str) -> list[Pointer]:
        """The versions that can be rolled back to, newest first."""
        return await self._tasks.versions(scope, task)

    async def tasks(self, scope: Scope, *, limit: int, after: str) -> list[tuple[str, Pointer]]:
        return await scope.tasks(limit=limit, after=after)

    async def forget(self, scope: Scope, task: str, *, expect: Expected = None) -> None:
        """When this returns, the task is gone for good. Raises TaskNotFound."""
        await self._tasks.forget(scope, task, expect=expect)

    async def _embed(self, payloads: Sequence[Payload]) -> Embedded:
        """Features of images, which count for the caller's quota unless there was no room for them."""
        with spending(len(payloads), Overloaded):
            return await self.batcher.embed(payloads)

    async def _changed(
        self, scope: Scope, task: str, change: Callable[[Record], Record], *, expect: Expected, brief: bool
    ) -> Adapted:
        """Applies a change that needs no image to the record of a task."""

        async def made(before: Record) -> tuple[Record, tuple[Rejected, ...]]:
            return change(await self._learning.ours(task, before)), ()

        return await self._tasks.change(scope, task, made, expect=expect, brief=brief)

    def _check_queries(self, payloads: Sequence[Payload]) -> None:
        kind, most = self.artifact.kind, self.limits.max_queries
        if not payloads:
            raise InvalidRequest(f"There is no {kind} to classify.")
        if len(payloads) > most:
            raise TooLarge(f"There are {len(payloads)} {kind}s; the limit is {most} (MAX_QUERIES).")

    def _rows(
        self, head: Head, embedded: Embedded, on_bad_image: OnBadImage, explain: Record | None
    ) -> tuple[list[Answer | FewshotError], dict[str, float]]:
        """The answer for each image, or its error; of a lone image it is raised."""
        start = time.perf_counter()
        good = [item for item in embedded.items if isinstance(item, np.ndarray)]
        bad = len(embedded.items) - len(good)
        self.metrics.observe("classify", embedded.stages(), good=len(good), bad=bad)
        _check(embedded, on_bad_image)
        rejection = self.artifact.manifest.rejections.get(head.method)
        answers = iter(answered(np.array(good), head, rejection, explain) if good else ())
        rows = [item if isinstance(item, FewshotError) else next(answers) for item in embedded.items]
        return rows, {**embedded.stages(), "head": (time.perf_counter() - start) * 1e3}


def _check(embedded: Embedded, on_bad_image: OnBadImage) -> None:
    """Raises the first error where it is not to be told beside the answers for other images, or is not an image's."""
    errors = [item for item in embedded.items if isinstance(item, FewshotError)]
    if errors and (len(embedded.items) == 1 or on_bad_image == "fail" or isinstance(errors[0], ExtractorFailed)):
        raise copy(errors[0])  # or it would hold this frame, and the images with it, in a ring


def _name_of(head_id: str) -> str:
    """The name of a task that was given none."""
    return "t_" + head_id[3:27]


def _part(embedded: Embedded, start: int, stop: int) -> Embedded:
    items = embedded.items[start:stop]
    for index, item in enumerate(items):
        if isinstance(item, FewshotError):
            item.index = index
    return Embedded(items, embedded.queued_s, embedded.decode_s, embedded.embed_s)
