"""What tests do to the file of the embedded store, and find in it."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.stores.sealed import Sealed


def holding(folder: Path, needle: bytes) -> list[str]:
    return [path.name for path in folder.iterdir() if needle in path.read_bytes()]


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def reading_held_up(monkeypatch: pytest.MonkeyPatch, tenant: str) -> Iterator[tuple[threading.Event, list[str]]]:
    """Records of a tenant are parsed when the event is set; and which were begun."""
    gate, begun, opened = threading.Event(), list[str](), Sealed.open_record

    def held(self: Sealed, task: str, *given: Any, **named: Any) -> Any:
        if self._tenant == tenant:
            begun.append(task)
            assert gate.wait(10)
        return opened(self, task, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Sealed, "open_record", held)
        try:
            yield gate, begun
        finally:
            gate.set()
