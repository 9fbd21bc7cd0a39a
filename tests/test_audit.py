"""The watch over serving (tests/audit.py) sees what it is there for: a service does each thing, and it is noticed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests import audit
from tests.fakes import picture
from tests.redis_server import RedisServer
from tests.service.test_main import started

# What is planted in the handler of /metrics, one for each request, and the event that tells of it. `here` is the folder
# of the test, of which the service may use the part `data`; at `port` somebody listens whom it does not know.
PLANTS = {
    "pickle.loads(pickle.dumps(Fraction(1, 2)))": "pickle.find_class",
    "pickle.loads(b'N.')": "fewshot.unpickle",
    "pickle.Unpickler(io.BytesIO(b'N.')).load()": "fewshot.unpickle",
    "marshal.loads(marshal.dumps(1))": "marshal.loads",
    "eval('1 + 1')": "exec",
    "exec('x = 1')": "exec",
    "compile('1', 'x', 'eval')": "compile",
    "ctypes.CDLL(None)": "ctypes.dlopen",
    "subprocess.run(['true'])": "subprocess.Popen",
    "os.system('true')": "os.system",
    "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)": "os.posix_spawn",
    "socket.create_connection(('127.0.0.1', port))": "socket.connect",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))": "socket.sendto",
    "socket.getaddrinfo('elsewhere.invalid', 80)": "socket.getaddrinfo",
    "socket.create_server(('127.0.0.1', 0))": "socket.bind",
    "keep(asyncio.get_running_loop().create_connection(asyncio.Protocol, '127.0.0.1', port))": "socket.connect",
    "keep(asyncio.get_running_loop().getaddrinfo('127.0.0.2', 80))": "socket.getaddrinfo",
    "keep(asyncio.create_subprocess_exec('true'))": "subprocess.Popen",
    "open(f'{here}/elsewhere', 'w')": "open",
    "open(f'{here}/data/../elsewhere', 'ab')": "open",
    "os.open(f'{here}/elsewhere', os.O_WRONLY | os.O_CREAT)": "open",
    "os.mkdir(f'{here}/folder')": "os.mkdir",
    "os.rename(f'{here}/folder', f'{here}/data/folder')": "os.rename",
    "sqlite3.connect(f'{here}/elsewhere.db')": "sqlite3.connect",
    "tempfile.TemporaryFile()": "open",
    "thread(lambda: open(f'{here}/elsewhere', 'w'))": "open",
}
ALLOWED = [
    "open(f'{here}/data/mine', 'w')",
    "open(f'{here}/elsewhere')",
    "__import__('colorsys')",
    "__import__('ast').parse('1 + 1')",
]

PLANTED = """
import asyncio, ctypes, io, marshal, os, pickle, socket, sqlite3, subprocess, tempfile, threading
from fractions import Fraction
from tests import audit
from service.metrics import Metrics

here, port = {here!r}, {port}
right, tasks = Metrics.exposition, set()

def keep(coroutine):
    tasks.add(asyncio.ensure_future(coroutine))

def thread(call):
    started = threading.Thread(target=call)
    started.start()
    started.join()

plants = iter([{plants}])

def exposition(self):
    try:
        next(plants, lambda: None)()
    except Exception:
        pass  # as a handler that survives everything would
    return right(self)

