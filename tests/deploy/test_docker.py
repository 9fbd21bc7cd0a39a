"""docker-compose.yml for real: comes up with no decision to take, and loses nothing when its processes are killed.

Needs an engine and `docker compose` or `docker-compose`. FEWSHOT_TEST_COMPOSE_OVERRIDE may name one more compose file,
for machines where builds need something special. The tests run in the order they are written; each leaves the stack up.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from deploy import smoke
from tests.deploy import ROOT

pytestmark = pytest.mark.docker
KEPT = "kept"


def absent(reason: str) -> NoReturn:
    if "docker" in os.environ.get("FEWSHOT_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{reason}, and FEWSHOT_TEST_REQUIRE names docker")
    pytest.skip(reason)


def run(*command: str, limit_s: float = 60, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT, env=env)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def works(*command: str) -> bool:
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    return False


def until(true: Callable[[], bool], what: str, *, limit_s: float = 60) -> float:
    """Seconds that it took to become true."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < limit_s, f"not within {limit_s} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - start


class Stack:
    """A project of its own: other stacks on this engine are left alone."""

    def __init__(self, compose: tuple[str, ...], override: str | None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.project = f"fewshot-test-{os.getpid()}"
        files = ["docker-compose.yml", *([override] if override else [])]
        self._compose = (*compose, "-p", self.project, *(word for file in files for word in ("-f", file)))
        self._env = {**os.environ, "PORT": str(self.port)}

    def compose(self, *arguments: str, limit_s: float = 120) -> str:
        return run(*self._compose, *arguments, limit_s=limit_s, env=self._env)

    def container(self, service: str) -> str:
        label = "label=com.docker.compose"
        mine = ("--filter", f"{label}.project={self.project}", "--filter", f"{label}.service={service}")
        (found,) = run("docker", "ps", "-aq", "--no-trunc", *mine).split()
        return found

    def inspect(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("docker", "inspect", self.container(service)))[0]
        return found

    def inside(self, service: str, *command: str) -> str:
        return run("docker", "exec", self.container(service), *command)

    def python(self, code: str) -> str:
        return self.inside("service", "python", "-c", code).strip()

    def smoke(self, *arguments: str) -> str:
        return run(sys.executable, "deploy/smoke.py", self.url, "--wait", "60", *arguments, limit_s=120)

    def kill(self, service: str) -> float:
        """kill -9 of the program, as when memory runs out; seconds until the engine has started it again.

        Not `docker kill`, after which the engine believes that we want it dead.
        """
        before = self.inspect(service)
        pid = int(before["State"]["Pid"])
        if not os.access(f"/proc/{pid}", os.R_OK) or before["Id"] not in Path(f"/proc/{pid}/cgroup").read_text():
            absent("the processes of this engine are not on this machine")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(children[0]) if children else pid, signal.SIGKILL)

        def back() -> bool:
            now = json.loads(run("docker", "inspect", before["Id"]))[0]
            return bool(now["State"]["Running"]) and now["State"]["StartedAt"] != before["State"]["StartedAt"]

        return until(back, f"{service} is started again")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    compose = next((words for words in (("docker", "compose"), ("docker-compose",)) if works(*words, "version")), None)
    if compose is None or not works("docker", "info"):
        absent("there is no Docker engine with compose here")
    made = Stack(compose, os.environ.get("FEWSHOT_TEST_COMPOSE_OVERRIDE"))
    try:
        made.compose("build", limit_s=1800)
        start = time.monotonic()
        made.compose("up", "-d", limit_s=300)
        made.smoke("--keep", KEPT)
        report(fault="none", up_s=round(time.monotonic() - start, 2))
        yield made
        print(made.compose("logs", "--tail", "100"))  # shown when a test failed
    finally:
        made.compose("down", "-v", "--rmi", "local", "--timeout", "10")


def report(**what: Any) -> None:
    """One line for each fault; pytest -rP shows them."""
    print(json.dumps(what))


def test_the_task_is_kept_and_answers(stack: Stack) -> None:
    assert "8 of 8 right" in stack.smoke("--check", KEPT)


def test_every_combination_of_the_files_is_valid(stack: Stack) -> None:
    stack.compose("config", "-q")
    stack.compose("-f", "deploy/compose.gpu.yml", "config", "-q")


def test_redis_has_no_published_port_and_the_service_has_one_on_loopback(stack: Stack) -> None:
    redis, service = stack.inspect("redis"), stack.inspect("service")
    assert not redis["HostConfig"]["PortBindings"]
    assert not any(redis["NetworkSettings"]["Ports"].values())
    bound = [one for many in service["NetworkSettings"]["Ports"].values() for one in many or []]
    assert bound == [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]


