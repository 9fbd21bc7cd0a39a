"""Every error that the project raises on purpose: a class, a stable code and a sentence.

Knows nothing of HTTP: `service/web/problems.py` gives each class its status.

    FewshotError
    ├── InvalidRequest        the request cannot be read as what it claims to be
    ├── InvalidSupport        the support set as a whole cannot be learned from
    ├── UndecodableExample    one example is no image that is accepted; carries its index
    ├── UnknownMethod         no learner of that name in the artifact
    ├── TooLarge              a limit was passed; the sentence names it and its value
    ├── UnsupportedMedia      a media type that is not understood here
    ├── BodyTimeout           the body did not arrive in time
    ├── TaskNotFound          no task of that name
    ├── TaskStale             the task was learned with another artifact
    ├── VersionConflict       the task moved while it was being changed
    ├── Overloaded            the queue is full; carries the seconds to wait
    ├── StoreUnavailable      the store does not answer
    ├── ExtractorFailed       the extractor raised or gave numbers that are not finite
    └── ArtifactInvalid       the artifact on disk is not what its manifest says
"""

from __future__ import annotations


class FewshotError(Exception):
    """Base of all. `detail` is one sentence for a person and never holds a client's bytes."""

    code = "error"

    def __init__(self, detail: str, *, index: int | None = None, pointer: str | None = None):
        super().__init__(detail)
        self.detail = detail
        self.index = index
        self.pointer = pointer


class InvalidRequest(FewshotError):
    code = "invalid_request"


class InvalidSupport(FewshotError):
    code = "invalid_support"


class UndecodableExample(FewshotError):
    code = "undecodable_example"


class UnknownMethod(FewshotError):
    code = "unknown_method"


class TooLarge(FewshotError):
    code = "too_large"


class UnsupportedMedia(FewshotError):
    code = "unsupported_media_type"


class BodyTimeout(FewshotError):
    code = "body_timeout"


class TaskNotFound(FewshotError):
    code = "task_not_found"


class TaskStale(FewshotError):
    code = "task_stale"


class VersionConflict(FewshotError):
    code = "version_conflict"


class Overloaded(FewshotError):
    code = "overloaded"

    def __init__(self, detail: str, *, retry_after: int = 1):
        super().__init__(detail)
        self.retry_after = retry_after


class StoreUnavailable(FewshotError):
    code = "store_unavailable"

    def __init__(self, detail: str, *, retry_after: int = 2):
        super().__init__(detail)
        self.retry_after = retry_after


class ExtractorFailed(FewshotError):
    code = "extractor_failed"


class ArtifactInvalid(FewshotError):
    code = "artifact_invalid"