Metrics.exposition = exposition
audit.main()
"""


def events(file: Path) -> list[str]:
    return [line["event"] for line in map(json.loads, file.read_text().splitlines()) if "event" in line]


def noticed(folder: Path, plants: list[str]) -> list[list[str]]:
    """The events of a service that does each of these in turn."""
    file, found, before = folder / "audit", [], 0
    with socket.create_server(("127.0.0.1", 0)) as other:
        script = PLANTED.format(
            here=str(folder), port=other.getsockname()[1], plants=", ".join(f"lambda: {plant}" for plant in plants)
        )
        with started(folder / "data", program=["-c", script], TEST_AUDIT=str(file)) as (_, address, _said):
            for _ in plants:
                assert httpx.get(address + "/metrics", timeout=30).status_code == 200
                assert httpx.get(address + "/healthz", timeout=30).status_code == 200  # what was left to the loop
                found.append(events(file)[before:])
                before += len(found[-1])
    return found


@pytest.mark.slow
def test_each_forbidden_thing_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    found = noticed(tmp_path, list(PLANTS))
    missed = {plant: seen for (plant, event), seen in zip(PLANTS.items(), found, strict=True) if event not in seen}
    assert missed == {}


@pytest.mark.slow
def test_what_is_close_by_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").write_text("")
    assert noticed(tmp_path, ALLOWED) == [[] for _ in ALLOWED]


@pytest.mark.redis
@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_a_service_at_work_does_none_of_it(store: str, tmp_path: Path) -> None:
    """Its store is another process that it has to reach, or a folder that it has to write to."""
    (tmp_path / "redis").mkdir()
    with RedisServer(tmp_path / "redis") as redis:
        file = tmp_path / "audit"
        more = {"REDIS_URL": redis.url} if store == "redis" else {}
        with started(tmp_path / "data", TEST_AUDIT=str(file), **more) as (process, address, _):
            at_work(address)
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0
    assert events(file) == []
    watching = [json.loads(line)["watching"] for line in file.read_text().splitlines()]
    assert watching == ["tests.audit.Loop"]  # uvloop's, as it is served


def at_work(address: str) -> None:
    images = [(label, picture(label, seed=k)) for label in ("red", "blue") for k in range(3)]
    with httpx.Client(base_url=address, timeout=60) as http:
        assert http.put("/v1/tasks/watched?retain=images", files=images).status_code == 201
        for content, status in ((picture("red", seed=9), 200), (b"<svg/>", 422), (b"\x80\x04N.", 422)):
            answer = http.post("/v1/tasks/watched/classify", content=content, headers={"Content-Type": "image/png"})
            assert answer.status_code == status, answer.text
        large = [("i", picture("red", seed=k, size=(500, 500))) for k in range(12)]  # more than forms keep in memory
        assert http.post("/v1/tasks/watched/classify", files=large).status_code == 200
        assert http.post("/v1/classify", files=[*images, ("query", picture("red"))]).status_code == 200
        # What looks like an address is a label, and nobody goes there.
        odd = [(f"http://127.0.0.1:9/{k}", image) for k, (_, image) in enumerate(images)]
        assert http.put("/v1/tasks/odd", files=odd, headers={"Host": "elsewhere.test"}).status_code == 201
        for path in ("/docs", "/metrics", "/v1/tasks", "/v1/tasks/watched/export", "/nothing", "/readyz", "/"):
            assert http.get(path).status_code < 500, path
        assert http.delete("/v1/tasks/watched").status_code == 204


FAILING = """
import threading

from service.metrics import Metrics


def test_that_passes():
    right = Metrics.exposition
    thread = threading.Thread(target=planted)
    thread.start()
    thread.join()


namespace = {{"__name__": "planted"}}
exec(compile("def planted(): eval('1 + 1')", {file!r}, "exec"), namespace)
planted = namespace["planted"]
"""


@pytest.mark.slow
def test_an_event_fails_a_run_whose_tests_all_pass(tmp_path: Path) -> None:
    """A file of the service, as far as the interpreter can tell, does it in a thread of the tests' process."""
    root = audit.ROOT
    for where, status, said in ((root / "service" / "planted.py", 1, "1 passed"), (tmp_path / "x.py", 0, "1 passed")):
        test = tmp_path / "test_planted.py"
        test.write_text(FAILING.format(file=str(where)))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", str(test)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, env={**os.environ})
        assert (done.returncode, said in done.stdout) == (status, True), done.stdout + done.stderr
        assert Counter(line.split(" watched, ")[1] for line in done.stdout.splitlines() if " watched, " in line) == (
            {"2 events not allowed": 1} if status else {}
        )


@pytest.mark.slow
def test_a_first_run_that_writes_compiled_modules_passes(tmp_path: Path) -> None:
    """A service that shares the process of the tests imports some modules late, and pytest writes down what it made of
    them: with an empty cache, as in a new environment, that is no event."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    test = "tests/service/web/test_export.py::test_the_runtime_for_browsers_is_served_where_it_was_fetched"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", "", test]
    done = subprocess.run(command, cwd=audit.ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout + done.stderr
    assert list(tmp_path.rglob("_fileio*pytest*.pyc")), "nothing was written"
