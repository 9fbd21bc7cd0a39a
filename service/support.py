"""Support sets as values: checked, named by their content, turned into records and records into heads.

Pure functions of what a client sent and of an artifact. Adaptation is a function of the features at half precision, as
they are kept, and of the examples in canonical order: so a head that was evicted is made again from its record, bit
for bit, and a task from which an example was taken back equals one that never saw it. Knows nothing of stores,
threads or HTTP.
"""

from __future__ import annotations

import hashlib
import re
import time
import unicodedata
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from models import report
from models.arrays import fetch, place
from models.calibration import Rejection, Temperature, divisor
from models.episode import Support
from models.errors import (
    ClassNotFound,
    ExampleNotFound,
    ExtractorFailed,
    FewshotError,
    InvalidRequest,
    InvalidSupport,
    TooLarge,
)
from models.head import Affine, Head
from models.learners import Learner
from models.report import HeldOut, Report
from service.stores import Record

T = TypeVar("T")
MOST_MARKS = 30  # what text of any language keeps to (Unicode, UAX #15, section 13)
OF_MARKS = "\u0f73\u0f75\u0f81"  # no marks by themselves, but what they are taken apart into is nothing else
TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
OnBadImage = Literal["skip", "fail"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, checked before work is done."""

    max_examples: int = 512
    max_queries: int = 64
    max_way: int = 256
    max_label: int = 256
    max_retained_bytes: int = 64_000_000  # of images, of a task that keeps them
    max_tasks: int = 0  # of a tenant; 0: as many as the store holds


ANY = 2**62
UNLIMITED = Limits(max_examples=ANY, max_way=ANY, max_retained_bytes=ANY)  # of what a task has already


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


class Row(NamedTuple):
    """One usable example: what is kept of it."""

    feature: np.ndarray  # [dim] float16
    image: bytes = b""  # only where images are retained


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The usable examples of a task, by what they are called."""

    labelled: dict[tuple[str, str], Row] = field(default_factory=dict)  # (label, id)
    unlabelled: dict[str, Row] = field(default_factory=dict)  # id

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({label for label, _ in self.labelled}))


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    head: Head
    held: HeldOut  # calibrated
    record: Record  # that it was learned from

    @property
    def report(self) -> Report:
        """Made when it is asked for: a head that is only made again needs none."""
        record = self.record
        return report.report(self.held, classes=record.classes, labels=record.labels, ids=record.ids)


def checked(
    examples: Sequence[Example], unlabelled: Sequence[bytes], limits: Limits, *, whole: bool = True
) -> list[Example]:
    """Labels in their normal form and every limit kept; `whole`: it is to be a task by itself.

    Raises InvalidSupport or TooLarge.
    """
    total = len(examples) + len(unlabelled)
    if total > limits.max_examples:
        raise TooLarge(f"The support set has {total} images; the limit is {limits.max_examples} (MAX_EXAMPLES).")
    if not examples and (whole or not unlabelled):
        raise InvalidSupport("The support set is empty: send at least one image of each of two classes.")
    normal = [
        Example(normal_label(example.label, index=index, limits=limits), example.payload)
        for index, example in enumerate(examples)
    ]
    labels = {example.label for example in normal}
    if whole and len(labels) < 2:
        raise InvalidSupport(f"Only the class {next(iter(labels))!r} has examples; a task needs two classes or more.")
    if len(labels) > limits.max_way:
        raise TooLarge(f"The task has {len(labels)} classes; the limit is {limits.max_way} (MAX_WAY).")
    return normal


def _marks(label: str) -> int:
    """The most combining marks that stand in a row."""
    if label.isascii():
        return 0
    runs = groupby(label, lambda letter: bool(unicodedata.combining(letter)) or letter in OF_MARKS)
    return max((sum(1 for _ in run) for marks, run in runs if marks), default=0)


def normal(label: str) -> str:
    """A label as it is kept, however it was written; one that none can be is left as it is.

    To bring marks into order takes the square of how many there are in a row, and nothing else in Python runs then.
    """
    if _marks(label) > MOST_MARKS:
        return label
    return unicodedata.normalize("NFC", label).strip()


def normal_label(label: str, *, index: int | None, limits: Limits) -> str:
    """The label in its normal form. Raises InvalidSupport."""
    too_long = len(label) > 4 * limits.max_label  # in its normal form, too: no letter gets shorter than a quarter
    if not too_long and _marks(label) > MOST_MARKS:
        raise InvalidSupport(f"A label has more than {MOST_MARKS} combining marks in a row.", index=index)
    label = label if too_long else normal(label)
    if not label:
        raise InvalidSupport("A label is empty.", index=index)
    if len(label) > limits.max_label:
        raise InvalidSupport(
            f"A label has {len(label)} characters; the limit is {limits.max_label} (MAX_LABEL).", index=index
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in label):
        raise InvalidSupport("A label holds control characters.", index=index)
    if label == "..":  # a client that does not know better would ask for the task where it means the class
        raise InvalidSupport("No class can be called '..': in an address it means the task.", index=index)
    return label


