"""What is said of a finding in the tests of the doctor."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from service import doctor
from service.doctor import Check


def wrong(check: Check, words: str, *, status: str = "fail") -> None:
    assert (check.status, words in check.found) == (status, True), check
    assert check.fix.strip()


def fine(check: Check, words: str = "") -> None:
    assert check.status == "ok", check
    assert words in check.found
    assert check.fix == ""


def everything(environment: dict[str, str], **given: str) -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(environment, **given)}


@contextmanager
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]
