"""Whom work is for, and whether they are still there. The server tells; who is about to begin with work looks.

Knows nothing of connections or keys.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar


class CallerLeft(Exception):
    """Nobody waits for this work any more, so it was not done. No error of anybody's: nobody will read of it."""


def stays() -> bool:
    """For work that is not for one caller alone."""
    return False


has_left: ContextVar[Callable[[], bool]] = ContextVar("has_left", default=stays)
tenant: ContextVar[str] = ContextVar("tenant", default="")  # who takes turns with others
