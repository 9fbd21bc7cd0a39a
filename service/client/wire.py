"""Requests and answers as values, and when a request is sent again: all without a socket.

A **plan** is a generator that yields what is to be done next, a `Call` or a `Pause`, and is sent what came of it. So
each use of the API is written once, and the two clients, sync and async, differ only in how they do the next thing.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeAlias, TypeVar

from service.client import errors

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    content: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """There was no answer."""

    reason: str
    timed_out: bool = False  # sent, and waited for as long as was allowed


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    value: T


Outcome: TypeAlias = Answer | Lost | None
Plan: TypeAlias = Generator[Call | Pause, Outcome, T]


def advance(plan: Plan[T], outcome: Outcome) -> Call | Pause | Done[T]:
    """Tells a plan what came of its last step (None at the start and after a pause); its next step or its result."""
    try:
        return plan.send(outcome)
    except StopIteration as end:
        return Done(end.value)


@dataclass(frozen=True, slots=True)
class Patience:
    """How often, and how long, a request is tried again. Every request of this client may be sent twice."""

    retries: int = 3
    longest_wait_s: float = 20.0  # a service that asks for more is not waited for
    first_wait_s: float = 0.25

    def wait(self, error: errors.FewshotError, attempt: int) -> float | None:
        """Seconds until the next attempt; None when there should be none."""
        passing = isinstance(error, errors.Busy) or error.status in (429, 502, 503)
        broken = isinstance(error, errors.Unreachable) and not isinstance(error, errors.TimedOut)
        asked = error.retry_after or 0.0
        if attempt >= self.retries or not (passing or broken) or asked > self.longest_wait_s:
            return None
        # Callers that were refused together should not come back together.
        own = self.first_wait_s * 2**attempt * random.uniform(0.5, 1)
        return float(min(asked + own, self.longest_wait_s))


def ask(call: Call, patience: Patience) -> Plan[Answer]:
    """The answer of the service, after as many attempts as it takes. Raises FewshotError."""
    attempt = 0
    while True:
        try:
            return answered((yield call))
        except errors.FewshotError as error:
            error.attempts = attempt + 1
            wait = patience.wait(error, attempt)
            if wait is None:
                raise
        attempt += 1
        yield Pause(wait)


def answered(outcome: Outcome) -> Answer:
    """A good answer. Raises FewshotError for every other outcome."""
    if isinstance(outcome, Answer):
        if 200 <= outcome.status < 300:
            return outcome
        raise problem(outcome)
    if outcome is not None and not outcome.timed_out:
        raise errors.Unreachable(outcome.reason, code="unreachable")
    raise errors.TimedOut(outcome.reason if outcome else "", code="timed_out")


def problem(answer: Answer) -> errors.FewshotError:
    """What the service says went wrong."""
    status, wait = answer.status, _retry_after(answer)
    try:
        body = json.loads(answer.content)
        code, detail = str(body["code"]), str(body["detail"])
    except (ValueError, KeyError, TypeError):  # a proxy's own words, or something else altogether
        kind = errors.Busy if status in (429, 502, 503) else errors.UnreadableAnswer
        text = f"The answer is HTTP {status}, and not one of a fewshot service."
        return kind(text, code=f"http_{status}", status=status, retry_after=wait)
    return errors.CODES.get(code, errors.FewshotError)(
        detail,
        code=code,
        status=status,
        index=body.get("index"),
        pointer=body.get("pointer"),
        request_id=body.get("request_id"),
        retry_after=wait,
    )


def _retry_after(answer: Answer) -> float | None:
    """Seconds, whichever of its two forms the header has."""
    text = answer.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def read(answer: Answer, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of the JSON of an answer. Raises UnreadableAnswer."""
    try:
        return parse(json.loads(answer.content))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        text = "What answers at that address is no fewshot service, or one of another version."
        raise errors.UnreadableAnswer(text, code="unreadable_answer", status=answer.status) from None


def once() -> dict[str, str]:
    """A header that lets the service recognise the same request when it comes again."""
    return {"Idempotency-Key": secrets.token_hex(16)}


# Characters that would have to be escaped in the name of a form's field, which every server reads differently.
AWKWARD = frozenset('"\\%') | {chr(code) for code in range(32)} | {"\x7f"}
PART_BYTES = 300  # of a form around a file, besides its name


def form(files: Iterable[tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    """A multipart body and its header; each file stands in the field named with it, which holds nothing AWKWARD."""
    boundary = secrets.token_hex(16)
    head = '--{}\r\nContent-Disposition: form-data; name="{}"; filename="{}"\r\nContent-Type: application/octet-stream'
    parts = []
    for number, (name, data) in enumerate(files):
        parts += [(head + "\r\n\r\n").format(boundary, name, number).encode(), data, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), {"Content-Type": f"multipart/form-data; boundary={boundary}"}
