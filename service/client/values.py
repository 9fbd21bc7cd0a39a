"""What the service answers, as frozen values. Fields that a newer service adds are left out, missing ones get defaults.

Knows nothing of requests: `Task` and `AsyncTask`, which can ask for more, are in `sync.py` and `aio.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, TypeVar

__all__ = [
    "Artifact",
    "Class",
    "Confusion",
    "Embedding",
    "Example",
    "Health",
    "ImageError",
    "Limits",
    "Method",
    "Nearest",
    "Prediction",
    "Predictions",
    "Rejected",
    "Report",
    "Suspect",
    "TaskItem",
    "TaskState",
    "Version",
]

T = TypeVar("T")
Json = Mapping[str, Any]


def of(kind: type[T], data: Json, **given: Any) -> T:
    """The value of a dataclass whose fields have the names of the JSON; `given` wins over it."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in {**data, **given}.items() if name in names})


@dataclass(frozen=True, slots=True)
class Class:
    label: str
    shots: int


@dataclass(frozen=True, slots=True)
class Example:
    id: str
    label: str
    name: str | None = None  # of the file, where this client sent it


@dataclass(frozen=True, slots=True)
class Rejected:
    """An image that was left out, and why."""

    index: int  # among the images that were given
    code: str
    detail: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Confusion:
    label: str
    taken_for: str
    count: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """An example that looks more like another class."""

    example: str
    label: str
    looks_like: str
    score: float
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """How well the task may do, told from its support set alone."""

    accuracy: float | None  # None when there are too few examples to tell
    interval: tuple[float, float] | None = None  # 95 %
    estimate: str = "none"
    confusions: tuple[Confusion, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    advice: str = ""
    twins: tuple[tuple[str, ...], ...] = ()  # examples of a class that seem to show one thing, and count as one
    doubles: tuple[tuple[str, ...], ...] = ()  # examples of several classes that look exactly alike


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskState:
    """A task as the service described it."""

    name: str
    version: int
    head: str
    artifact: str
    method: str
    classes: tuple[Class, ...]
    examples: tuple[Example, ...]
    unlabelled: int = 0
    report: Report = Report(None)
    retained: bool = False  # whether its images are kept
    rejects: bool = False  # whether it can say "none of these"
    rejected: tuple[Rejected, ...] = ()  # images of this call that were left out
    created_at: datetime | None = None
    expires_at: datetime | None = None
    timings_ms: Mapping[str, float]

    def __repr__(self) -> str:
        """In one line, for all its examples would fill a screen."""
        shots = {item.label: item.shots for item in self.classes}
        return f"{type(self).__name__}({self.name!r}, version={self.version}, method={self.method!r}, classes={shots})"


def fields_of(state: TaskState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in fields(state)}


@dataclass(frozen=True, slots=True)
class TaskItem:
    name: str
    version: int
    head: str


@dataclass(frozen=True, slots=True)
class Version:
    """A version that can be rolled back to; None where the service did not note it."""

    version: int
    head: str
    created_at: datetime | None = None
    method: str | None = None
    classes: int | None = None
    examples: int | None = None


@dataclass(frozen=True, slots=True)
class ImageError:
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Nearest:
    """An example of the support set that an image resembles."""

    example: str
    label: str
    similarity: float
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image. `label` is None when it resembles none of the classes, or when there is an error."""

    index: int
    label: str | None = None
    probability: float | None = None
    probabilities: Mapping[str, float] | None = None
    known: float | None = None  # 0: unlike anything the task has seen; 1: like its examples
    reason: str | None = None  # "none_of_these" where that is why there is no label
    nearest: tuple[Nearest, ...] = ()
    error: ImageError | None = None


@dataclass(frozen=True, slots=True)
class Predictions:
    """Answers of a call that stored nothing, in order, and the images of its support set that were left out."""

    predictions: tuple[Prediction, ...]
    rejected: tuple[Rejected, ...] = ()

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, index: int) -> Prediction:
        return self.predictions[index]

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Features of images, [n, dim]; None where the image could not be read, which `errors` then explains."""

    artifact: str
    dim: int
    features: tuple[tuple[float, ...] | None, ...]
    errors: tuple[Rejected, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    default: bool = False
    unlabelled: bool = False  # whether unlabelled examples refine it


@dataclass(frozen=True, slots=True)
class Artifact:
    """What is served, and its measured accuracy."""

    digest: str
    name: str
    description: str
    dim: int
    input: Json
    methods: tuple[Method, ...]
    precision: str = "float32"
    accuracy: tuple[Json, ...] = ()
    training: Json | None = None
    views: int = 1  # of each image, whose features are averaged


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_bytes: int
    max_example_bytes: int
    max_examples: int
    max_queries: int
    max_way: int
    max_label: int
    max_pixels: int | None = None
    max_text_bytes: int | None = None
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Health:
    status: str  # ok, degraded (the store is away), unavailable or stopping
    lane: bool | None = None
    store: bool | None = None


def task(data: Json) -> TaskState:
    return of(
        TaskState,
        data,
        name=data["task"],
        classes=tuple(of(Class, item) for item in data["classes"]),
        examples=tuple(of(Example, item) for item in data["examples"]),
        report=_report(data.get("report") or {}),
        rejected=tuple(of(Rejected, item) for item in data.get("rejected", ())),
        created_at=_time(data.get("created_at")),
        expires_at=_time(data.get("expires_at")),
        timings_ms=data.get("timings_ms", {}),
    )


def _report(data: Json) -> Report:
    interval = data.get("interval")
    return of(
        Report,
        {"accuracy": None, **data},
        interval=None if interval is None else (interval[0], interval[1]),
        confusions=tuple(Confusion(item["from"], item["to"], item["count"]) for item in data.get("confusions", ())),
        suspects=tuple(of(Suspect, item) for item in data.get("suspects", ())),
        twins=tuple(map(tuple, data.get("twins", ()))),
        doubles=tuple(map(tuple, data.get("doubles", ()))),
    )


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def prediction(data: Json) -> Prediction:
    error = data.get("error")
    return of(
        Prediction,
        data,
        nearest=tuple(of(Nearest, item) for item in data.get("nearest") or ()),
        error=None if error is None else of(ImageError, error),
    )


def features(data: Json) -> list[tuple[float, ...] | ImageError]:
    why = {item["index"]: of(ImageError, item) for item in data["errors"]}
    return [why[index] if row is None else tuple(row) for index, row in enumerate(data["features"])]


def artifact(data: Json) -> Artifact:
    return of(
        Artifact,
        data,
        methods=tuple(of(Method, item) for item in data["methods"]),
        accuracy=tuple(data.get("accuracy", ())),
    )


def limits(data: Json) -> Limits:
    return of(Limits, data, formats=tuple(data.get("formats", ())))


def page(data: Json) -> tuple[tuple[TaskItem, ...], str | None]:
    """Tasks, and where the next page begins."""
    return tuple(of(TaskItem, item, name=item["task"]) for item in data["items"]), data["next_cursor"]


def versions(data: Json) -> tuple[Version, ...]:
    return tuple(of(Version, item, created_at=_time(item.get("created_at"))) for item in data["items"])