def task_name(name: str) -> str:
    """The name, if it is one. Raises InvalidRequest."""
    if not TASK_NAME.fullmatch(name):
        raise InvalidRequest("A task name has 1 to 64 letters, digits, '-' or '_'.")
    return name


def example_id(label: str, payload: bytes) -> str:
    """The name of an example: what it shows and what it is said to be. The label of an unlabelled one is empty."""
    return "ex_" + hashlib.sha256(label.encode() + b"\0" + payload).hexdigest()[:32]


def head_id(artifact: str, method: str, examples: Sequence[Example], unlabelled: Sequence[bytes]) -> str:
    """The name of the head that a support set gives, known before anything of it is decoded."""
    names = sorted({(example.label, example_id(example.label, example.payload)) for example in examples})
    extra = sorted({example_id("", payload) for payload in unlabelled})
    return _digest(artifact, method, (name for _, name in names), extra)


def record_id(record: Record) -> str:
    """The name of the head that a record gives: that of its support set."""
    labelled = len(record.classes)
    return _digest(record.artifact, record.method, record.ids[:labelled], record.ids[labelled:])


def _digest(artifact: str, method: str, ids: Iterable[str], unlabelled: Iterable[str]) -> str:
    """Of ids alone, for that of an example tells its label."""
    text = "\n".join((artifact, method, *ids, "", *unlabelled))
    return "hd_" + hashlib.sha256(text.encode()).hexdigest()[:40]


def usable(
    examples: Sequence[Example],
    unlabelled: Sequence[bytes],
    items: Sequence[np.ndarray | FewshotError],
    *,
    on_bad_image: OnBadImage,
    retain: bool = False,
    have: Record | None = None,
) -> tuple[Rows, tuple[Rejected, ...]]:
    """The usable examples that a task has not already, and what was left out.

    `items` are the features [dim] of each example and each unlabelled image, or its error. Raises InvalidSupport when
    a class is left with no example, and the first error of an image when they are not to be skipped.
    """
    rejected: list[Rejected] = []
    rows = Rows()
    names, labels = (set(have.ids), set(have.labels)) if have else (set[str](), set[str]())
    for index, item in enumerate(items):
        labelled = index < len(examples)
        label = examples[index].label if labelled else ""
        if isinstance(item, ExtractorFailed):
            raise copy(item)  # or it would hold this frame, and the images with it, in a ring
        if isinstance(item, FewshotError):
            if on_bad_image == "fail":
                raise copy(item)
            rejected.append(Rejected(index, item.code, item.detail))
            continue
        payload = examples[index].payload if labelled else unlabelled[index - len(examples)]
        name = example_id(label, payload)
        row = Row(item.astype(np.float16), payload if retain else b"")
        if name in names:
            rejected.append(Rejected(index, "duplicate_example", "The same image was sent twice; it counts once."))
        elif labelled:
            rows.labelled[label, name] = row
        else:
            rows.unlabelled[name] = row
        names.add(name)
    for label in sorted({example.label for example in examples} - labels - set(rows.labels)):
        reasons = {r.index: r.detail for r in rejected}
        index = next(i for i, example in enumerate(examples) if example.label == label)
        raise InvalidSupport(f"The class {label!r} has no usable image: {reasons[index]}", index=index)
    return rows, tuple(rejected)


def without_example(rows: Rows, example: str) -> Rows:
    """Raises ExampleNotFound, or InvalidSupport when too little would be left."""
    kept = {key: row for key, row in rows.labelled.items() if key[1] != example}
    extra = {key: row for key, row in rows.unlabelled.items() if key != example}
    if len(kept) + len(extra) == len(rows.labelled) + len(rows.unlabelled):
        raise ExampleNotFound(f"The task has no example {example[:64]!r}.")
    left = Rows(kept, extra)
    gone = set(rows.labels) - set(left.labels)
    if gone:
        raise InvalidSupport(f"It is the last example of {gone.pop()!r}: take the class back instead.")
    return left


def without_class(rows: Rows, label: str) -> Rows:
    """Raises ClassNotFound, or InvalidSupport when fewer than two classes would be left."""
    if label not in rows.labels:
        raise ClassNotFound(f"The task has no class {label[:64]!r}.")
    left = Rows({key: row for key, row in rows.labelled.items() if key[0] != label}, rows.unlabelled)
    if len(left.labels) < 2:
        raise InvalidSupport("A task needs two classes or more; forget the task instead.")
    return left


def rows_of(record: Record) -> Rows:
    images = record.images or (b"",) * len(record.ids)
    n = len(record.classes)
    labelled = {
        (record.labels[c], record.ids[i]): Row(record.features[i], images[i]) for i, c in enumerate(record.classes)
    }
    return Rows(labelled, {record.ids[n + i]: Row(f, images[n + i]) for i, f in enumerate(record.unlabelled)})


