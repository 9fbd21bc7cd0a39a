"""Bodies of requests and answers. Unknown fields are refused on the way in; answers hold these fields and no others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NoOptions(Closed):
    """For operations without query parameters: one that is misspelt, or meant for another, does not pass unheard."""


Base64 = Annotated[str, Field(description="an encoded JPEG, PNG or WEBP, in base64", examples=["iVBORw0KGgo..."])]


# Whatever the settings allow: a body of small items would otherwise become very many Python objects.
MOST_ITEMS = 10_000


class LabelledImage(Closed):
    label: str
    image: Base64

    @property
    def content(self) -> str:
        return self.image


class SupportBody(Closed):
    """A support set as JSON."""

    support: Annotated[list[LabelledImage], Field(max_length=MOST_ITEMS)]
    unlabelled: Annotated[list[Base64], Field(max_length=MOST_ITEMS)] = []
    method: str = ""


class SupportLine(Closed):
    """One line of a support set as JSON lines; without a label, an unlabelled example."""

    label: str | None = None
    image: Base64

    @property
    def content(self) -> str:
        return self.image


class QueryLine(Closed):
    """One line of images to classify as JSON lines."""

    image: Base64

    @property
    def content(self) -> str:
        return self.image


class QueryBody(Closed):
    """Images to classify, as JSON."""

    images: Annotated[list[Base64], Field(max_length=MOST_ITEMS)]

    @property
    def contents(self) -> list[str]:
        return self.images


class OneCallBody(SupportBody):
    """A support set and images to classify, in one call."""

    queries: Annotated[list[Base64], Field(max_length=MOST_ITEMS)]


# The same where the artifact that is served reads texts.


class LabelledText(Closed):
    label: str
    text: str

    @property
    def content(self) -> str:
        return self.text


class TextSupportBody(Closed):
    """A support set of texts as JSON."""

    support: Annotated[list[LabelledText], Field(max_length=MOST_ITEMS)]
    unlabelled: Annotated[list[str], Field(max_length=MOST_ITEMS)] = []
    method: str = ""


class TextSupportLine(Closed):
    """One line of a support set of texts as JSON lines; without a label, an unlabelled example."""

    label: str | None = None
    text: str

    @property
    def content(self) -> str:
        return self.text


class TextQueryLine(Closed):
    """One line of texts to classify as JSON lines."""

    text: str

    @property
    def content(self) -> str:
        return self.text


class TextQueryBody(Closed):
    """Texts to classify, as JSON."""

    texts: Annotated[list[str], Field(max_length=MOST_ITEMS)]

    @property
    def contents(self) -> list[str]:
        return self.texts


class TextOneCallBody(TextSupportBody):
    """A support set of texts and texts to classify, in one call."""

    queries: Annotated[list[str], Field(max_length=MOST_ITEMS)]


class ClassInfo(Closed):
    label: str
    shots: int


class ExampleInfo(Closed):
    id: str
    label: str


class RejectedInfo(Closed):
    """An image that could not be used, and why."""

    index: int = Field(description="from 0; of a support set those with a label come first, then those without")
    code: str
    detail: str
    name: str | None = Field(None, description="of a support set: field and file name in a form, or path in an archive")


class ConfusionInfo(Closed):
    model_config = ConfigDict(populate_by_name=True)

    from_: str = Field(alias="from")
    to: str
    count: int


class SuspectInfo(Closed):
    """An example that a head made without it would call something else."""

    example: str
    label: str
    looks_like: str
    score: float


class ReportInfo(Closed):
    """What the support set says about itself, each example held out in turn."""

    accuracy: float | None
    interval: tuple[float, float] | None
    estimate: str
    confusions: list[ConfusionInfo]
    suspects: list[SuspectInfo]
    advice: str
    twins: list[list[str]] = Field(description="examples of a class that seem to show one thing, and count as one")
    doubles: list[list[str]] = Field(
        description="examples of several classes that look exactly alike, as one file under two labels does"
    )


class Task(Closed):
    task: str
    version: int
    head: str
    artifact: str
    method: str
    classes: list[ClassInfo]
    examples: list[ExampleInfo]
    unlabelled: int
    retained: bool
    rejects: bool
    report: ReportInfo
    rejected: list[RejectedInfo]
    created_at: str
    expires_at: str | None
    timings_ms: dict[str, float]


class Moved(Closed):
    """A change with `Prefer: return=minimal`: it is kept, and learned behind the answer."""

    task: str
    version: int
    head: str
    method: str
    rejected: list[RejectedInfo]
    timings_ms: dict[str, float]


class TaskItem(Closed):
    task: str
    version: int
    head: str


class TaskList(Closed):
    items: list[TaskItem]
    next_cursor: str | None


class VersionItem(Closed):
    """What a version is; null where it was written by a program that did not note it."""

    version: int
    head: str
    created_at: str | None
    method: str | None
    classes: int | None
    examples: int | None


class VersionList(Closed):
    items: list[VersionItem]


class NearInfo(Closed):
    example: str
    label: str
    similarity: float


class Prediction(Closed):
    """The answer for one image: a label with its probability, none of these (`label` null, with a reason), or an error.

    `known` is the share of genuine images of the task that look less like its classes than this one.
    """

    index: int
    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] | None = None
    known: float | None = None
    reason: Literal["none_of_these"] | None = None
    nearest: list[NearInfo] | None = None
    error: RejectedInfo | None = None


class Predictions(Closed):
    task: str | None
    version: int | None
    head: str
    stale: bool = False
    reject: float | None = None
    predictions: list[Prediction]
    rejected: list[RejectedInfo] = []
    timings_ms: dict[str, float]


class Features(Closed):
    """Features of images: unit-length vectors, null where the image has an error."""

    artifact: str
    dim: int
    features: list[list[float] | None]
    errors: list[RejectedInfo]
    timings_ms: dict[str, float]


class Problem(BaseModel):
    """RFC 9457. `code` is part of the API, `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    index: int | None = None
    pointer: str | None = None


class MethodInfo(Closed):
    name: str
    default: bool
    unlabelled: bool = Field(description="whether unlabelled examples refine it")


class ArtifactInfo(Closed):
    digest: str
    name: str
    description: str
    input: dict[str, str | int]
    dim: int
    methods: list[MethodInfo]
    precision: str
    views: int = Field(description="of each image, whose features are averaged")
    accuracy: list[dict[str, str | int | float]]
    training: dict[str, str | int | float | bool | None]


class LimitsInfo(Closed):
    max_body_bytes: int
    body_timeout_s: float
    max_example_bytes: int
    max_pixels: int
    max_text_bytes: int
    min_edge: int
    max_aspect: int
    max_examples: int
    max_retained_bytes: int
    max_queries: int
    max_way: int
    max_label: int
    max_tasks: int = Field(description="of one tenant; 0: as many as the store holds")
    max_waiting: int
    formats: list[str]


class Health(Closed):
    status: Literal["ok", "degraded", "unavailable", "stopping"]
    lane: bool | None = None
    store: bool | None = None
