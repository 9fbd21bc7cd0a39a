"""`python -m service` as a person meets it: a process, its words, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path, **variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
    return {
        **clean,
        "FEWSHOT_DATA_DIR": str(folder),
        "FEWSHOT_PORT": "0",
        **{f"FEWSHOT_{name}": value for name, value in variables.items()},
    }


@contextmanager
def started(folder: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A running service, its address, and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "service"],
        cwd=ROOT,
        env=command(folder, **variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout
        said = ""
        for line in process.stdout:
            said += line
            if "curl" in line:
                break
        address = re.search(r"http://[0-9.:]+", said)
        assert address, said
        yield process, address.group(), said
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def get(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: dict[str, object] = json.load(answer)
    return found


def refused(folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env=command(folder, **variables),
        text=True,
        capture_output=True,
        timeout=30,
    )
    assert done.returncode in (2, 3), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_it_says_where_it_is_and_the_command_it_prints_works(tmp_path: Path) -> None:
    with started(tmp_path) as (process, address, said):
        assert get(address + "/readyz") == {"status": "ok", "lane": True, "store": True}
        line = next(line for line in said.splitlines() if "curl" in line)
        answer = json.loads(subprocess.run(line.split(), cwd=ROOT, capture_output=True, text=True, timeout=30).stdout)
        assert answer["predictions"][0]["label"] == "theta"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_task_survives_a_kill_and_a_restart(tmp_path: Path) -> None:
    sample = ROOT / "service" / "sample"
    with started(tmp_path) as (process, address, _):
        fields = [f"-F{label}=@{sample}/{label}/{n}.png" for label in ("alpha", "omega") for n in (1, 2)]
        done = subprocess.run(
            ["curl", "-s", "-X", "PUT", address + "/v1/tasks/kept", *fields], capture_output=True, timeout=30
        )
        task = json.loads(done.stdout)
        process.kill()
    with started(tmp_path) as (_, address, _said):
        found = get(address + "/v1/tasks/kept")
        assert (found["head"], found["version"], found["examples"]) == (task["head"], 1, task["examples"])


@pytest.mark.slow
def test_a_wrong_setting_is_one_line_with_its_name(tmp_path: Path) -> None:
    assert "FEWSHOT_MAX_WAY" in refused(tmp_path, MAX_WAY="1")
    assert "FEWSHOT_DEVICE is cuda" in refused(tmp_path, DEVICE="cuda")
    assert "manifest.json cannot be read" in refused(tmp_path, ARTIFACT=str(tmp_path))


@pytest.mark.slow
def test_a_taken_port_is_one_line_that_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "is the port taken?" in refused(tmp_path, PORT=str(taken.getsockname()[1]))


@pytest.mark.slow
def test_a_folder_in_use_is_one_line_that_says_so(tmp_path: Path) -> None:
    with started(tmp_path):
        said = refused(tmp_path)
        assert "Another process uses the folder" in said
        assert "port" not in said


@pytest.mark.slow
def test_serving_needs_neither_torch_nor_training(tmp_path: Path) -> None:
    blocked = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['training'] = None;"
        "runpy.run_module('service', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", blocked],
        cwd=ROOT,
        env=command(tmp_path),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout
        address = next(re.search(r"http://[0-9.:]+", line) for line in process.stdout if "ready" in line)
        assert address
        assert get(address.group() + "/v1/artifact")["precision"] == "float32"
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
