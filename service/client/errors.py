"""What can go wrong, as exceptions: one class for each `code` of the API, so that callers name what they handle.

    FewshotError
    ├── Unreachable           nothing answers at that address, or the connection broke
    │   └── TimedOut          it did not answer in time
    ├── UnreadableAnswer      what answers there is no fewshot service, or one of another age
    ├── InvalidRequest        the service cannot read the request
    │   ├── InvalidSupport    the support set cannot be learned from
    │   ├── UndecodableExample  an image is none that is accepted; `index` says which
    │   ├── UnknownMethod     no learner of that name
    │   ├── TooLarge          a limit was passed; the sentence names it
    │   ├── UnsupportedMedia  a media type that the service does not know
    │   └── IdempotencyMismatch  an idempotency key was used before, with another body
    ├── Unauthorized          no key, or a wrong one
    ├── Forbidden             the key may not do that
    ├── NotFound              no such route
    │   ├── TaskNotFound      no task of that name
    │   ├── ExampleNotFound   the task has no such example
    │   ├── ClassNotFound     the task has no such class
    │   └── VersionNotFound   the task has no such version any more
    ├── Conflict              the state of the task does not allow it
    │   ├── TaskStale         it was learned with another artifact: send its examples again
    │   ├── VersionConflict   it moved meanwhile
    │   ├── NotRetained       its images were not kept
    │   └── ExportRefused     it cannot be exported
    ├── Busy                  not now; tried again before you see it
    │   ├── Overloaded        the queue is full
    │   ├── OverQuota         the key's own quota is used up
    │   ├── StoreUnavailable  the store does not answer
    │   ├── BodyTimeout       the body came too slowly
    │   └── InFlight          the same request is still at work
    └── ServiceFailed         a fault of the service; its log has more
        └── ExtractorFailed   the extractor failed

A code that this version does not know is a plain FewshotError. Knows nothing of how requests are sent.
"""


class FewshotError(Exception):
    """Base of all. `detail` is one sentence for a person; `code` is what programs look at."""

    def __init__(
        self,
        detail: str,
        *,
        code: str = "error",
        status: int | None = None,
        index: int | None = None,
        pointer: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status  # of HTTP; None when there was no answer
        self.index = index  # of the image at fault, among those that were given; those without a label come last
        self.pointer = pointer
        self.request_id = request_id  # names the request in the log of the service
        self.retry_after = retry_after  # seconds
        self.attempts = 1  # requests it took to get here

    def names(self, index: int, name: str | None) -> None:
        """Says which image is at fault: its place among all that were given, and its file where it has one."""
        self.index = index
        if name is not None:
            self.detail = f"{name}: {self.detail}"
            self.args = (self.detail,)


class Unreachable(FewshotError):
    pass


class TimedOut(Unreachable):
    pass


class UnreadableAnswer(FewshotError):
    pass


class InvalidRequest(FewshotError):
    pass


class InvalidSupport(InvalidRequest):
    pass


class UndecodableExample(InvalidRequest):
    pass


class UnknownMethod(InvalidRequest):
    pass


class TooLarge(InvalidRequest):
    pass


class UnsupportedMedia(InvalidRequest):
    pass


class IdempotencyMismatch(InvalidRequest):
    pass


class Unauthorized(FewshotError):
    pass


class Forbidden(FewshotError):
    pass


class NotFound(FewshotError):
    pass


class TaskNotFound(NotFound):
    pass


class ExampleNotFound(NotFound):
    pass


class ClassNotFound(NotFound):
    pass


class VersionNotFound(NotFound):
    pass


class Conflict(FewshotError):
    pass


class TaskStale(Conflict):
    pass


class VersionConflict(Conflict):
    pass


class NotRetained(Conflict):
    pass


class ExportRefused(Conflict):
    pass


class Busy(FewshotError):
    pass


class Overloaded(Busy):
    pass


class OverQuota(Busy):
    pass


class StoreUnavailable(Busy):
    pass


class BodyTimeout(Busy):
    pass


class InFlight(Busy):
    pass


class ServiceFailed(FewshotError):
    pass


class ExtractorFailed(ServiceFailed):
    pass


CODES: dict[str, type[FewshotError]] = {
    "invalid_request": InvalidRequest,
    "invalid_support": InvalidSupport,
    "undecodable_example": UndecodableExample,
    "unknown_method": UnknownMethod,
    "too_large": TooLarge,
    "unsupported_media_type": UnsupportedMedia,
    "method_not_allowed": InvalidRequest,
    "idempotency_mismatch": IdempotencyMismatch,
    "unauthorized": Unauthorized,
    "forbidden": Forbidden,
    "not_found": NotFound,
    "task_not_found": TaskNotFound,
    "example_not_found": ExampleNotFound,
    "class_not_found": ClassNotFound,
    "version_not_found": VersionNotFound,
    "task_stale": TaskStale,
    "version_conflict": VersionConflict,
    "not_retained": NotRetained,
    "export_refused": ExportRefused,
    "overloaded": Overloaded,
    "over_quota": OverQuota,
    "store_unavailable": StoreUnavailable,
    "body_timeout": BodyTimeout,
    "in_flight": InFlight,
    "internal_error": ServiceFailed,
    "extractor_failed": ExtractorFailed,
}
