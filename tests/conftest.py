"""Over the whole suite, what serves is watched: see tests/audit.py. One event that is not allowed fails the run.

A run of the whole suite takes as many processes as there are cores (pytest-xdist), and one more with the slow tests,
which wait as much as they work; one of some files takes one, so that a debugger and `-s` work. `-n` says otherwise. All
of them write what they saw to one file, which the first one reads.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests import audit

# Begun last, these would keep one process busy for a minute or two while the others have nothing to do.
LONGEST = (
    "deploy/test_peers.py",
    "test_journeys.py",
    "deploy/test_scripts.py",
    "training/test_export.py",
    "service/web/test_page.py",
    "service/test_main.py",
    "test_audit.py",
    "training/test_huggingface.py",
    "training/test_metatrain.py",
    "training/test_pretrain.py",
    "deploy/test_docker.py",
    "deploy/test_many.py",
)
SEEN = pytest.StashKey[list[dict[str, object]]]()


def is_whole(config: pytest.Config) -> bool:
    return config.args_source is not pytest.Config.ArgsSource.ARGS


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    if not is_whole(config) or config.option.collectonly:
        return 0
    return (os.cpu_count() or 1) + ("not slow" not in config.option.markexpr)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """To read a file of tests that all need torch takes seconds, in every process: not where they are left out."""
    if collection_path.suffix == ".py" and is_whole(config) and "not torch" in config.option.markexpr:
        return True if "\npytestmark = pytest.mark.torch\n" in collection_path.read_text() else None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """File by file: those that take longest, and then those with the most tests."""
    tests = Path(__file__).parent
    ranks = {tests / name: rank for rank, name in enumerate(LONGEST)}
    assert all(path.exists() for path in ranks)
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), -counts[item.path], item.path))


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if is_worker(config):
        audit.in_this_process(os.environ[audit.VARIABLE]).install()
        return
    handle, file = tempfile.mkstemp(prefix="fewshot-audit-")
    os.close(handle)
    os.environ[audit.VARIABLE] = file  # services that tests start are watched because of it
    audit.in_this_process(file).install()


@pytest.hookimpl(trylast=True)  # when the other processes have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    if is_worker(session.config):
        return
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
