"""Support sets as values: checked, named by their content, turned into records and records into heads.

Pure functions of what a client sent and of an artifact. Adaptation is a function of the features at half precision, as
they are kept, and of the examples in canonical order: so a head that was evicted is made again from its record, bit
for bit, and a task from which an example was taken back equals one that never saw it. Knows nothing of stores,
threads or HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.arrays import fetch, place
from models.calibration import Temperature
from models.episode import Support
from models.errors import ExtractorFailed, FewshotError, InvalidRequest, InvalidSupport, TooLarge
from models.head import Affine, Head
from models.learners import Learner
from service.stores import Record

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


def checked(examples: Sequence[Example], unlabelled: Sequence[bytes], limits: Limits) -> list[Example]:
    """Labels in their normal form and every limit kept. Raises InvalidSupport or TooLarge."""
    total = len(examples) + len(unlabelled)
    if total > limits.max_examples:
        raise TooLarge(f"The support set has {total} images; the limit is {limits.max_examples} (MAX_EXAMPLES).")
    if not examples:
        raise InvalidSupport("The support set is empty: send at least one image of each of two classes.")
    normal = [
        Example(normal_label(example.label, index=index, limits=limits), example.payload)
        for index, example in enumerate(examples)
    ]
    labels = {example.label for example in normal}
    if len(labels) < 2:
        raise InvalidSupport(f"Only the class {next(iter(labels))!r} has examples; a task needs two classes or more.")
    if len(labels) > limits.max_way:
        raise TooLarge(f"The task has {len(labels)} classes; the limit is {limits.max_way} (MAX_WAY).")
    return normal


def normal_label(label: str, *, index: int | None, limits: Limits) -> str:
    """The label in its normal form. Raises InvalidSupport."""
    label = unicodedata.normalize("NFC", label).strip()
    if not label:
        raise InvalidSupport("A label is empty.", index=index)
    if len(label) > limits.max_label:
        raise InvalidSupport(
            f"A label has {len(label)} characters; the limit is {limits.max_label} (MAX_LABEL).", index=index
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in label):
        raise InvalidSupport("A label holds control characters.", index=index)
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
    ids = sorted({(example.label, example_id(example.label, example.payload)) for example in examples})
    return _digest(artifact, method, ids, sorted({example_id("", payload) for payload in unlabelled}))


def record_id(record: Record) -> str:
    """The name of the head that a record gives: that of its support set."""
    labelled = len(record.classes)
    ids = [(record.labels[c], record.ids[i]) for i, c in enumerate(record.classes)]
    return _digest(record.artifact, record.method, ids, list(record.ids[labelled:]))


def _digest(artifact: str, method: str, ids: Sequence[tuple[str, str]], unlabelled: Sequence[str]) -> str:
    text = json.dumps([artifact, method, [list(pair) for pair in ids], list(unlabelled)])
    return "hd_" + hashlib.sha256(text.encode()).hexdigest()[:40]


def record_of(
    examples: Sequence[Example],
    unlabelled: Sequence[bytes],
    items: Sequence[np.ndarray | FewshotError],
    *,
    artifact: str,
    method: str,
    dim: int,
    on_bad_image: OnBadImage,
) -> tuple[Record, tuple[Rejected, ...]]:
    """The record of the usable examples, in canonical order: by label, then by content.

    `items` are the features [dim] of each example and each unlabelled image, or its error. Raises InvalidSupport when
    a class is left with no example, and the first error of an image when they are not to be skipped.
    """
    rejected: list[Rejected] = []
    rows: dict[tuple[str, str], np.ndarray] = {}
    extra: dict[str, np.ndarray] = {}
    for index, item in enumerate(items):
        labelled = index < len(examples)
        label = examples[index].label if labelled else ""
        if isinstance(item, ExtractorFailed):
            raise item
        if isinstance(item, FewshotError):
            if on_bad_image == "fail":
                raise item
            rejected.append(Rejected(index, item.code, item.detail))
            continue
        name = example_id(label, examples[index].payload if labelled else unlabelled[index - len(examples)])
        if (label, name) in rows or name in extra:
            rejected.append(Rejected(index, "duplicate_example", "The same image was sent twice; it counts once."))
        elif labelled:
            rows[label, name] = item
        else:
            extra[name] = item
    labels = sorted({example.label for example in examples})
    for label in labels:
        if not any(key[0] == label for key in rows):
            reasons = {r.index: r.detail for r in rejected}
            index = next(i for i, example in enumerate(examples) if example.label == label)
            raise InvalidSupport(f"The class {label!r} has no usable image: {reasons[index]}", index=index)
    keys = sorted(rows)
    record = Record(
        artifact=artifact,
        method=method,
        labels=tuple(labels),
        ids=(*(key[1] for key in keys), *sorted(extra)),
        classes=np.array([labels.index(key[0]) for key in keys], np.int32),
        features=np.stack([rows[key] for key in keys]).astype(np.float16),
        unlabelled=np.array([extra[key] for key in sorted(extra)], np.float16).reshape(len(extra), dim),
        created=time.time(),
    )
    return record, tuple(rejected)


def head_of(record: Record, learner: Learner, temperature: Temperature, *, device: str) -> Head:
    """Adapts. Raises ExtractorFailed when the numbers are not finite."""
    way = len(record.labels)
    unlabelled = record.unlabelled.astype(np.float32)
    support = Support(
        place(record.features.astype(np.float32), device),
        place(record.classes, device),
        way,
        place(unlabelled, device) if len(unlabelled) else None,
    )
    affine = learner.adapt(support)
    shots = tuple(int(count) for count in np.bincount(record.classes, minlength=way))
    weight, bias = fetch(affine.weight), fetch(affine.bias)
    folded = temperature.fold(Affine(weight, bias), shots)
    affine = Affine(folded.weight.astype(np.float32), folded.bias.astype(np.float32))
    if not (np.isfinite(affine.weight).all() and np.isfinite(affine.bias).all()):
        raise ExtractorFailed("The adaptation gave numbers that are not finite; nothing was stored.")
    return Head(affine, record.labels, shots, record.method, record.artifact)
