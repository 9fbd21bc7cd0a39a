"""The use cases, without HTTP: adapt, classify, describe, list, forget.

Adaptation is a pure function of the support features, and the features are rounded to half precision before it, as
they are kept: so a head that was evicted is made again from its record, bit for bit. Knows nothing of requests,
statuses or keys.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import re
import time
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from models.arrays import fetch, place
from models.artifact import Artifact
from models.episode import Support
from models.errors import (
    ExtractorFailed,
    FewshotError,
    InvalidRequest,
    InvalidSupport,
    TaskNotFound,
    TaskStale,
    TooLarge,
    UnknownMethod,
)
from models.head import Affine, Head
from models.learners import Learner
from service.batcher import Batcher, Embedded
from service.metrics import Metrics
from service.stores import Pointer, Record, Scope, SealBroken

T = TypeVar("T")
TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
OnBadImage = Literal["skip", "fail"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, checked before work is done."""

    max_examples: int = 512
    max_queries: int = 64
    max_way: int = 256
    max_label: int = 256


@dataclass(frozen=True, slots=True)
class Example:
    label: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Rejected:
    """An image that was left out, and why."""

    index: int
    code: str
    detail: str


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
        examples = self._checked(examples, unlabelled)
        head_id = self._head_id(method, examples, unlabelled)
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
        head_id = self._record_id(record)
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
        examples = self._checked(examples, unlabelled)
        self._check_queries(payloads)
        embedded = await self.batcher.embed([*(example.payload for example in examples), *unlabelled, *payloads])
        split = len(examples) + len(unlabelled)
        record, rejected = self._record(examples, unlabelled, _part(embedded, 0, split), method, on_bad_image)
        head = await self.batcher.run(lambda: self._head(record, learner))
        rows, timings = self._rows(head, _part(embedded, split, len(embedded.items)), on_bad_image)
        return Predictions(None, None, head, self._record_id(record), rows, timings), rejected

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

    def _checked(self, examples: Sequence[Example], unlabelled: Sequence[bytes]) -> list[Example]:
        """Labels in their normal form and every limit kept. Raises InvalidSupport or TooLarge."""
        total = len(examples) + len(unlabelled)
        if total > self.limits.max_examples:
            raise TooLarge(
                f"The support set has {total} images; the limit is {self.limits.max_examples} (MAX_EXAMPLES)."
            )
        if not examples:
            raise InvalidSupport("The support set is empty: send at least one image of each of two classes.")
        checked = [
            Example(self._label(example.label, index), example.payload) for index, example in enumerate(examples)
        ]
        labels = {example.label for example in checked}
        if len(labels) < 2:
            raise InvalidSupport(
                f"Only the class {next(iter(labels))!r} has examples; a task needs two classes or more."
            )
        if len(labels) > self.limits.max_way:
            raise TooLarge(f"The task has {len(labels)} classes; the limit is {self.limits.max_way} (MAX_WAY).")
        return checked

    def _label(self, label: str, index: int) -> str:
        label = unicodedata.normalize("NFC", label).strip()
        if not label:
            raise InvalidSupport("A label is empty.", index=index)
        if len(label) > self.limits.max_label:
            raise InvalidSupport(
                f"A label has {len(label)} characters; the limit is {self.limits.max_label} (MAX_LABEL).", index=index
            )
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in label):
            raise InvalidSupport("A label holds control characters.", index=index)
        return label

    def _check_queries(self, payloads: Sequence[bytes]) -> None:
        if not payloads:
            raise InvalidRequest("There is no image to classify.")
        if len(payloads) > self.limits.max_queries:
            raise TooLarge(f"There are {len(payloads)} images; the limit is {self.limits.max_queries} (MAX_QUERIES).")

    def _head_id(self, method: str, examples: Sequence[Example], unlabelled: Sequence[bytes]) -> str:
        ids = sorted({(example.label, _example_id(example.label, example.payload)) for example in examples})
        return self._digest(method, ids, sorted({_example_id("", payload) for payload in unlabelled}))

    def _record_id(self, record: Record) -> str:
        labelled = len(record.classes)
        ids = [[record.labels[c], record.ids[i]] for i, c in enumerate(record.classes)]
        return self._digest(record.method, ids, list(record.ids[labelled:]))

    def _digest(self, method: str, ids: Sequence[Any], unlabelled: Sequence[str]) -> str:
        text = json.dumps([self.artifact.digest, method, [list(pair) for pair in ids], unlabelled])
        return "hd_" + hashlib.sha256(text.encode()).hexdigest()[:40]

    def _record(
        self,
        examples: Sequence[Example],
        unlabelled: Sequence[bytes],
        embedded: Embedded,
        method: str,
        on_bad_image: OnBadImage,
    ) -> tuple[Record, tuple[Rejected, ...]]:
        """The record of the usable examples, in canonical order: by label, then by content."""
        rejected: list[Rejected] = []
        rows: dict[tuple[str, str], np.ndarray] = {}
        extra: dict[str, np.ndarray] = {}
        for index, item in enumerate(embedded.items):
            labelled = index < len(examples)
            label = examples[index].label if labelled else ""
            if isinstance(item, ExtractorFailed):
                raise item
            if isinstance(item, FewshotError):
                if on_bad_image == "fail":
                    raise item
                rejected.append(Rejected(index, item.code, item.detail))
                continue
            example_id = _example_id(label, examples[index].payload if labelled else unlabelled[index - len(examples)])
            if (label, example_id) in rows or example_id in extra:
                rejected.append(Rejected(index, "duplicate_example", "The same image was sent twice; it counts once."))
            elif labelled:
                rows[label, example_id] = item
            else:
                extra[example_id] = item
        labels = sorted({example.label for example in examples})
        for label in labels:
            if not any(key[0] == label for key in rows):
                reasons = {r.index: r.detail for r in rejected}
                index = next(i for i, example in enumerate(examples) if example.label == label)
                raise InvalidSupport(f"The class {label!r} has no usable image: {reasons[index]}", index=index)
        keys = sorted(rows)
        record = Record(
            artifact=self.artifact.digest,
            method=method,
            labels=tuple(labels),
            ids=(*(key[1] for key in keys), *sorted(extra)),
            classes=np.array([labels.index(key[0]) for key in keys], np.int32),
            features=np.stack([rows[key] for key in keys]).astype(np.float16),
            unlabelled=np.array([extra[key] for key in sorted(extra)], np.float16).reshape(
                len(extra), self.artifact.manifest.dim
            ),
            created=time.time(),
        )
        return record, tuple(rejected)

    def _head(self, record: Record, learner: Learner) -> Head:
        """Adapts; runs on a lane."""
        way = len(record.labels)
        unlabelled = record.unlabelled.astype(np.float32)
        support = Support(
            place(record.features.astype(np.float32), self._device),
            place(record.classes, self._device),
            way,
            place(unlabelled, self._device) if len(unlabelled) else None,
        )
        affine = learner.adapt(support)
        shots = tuple(int(count) for count in np.bincount(record.classes, minlength=way))
        weight, bias = fetch(affine.weight), fetch(affine.bias)
        folded = self.artifact.manifest.methods[record.method].fold(Affine(weight, bias), shots)
        affine = Affine(folded.weight.astype(np.float32), folded.bias.astype(np.float32))
        if not (np.isfinite(affine.weight).all() and np.isfinite(affine.bias).all()):
            raise ExtractorFailed("The adaptation gave numbers that are not finite; nothing was stored.")
        return Head(affine, record.labels, shots, record.method, record.artifact)

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


def task_name(name: str) -> str:
    """The name, if it is one. Raises InvalidRequest."""
    if not TASK_NAME.fullmatch(name):
        raise InvalidRequest("A task name has 1 to 64 letters, digits, '-' or '_'.")
    return name


def _example_id(label: str, payload: bytes) -> str:
    return "ex_" + hashlib.sha256(label.encode() + b"\0" + payload).hexdigest()[:32]


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