@pytest.mark.parametrize(("name", "uid"), [("service", "10001"), ("redis", "999")])
def test_the_processes_have_no_rights(stack: Stack, name: str, uid: str) -> None:
    status = stack.inside(name, "cat", "/proc/1/status")
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in status.splitlines())}
    assert set(fields["Uid"]) == {uid}
    assert {fields[key][0].strip("0") for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
    assert fields["NoNewPrivs"] == ["1"]
    found = stack.inspect(name)["HostConfig"]
    assert found["ReadonlyRootfs"]
    assert found["Memory"] > 0
    assert found["PidsLimit"] > 0


def test_the_service_can_write_to_its_own_folder_and_its_scratch_folder_only(stack: Stack) -> None:
    code = (
        "import os, tempfile\n"
        "def can(folder):\n"
        "    try: tempfile.TemporaryFile(dir=folder).close()\n"
        "    except OSError: return False\n"
        "    return True\n"
        "print([d for d in ('/', '/app', '/data', '/secrets', '/venv', '/tmp', '/var/tmp', '/run') if can(d)])"
    )
    assert stack.python(code) == "['/data', '/tmp']"


def test_the_image_has_neither_pip_nor_torch_nor_a_compiler(stack: Stack) -> None:
    code = "import importlib.util as u, shutil; print(u.find_spec('pip'), u.find_spec('torch'), shutil.which('gcc'))"
    assert stack.python(code) == "None None None"


def test_secrets_reach_whom_they_are_for(stack: Stack) -> None:
    assert stack.python("import os; print(sorted(os.listdir('/secrets')))") == "['redis-password', 'store-key']"
    assert stack.inside("redis", "ls", "/rules").split() == ["users.acl"]
    password = stack.python("print(open('/secrets/redis-password').read().strip())")
    assert password not in "".join(json.dumps(stack.inspect(name)) for name in ("service", "redis", "secrets"))
    assert password not in stack.compose("logs")


def test_making_secrets_again_changes_none(stack: Stack) -> None:
    show = "import pathlib, zlib; print([zlib.crc32(f.read_bytes()) for f in pathlib.Path('/secrets').iterdir()])"
    before, started = stack.python(show), stack.inspect("secrets")["State"]["StartedAt"]
    stack.compose("up", "-d", "secrets")
    until(lambda: stack.inspect("secrets")["State"]["Status"] == "exited", "secrets has ended")
    state = stack.inspect("secrets")["State"]
    assert state["StartedAt"] != started
    assert state["ExitCode"] == 0
    assert stack.python(show) == before


def test_the_service_comes_back_after_kill_9(stack: Stack) -> None:
    start = time.monotonic()
    started_s = stack.kill("service")
    stack.smoke("--check", KEPT)  # from what Redis holds: the memory of the process is gone
    report(fault="kill -9 service", started_s=round(started_s, 2), answers_s=round(time.monotonic() - start, 2), lost=0)


def test_what_was_acknowledged_is_there_after_kill_9_of_redis(stack: Stack) -> None:
    service, acknowledged = smoke.Service(stack.url), list[str]()
    enough, refused, said = threading.Event(), threading.Event(), list[str]()

    def write() -> None:
        # The kill meets a write, which is refused and counts for nothing; so may a disk that is slow before it.
        while len(said) < 20 and not (enough.is_set() and said):
            try:
                smoke.learn(service, f"written-{len(acknowledged)}")
            except smoke.Failed as error:
                said.append(str(error))
                continue
            acknowledged.append(f"written-{len(acknowledged)}")
            if len(acknowledged) == 20:
                said.clear()
                enough.set()
        refused.set()

    threading.Thread(target=write, daemon=True).start()
    assert enough.wait(60), said
    start = time.monotonic()
    started_s = stack.kill("redis")
    assert refused.wait(30)
    stack.smoke("--check", KEPT)
    answers_s = time.monotonic() - start
    stack.kill("service")  # so that nothing is answered from its memory
    smoke.wait(service, 60)
    lost = []
    for task in [KEPT, *acknowledged]:
        try:
            smoke.classify(service, task)
            smoke.listed(service, task)
        except smoke.Failed as error:
            lost.append(str(error))
    report(
        fault="kill -9 redis",
        started_s=round(started_s, 2),
        answers_s=round(answers_s, 2),
        acknowledged=len(acknowledged),
        lost=len(lost),
    )
    assert lost == []


def test_a_restart_of_redis_loses_nothing(stack: Stack) -> None:
    start = time.monotonic()
    stack.compose("restart", "redis")
    stack.smoke("--check", KEPT)
    report(fault="restart redis", answers_s=round(time.monotonic() - start, 2), lost=0)


def test_containers_can_be_thrown_away(stack: Stack) -> None:
    start = time.monotonic()
    stack.compose("down")
    down_s = time.monotonic() - start
    stack.compose("up", "-d")
    stack.smoke("--check", KEPT)
    report(fault="down and up", down_s=round(down_s, 2), answers_s=round(time.monotonic() - start, 2), lost=0)


def test_the_image_reports_its_health(stack: Stack) -> None:
    until(lambda: stack.inspect("service")["State"]["Health"]["Status"] == "healthy", "the service is healthy")


def test_without_the_log_the_same_kill_loses_the_task(stack: Stack, tmp_path: Path) -> None:
    """The control: a Redis that keeps nothing must be noticed. Last, for it leaves an empty store."""
    command = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["redis"]["command"]
    command[command.index("--appendonly") + 1] = "no"
    (tmp_path / "control.yml").write_text(json.dumps({"services": {"redis": {"command": command}}}))
    stack.compose("-f", str(tmp_path / "control.yml"), "up", "-d", "redis")
    stack.kill("service")  # or it would find out that this is not the store that it wrote to
    stack.smoke("--keep", "control")
    stack.smoke("--check", "control")
    stack.kill("redis")
    stack.kill("service")  # the same again
    service = smoke.Service(stack.url)
    smoke.wait(service, 60)
    with pytest.raises(smoke.Failed, match=r"404|503"):
        smoke.classify(service, "control")