def record_of(rows: Rows, *, artifact: str, method: str, dim: int, limits: Limits) -> Record:
    """The record of some examples, in canonical order: by label, then by content. Raises TooLarge."""
    empty = np.zeros((0, dim), np.float16)
    none = Record(artifact, method, (), (), np.zeros(0, np.int32), empty, empty, created=time.time())
    return grown(
        none, rows, limits, retain=all(row.image for row in (*rows.labelled.values(), *rows.unlabelled.values()))
    )


def grown(record: Record, rows: Rows, limits: Limits, *, retain: bool) -> Record:
    """A record with more examples, each put where it belongs; none of them is there already. Raises TooLarge."""
    total = len(record.ids) + len(rows.labelled) + len(rows.unlabelled)
    if total > limits.max_examples:
        raise TooLarge(f"The task would have {total} images; the limit is {limits.max_examples} (MAX_EXAMPLES).")
    labels = tuple(sorted({*record.labels, *rows.labels}))
    if len(labels) > limits.max_way:
        raise TooLarge(f"The task would have {len(labels)} classes; the limit is {limits.max_way} (MAX_WAY).")
    images = [row.image for row in (*rows.labelled.values(), *rows.unlabelled.values())]
    if retain and sum(map(len, (*record.images, *images))) > limits.max_retained_bytes:
        most = limits.max_retained_bytes
        raise TooLarge(f"The images that the task keeps would have more than {most} bytes (MAX_RETAINED_BYTES).")
    n, order = len(record.classes), {label: index for index, label in enumerate(labels)}

    def key_of(place: int) -> tuple[str, str]:
        return record.labels[record.classes[place]], record.ids[place]

    keys, extra = sorted(rows.labelled), sorted(rows.unlabelled)
    new = [rows.labelled[key] for key in keys], [rows.unlabelled[name] for name in extra]
    places = [bisect(range(n), key, key=key_of) for key in keys], [bisect(record.ids, name, lo=n) - n for name in extra]
    moved = np.array([order[label] for label in record.labels], np.int32)[record.classes]
    return replace(
        record,
        labels=labels,
        ids=(*_put(record.ids[:n], [name for _, name in keys], places[0]), *_put(record.ids[n:], extra, places[1])),
        classes=np.insert(moved, places[0], [order[label] for label, _ in keys]),
        features=_inserted(record.features, new[0], places[0]),
        unlabelled=_inserted(record.unlabelled, new[1], places[1]),
        images=(
            *_put(record.images[:n], [row.image for row in new[0]], places[0]),
            *_put(record.images[n:], [row.image for row in new[1]], places[1]),
        )
        if retain
        else (),
    )


def _inserted(features: np.ndarray, rows: Sequence[Row], places: Sequence[int]) -> np.ndarray:
    return np.insert(features, places, np.stack([row.feature for row in rows]), axis=0) if rows else features


def _put(values: Sequence[T], new: Sequence[T], places: Sequence[int]) -> Iterator[T]:
    """Each of the new ones before the value at its place, as numpy inserts them."""
    start = 0
    for value, end in zip(new, places, strict=True):
        yield from values[start:end]
        yield value
        start = end
    yield from values[start:]


def like(record: Record, before: Record) -> Record:
    """A changed record keeps the birth and the end of what it was changed from."""
    return replace(record, created=before.created, expires=before.expires)


@contextmanager
def _solving() -> Iterator[None]:
    try:
        yield
    except (np.linalg.LinAlgError, RuntimeError) as error:  # the second is torch's
        raise ExtractorFailed("The adaptation has no solution; nothing was learned.") from error


def _finite(found: np.ndarray) -> np.ndarray:
    if not np.isfinite(found).all():
        raise ExtractorFailed("The adaptation gave numbers that are not finite; nothing was stored.")
    return found


def learn(
    record: Record,
    learner: Learner,
    temperature: Temperature,
    rejection: Rejection | None,
    *,
    device: str,
    near: float = 0.0,
) -> Learned:
    """Adapts, and holds examples out for the report. Raises ExtractorFailed when the numbers are not finite."""
    way = len(record.labels)
    features, unlabelled = record.features.astype(np.float32), record.unlabelled.astype(np.float32)
    support = Support(
        place(features, device),
        place(record.classes, device),
        way,
        place(unlabelled, device) if len(unlabelled) else None,
    )
    with _solving():
        affine, leave_out = report.fitted(learner, support, near=near)
    affine = Affine(_finite(fetch(affine.weight)), _finite(fetch(affine.bias)))
    with _solving():
        held = leave_out()
    _finite(held.logits)
    shots = tuple(int(count) for count in np.bincount(record.classes, minlength=way))
    by = divisor(temperature.at(way, shots), held.logits, record.classes[held.index])
    affine = Affine(*(_finite((part / by).astype(np.float32)) for part in affine))
    held = replace(held, logits=held.logits / by)
    head = Head(affine, record.labels, shots, record.method, record.artifact)
    if rejection is not None:
        rivals = report.without_own(head.logits(features), record.classes)
        head = replace(head, gauge=rejection.gauge(shots, held_out=held.logits, rivals=rivals))
    return Learned(head, held, record)
