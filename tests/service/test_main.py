"""`python -m service` as a person meets it: a process, its words, its end."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import pytest

from tests import audit

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = {name: (ROOT / "service" / "sample" / name / "1.png").read_bytes() for name in ("alpha", "theta")}


def command(folder: Path, **variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
    return {
        **clean,
        **audit.passed_on(),
        "FEWSHOT_DATA_DIR": str(folder),
        "FEWSHOT_PORT": "0",
        **{f"FEWSHOT_{name}": value for name, value in variables.items()},
    }


@contextmanager
def started(
    folder: Path, *, program: Sequence[str] = (), log: IO[str] | None = None, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A running service, its address, and what it said. `program`: what Python is to run, if not the service; `log`:
    where its log goes.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", *(program or ("-m", audit.program()))],
        cwd=ROOT,
        env=command(folder, **variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=log or subprocess.DEVNULL,
    )
    try:
        assert process.stdout
        said = ""
        for line in process.stdout:
            said += line
            if "curl" in line:
                break
        address = re.search(r"http://[0-9.:\[\]]+", said)
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


@pytest.mark.slow
def test_it_says_where_it_is_and_the_command_it_prints_works(tmp_path: Path) -> None:
    with started(tmp_path) as (process, address, said):
        assert get(address + "/readyz") == {"status": "ok", "lane": True, "store": True}
        line = next(line for line in said.splitlines() if "curl" in line)
        answer = json.loads(subprocess.run(line.split(), cwd=ROOT, capture_output=True, text=True, timeout=30).stdout)
        assert answer["predictions"][0]["label"] == "theta"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


COUNTS = """
import gc, signal, sys
from service.__main__ import main

