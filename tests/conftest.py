"""Over the whole suite, what serves is watched: see tests/audit.py. One event that is not allowed fails the run."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from tests import audit

SEEN = pytest.StashKey[list[dict[str, object]]]()


def pytest_configure(config: pytest.Config) -> None:
    handle, file = tempfile.mkstemp(prefix="fewshot-audit-")
    os.close(handle)
    os.environ[audit.VARIABLE] = file  # services that tests start are watched because of it
    audit.in_this_process(file).install()


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = Path(os.environ.pop(audit.VARIABLE))
    seen = session.config.stash[SEEN] = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    if any("event" in line for line in seen) and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seen = config.stash.get(SEEN, [])
    wrong = [line for line in seen if "event" in line]
    for line in wrong[:20]:
        terminalreporter.write_line(f"audit: {json.dumps(line)}", red=True)
    if seen:
        services = sum("watching" in line for line in seen)
        terminalreporter.write_line(f"audit: {services} service processes watched, {len(wrong)} events not allowed")
