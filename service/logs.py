"""Log lines: one JSON object each where a program reads them, plain text on a terminal.

They are written by a thread of their own, in bunches: whoever logs never waits for the disk or for a pipe that nobody
reads. Lines that find no room are dropped, and how many is told.
"""

from __future__ import annotations

import atexit
import json
import logging
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import TextIO

MOST_WAITING = 20_000
WAIT_S = 0.1  # longest time until a line is written
LAST_S = 0.5  # and for the last ones of a process that ends at once


class Json(logging.Formatter):
    """{"ts", "level", "logger", "event", ...}: fields given as `extra={"fields": {...}}` stand beside the rest."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Plain(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())
        return f"{super().format(record)} {fields}".rstrip()


class Later(logging.Handler):
    """Takes records and writes their lines a little later: the thread looks ten times a second, and at once after a
    warning. `close` writes what is left.
    """

    def __init__(self, stream: TextIO, formatter: logging.Formatter):
        super().__init__()
        self.setFormatter(formatter)
        self.stream = stream
        self._waiting: deque[logging.LogRecord] = deque()
        self.dropped = 0  # lines, since the start
        self._told = 0  # how many of them the log has told of
        self._soon = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._write_on, name="log", daemon=True)
        self._thread.start()

    def handle(self, record: logging.LogRecord) -> bool:  # without the lock of a handler: a deque needs none
        if len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
            return False
        self._waiting.append(record)
        if record.levelno >= logging.WARNING:
            self._soon.set()
        return True

    def _write_on(self) -> None:
        while not self._closing:
            self._soon.wait(WAIT_S)
            self._soon.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        lines = []
        while self._waiting:
            record = self._waiting.popleft()
            try:
                lines.append(self.format(record))
            except Exception:  # a line that cannot be made must not end the thread, and with it all lines
                lines.append(f"A line of {record.name} cannot be written.")
        dropped, lost = self.dropped, len(lines)
        if dropped > self._told:
            text = f"{dropped - self._told} lines were dropped: the log is not read, or too slowly."
            lines.append(self.format(logging.LogRecord(__name__, logging.WARNING, "", 0, text, (), None)))
        if lines:
            try:
                self.stream.write("\n".join(lines) + "\n")
                self.stream.flush()
                self._told = dropped
            except (OSError, ValueError):  # nobody reads, or it is closed: there is nowhere to say so
                self.dropped += lost

    def flush(self) -> None:
        self._soon.set()

    def end(self) -> None:
        """`close` for who may hold any lock, as the handler of a signal may: asks for none, and waits for a moment."""
        self._closing = True  # the thread looks by itself
        self._thread.join(LAST_S)

    def close(self) -> None:
        self._closing = True
        self._soon.set()
        self._thread.join(2)  # no longer: a pipe that nobody reads must not keep the process
        super().close()


def configure(level: str) -> Later:
    """Sends all logs to stderr."""
    # What no line shows need not be found out for each: the place in the source, the thread, the process.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = Later(sys.stderr, Plain() if sys.stderr.isatty() else Json())
    atexit.register(handler.close)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    return handler