signal.signal(signal.SIGUSR1, lambda *_: print(len(gc.get_objects()), flush=True))
sys.exit(main())
"""


@pytest.mark.slow
def test_what_the_start_made_is_not_gone_through_again_by_the_collector_while_others_wait(tmp_path: Path) -> None:
    with started(tmp_path, program=("-c", COUNTS)) as (process, address, _):
        assert get(address + "/readyz")["status"] == "ok"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout
        count = next(int(line) for line in process.stdout if line.strip().isdigit())
        assert count < 20_000  # of some 90,000, which take 25 to 40 ms


@pytest.mark.slow
def test_without_room_for_its_welcome_it_serves_all_the_same(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Path("/dev/full").open("w") as full, (tmp_path / "log").open("w+") as log:
        command_line = [sys.executable, "-m", audit.program()]
        environment = command(tmp_path, PORT=str(port))
        process = subprocess.Popen(command_line, cwd=ROOT, env=environment, stdout=full, stderr=log)
        try:
            give_up = time.monotonic() + 30
            while process.poll() is None and time.monotonic() < give_up:
                try:
                    assert get(f"http://127.0.0.1:{port}/readyz")["status"] == "ok"
                    break
                except OSError:
                    time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        assert "Traceback" not in log.read()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_run_takes_the_port_under_either_name() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.endswith("PORT") and "MAKE" not in name}
    for given, arguments, port in (({}, [], 8000), ({"FEWSHOT_PORT": "18150"}, [], 18150), ({}, ["PORT=8001"], 8001)):
        done = subprocess.run(
            ["make", "-n", "run", *arguments],
            cwd=ROOT,
            env={**clean, **given},
            text=True,
            capture_output=True,
            timeout=30,
        )
        assert f"FEWSHOT_PORT={port} exec" in done.stdout


@pytest.mark.slow
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
def test_asked_to_stop_it_says_so_answers_on_for_the_drain_time_and_ends(tmp_path: Path) -> None:
    with started(tmp_path, DRAIN_S="1.5") as (process, address, _), httpx.Client(base_url=address) as known:
        assert "connection" not in known.get("/healthz").headers
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        answer = known.get("/readyz")  # on a connection from before, as a proxy keeps them
        assert (answer.status_code, answer.json()["status"], answer.headers["connection"]) == (503, "stopping", "close")
        assert httpx.get(address + "/v2/health/ready").status_code == 503
        # Alive all the same: a supervisor must not take it for dead.
        assert httpx.get(address + "/healthz").status_code == httpx.get(address + "/v1/limits").status_code == 200
        assert process.wait(10) == 0


@pytest.mark.slow
def test_a_request_in_hand_is_answered_after_the_service_was_asked_to_stop(tmp_path: Path) -> None:
    body = (ROOT / "service" / "sample" / "alpha" / "1.png").read_bytes()
    with started(tmp_path) as (process, address, _):
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            head = (
                f"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            slow.sendall(head.encode() + body[:100])
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=1)
            slow.sendall(body[100:])
            assert slow.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        assert process.wait(10) == 0


@pytest.mark.slow
def test_asked_twice_to_stop_it_stops_at_once(tmp_path: Path) -> None:
    with started(tmp_path, DRAIN_S="60") as (process, _, _said):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - start < 1


@pytest.mark.slow
def test_asked_twice_to_stop_it_writes_the_last_lines_of_the_log(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log, started(tmp_path, log=log, DRAIN_S="60") as (process, address, _):
        process.send_signal(signal.SIGTERM)
        for _number in range(5):
            httpx.get(address + "/healthz")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        log.seek(0)
        assert log.read().count("/healthz") >= 4  # the line of the last may come after its answer, and the end before


@pytest.mark.slow
def test_a_forced_end_is_explained(tmp_path: Path) -> None:
    program = "from service import __main__, logs; logs.configure('info'); __main__.give_up()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=30)
    assert done.returncode == 1
    assert "Something does not end" in done.stderr


@pytest.mark.slow
def test_a_crash_below_python_leaves_a_trace(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log, started(tmp_path, log=log) as (process, _address, _said):
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        process.send_signal(signal.SIGSEGV)
        assert process.wait(10) == -signal.SIGSEGV
        log.seek(0)
        assert "Fatal Python error: Segmentation fault" in log.read()


@pytest.mark.slow
def test_a_key_that_is_no_text_is_one_line_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(range(256)))
    assert "is no text" in refused(tmp_path, STORE_KEY_FILE=str(tmp_path / "key"))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["::", "::1"])
def test_on_ipv6_it_says_an_address_that_answers(tmp_path: Path, host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("there is no IPv6 here")
    with started(tmp_path, HOST=host) as (_, address, said):
        assert address.startswith("http://[::1]:")
        line = next(line for line in said.splitlines() if "curl" in line)
        done = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert json.loads(done.stdout)["predictions"][0]["label"] == "theta"


@pytest.mark.slow
def test_connections_and_lost_lines_are_in_the_metrics_and_a_misplaced_variable_in_the_log(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log, started(tmp_path, log=log, URL="redis://x") as (_, address, _said):
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"nonsense\r\n\r\n")
            assert client.recv(10)
            text = httpx.get(address + "/metrics").text
        assert re.search(r"^fewshot_connections [12]\.0$", text, re.MULTILINE)
        assert 'fewshot_connections_ended_total{why="broke the protocol"} 1.0' in text
        assert "fewshot_log_lines_dropped_total 0.0" in text
        log.seek(0)
        assert "Is it FEWSHOT_REDIS_URL?" in log.read()


@pytest.mark.slow
def test_a_wrong_setting_is_one_line_with_its_name(tmp_path: Path) -> None:
    assert "FEWSHOT_MAX_WAY" in refused(tmp_path, MAX_WAY="1")
    assert "FEWSHOT_DEVICE is cuda" in refused(tmp_path, DEVICE="cuda")
    assert "manifest.json cannot be read" in refused(tmp_path, ARTIFACT=str(tmp_path))


@pytest.mark.slow
def test_the_last_line_of_a_start_that_failed_says_why(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("short")
    *before, last = refused(tmp_path, STORE_KEY_FILE=str(tmp_path / "key"), URL="redis://x").splitlines()
    assert last.startswith("fewshot cannot start: ")
    assert "at least 16 characters" in last
    assert before  # what the log had to say
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refused(tmp_path, PORT=str(taken.getsockname()[1])).splitlines()
    assert said[-1].startswith("fewshot cannot listen on ")


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
        assert get(address.group() + "/v1/artifact")["precision"] in ("float32", "int8")
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


BREAKS = """
import os, sys
from pathlib import Path
from models.extractor_onnx import OnnxExtractor
from service import __main__ as service

whole, service.BROKEN_S = OnnxExtractor.__call__, 2.0

def breaks(self, batch):
    if Path(os.environ["BROKEN"]).exists():
        raise RuntimeError("the device is gone")
    return whole(self, batch)

OnnxExtractor.__call__ = breaks
sys.exit(service.main())
"""


@pytest.mark.slow
def test_a_service_whose_extractor_is_lost_ends_to_be_started_again_and_one_that_recovers_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    monkeypatch.setenv("BROKEN", str(broken))
    with started(tmp_path, program=("-c", BREAKS)) as (process, address, _), httpx.Client(base_url=address) as http:
        files = [("a", SAMPLES["alpha"]), ("b", SAMPLES["theta"]), ("query", SAMPLES["alpha"])]

        def asks() -> list[int]:
            return [http.post("/v1/classify", files=files).status_code for _ in range(10)]

        assert asks() == [200] * 10
        broken.touch()
        assert set(asks()) == {500}
        assert http.get("/readyz").status_code == 503
        broken.unlink()
        assert asks() == [200] * 10
        time.sleep(2.5)
        assert http.get("/readyz").status_code == 200
        broken.touch()
        assert set(asks()) == {500}
        assert process.wait(20) == 1
