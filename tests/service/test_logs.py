from __future__ import annotations

import json
import logging
import sys

import pytest

from service.logs import Json, Plain


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
