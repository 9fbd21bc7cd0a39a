"""Ctrl-C, or a request to end (SIGTERM), at the end of a step: then what was reached can be written down.

A second one ends the process at once. Knows nothing of what is running.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STATUS = 130  # of a process that ended because it was asked to

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Within it, signals are noted in `asked` and interrupt nothing."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # others may not say what signals do
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
