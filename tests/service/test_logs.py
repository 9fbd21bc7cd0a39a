from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time

import pytest

from service import logs
from service.logs import Json, Later, Plain


def record(text: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("fewshot.access", logging.INFO, "f.py", 1, text, (), None)
    if fields:
        made.fields = fields
    return made


def test_a_line_is_one_json_object_with_its_fields() -> None:
    line = Json().format(record("two\nlines", route="/v1/tasks", status=200))
    assert "\n" not in line
    found = json.loads(line)
    assert found["event"] == "two\nlines"
    assert found["level"] == "info"
    assert found["logger"] == "fewshot.access"
    assert (found["route"], found["status"]) == ("/v1/tasks", 200)
    assert found["ts"].endswith("+00:00")


def test_an_exception_is_part_of_its_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    assert "ValueError: broken" in json.loads(Json().format(made))["traceback"]


@pytest.mark.parametrize("fields", [{}, {"status": 200}])
def test_on_a_terminal_a_line_is_text(fields: dict[str, object]) -> None:
    line = Plain().format(record("request", **fields))
    assert "INFO fewshot.access request" in line
    assert line.endswith("status=200" if fields else "request")


class Slow(io.StringIO):
    """A pipe that nobody reads until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.go.wait(10)
        return super().write(text)


def later(stream: io.StringIO) -> tuple[Later, logging.Logger]:
    handler = Later(stream, Json())
    logger = logging.Logger("fewshot.test")
    logger.addHandler(handler)
    return handler, logger


def test_lines_are_written_in_order_and_none_is_left_at_the_end() -> None:
    stream = io.StringIO()
    handler, logger = later(stream)
    for number in range(500):
        logger.info("line %d", number)
    handler.close()
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == [f"line {n}" for n in range(500)]


def test_a_warning_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "WAIT_S", 60)
    stream = io.StringIO()
    handler, logger = later(stream)
    logger.warning("look")
    give_up = time.monotonic() + 5
    while "look" not in stream.getvalue():
        assert time.monotonic() < give_up
        time.sleep(0.005)
    handler.close()


def test_a_pipe_that_nobody_reads_stops_nobody_and_what_was_dropped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_WAITING", 100)
    stream = Slow()
    handler, logger = later(stream)
    start = time.monotonic()
    for number in range(5_000):
        logger.warning("line %d", number)
    assert time.monotonic() - start < 2
    stream.go.set()
    handler.close()
    told = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
    dropped = [int(event.split()[0]) for event in told if "dropped" in event]
    assert dropped
    assert sum(dropped) + len(told) - len(dropped) == 5_000
    assert 0 < len(told) <= 202


def test_a_line_that_cannot_be_made_ends_no_other() -> None:
    stream = io.StringIO()
    handler, logger = later(stream)
    logger.info("%d", "no number")
    logger.info("the next")
    handler.close()
    first, second = stream.getvalue().splitlines()
    assert "cannot be written" in first
    assert json.loads(second)["event"] == "the next"


def test_a_process_that_ends_at_once_writes_its_last_lines() -> None:
    stream = io.StringIO()
    handler, logger = later(stream)
    logger.info("the last")
    handler.end()
    assert "the last" in stream.getvalue()


@pytest.mark.slow
def test_but_waits_for_nobody_who_does_not_read() -> None:
    stream = Slow()
    handler, logger = later(stream)
    logger.warning("the last")
    start = time.monotonic()
    handler.end()
    assert 0.4 < time.monotonic() - start < 2
    stream.go.set()
    handler.close()


@pytest.mark.slow
def test_lines_that_were_lost_are_counted_until_they_are_told() -> None:
    class Broken(io.StringIO):
        broken = True

        def write(self, text: str) -> int:
            if self.broken:
                raise BrokenPipeError
            return super().write(text)

    stream = Broken()
    handler, logger = later(stream)
    for _ in range(3):
        logger.warning("lost")
        time.sleep(2 * logs.WAIT_S)
    assert handler.dropped == 3
    stream.broken = False
    handler.close()
    assert "3 lines were dropped" in stream.getvalue()
    assert handler.dropped == 3
