"""Every error that the project raises on purpose: a class, a stable code and a sentence.

Knows nothing of HTTP: `service/web/problems.py` gives each class its status.

    FewshotError
    ├── Unauthorized          no key, or none that is good here
    ├── Forbidden             the key lacks the scope that this needs
    ├── OverQuota             the key's images of this minute are used up; carries the seconds to wait
    ├── InvalidRequest        the request cannot be read as what it claims to be
    ├── InvalidSupport        the support set as a whole cannot be learned from
    ├── UndecodableExample    one example is no image that is accepted; carries its index
    ├── UnknownMethod         no learner of that name in the artifact
    ├── TooLarge              a limit was passed; the sentence names it and its value
    ├── UnsupportedMedia      a media type that is not understood here
    ├── BodyTimeout           the body did not arrive in time
    ├── TaskNotFound          no task of that name
    ├── ExampleNotFound       no example of that id in the task
    ├── ClassNotFound         no class of that label in the task
    ├── VersionNotFound       no version of that number is kept
    ├── NotRetained           the images of the task were not kept
    ├── ExportRefused         the task cannot be made into a file that answers like the service
    ├── InFlight              the first request with this idempotency key is still at work
    ├── IdempotencyMismatch   the idempotency key was used for another request
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


class Unauthorized(FewshotError):
    code = "unauthorized"


class Forbidden(FewshotError):
    code = "forbidden"


class OverQuota(FewshotError):
    code = "over_quota"

    def __init__(self, detail: str, *, retry_after: int):
        super().__init__(detail)
        self.retry_after = retry_after


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


class ExampleNotFound(FewshotError):
    code = "example_not_found"


class ClassNotFound(FewshotError):
    code = "class_not_found"


class VersionNotFound(FewshotError):
    code = "version_not_found"


class NotRetained(FewshotError):
    code = "not_retained"


class ExportRefused(FewshotError):
    code = "export_refused"


class InFlight(FewshotError):
    code = "in_flight"

    def __init__(self, detail: str, *, retry_after: int = 1):
        super().__init__(detail)
        self.retry_after = retry_after


class IdempotencyMismatch(FewshotError):
    code = "idempotency_mismatch"


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
