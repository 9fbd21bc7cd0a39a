"""A redis-server of our own for tests: on a free port, in a folder of its own, started, stopped and killed by its pid.

It keeps what it acknowledged (appendonly yes, appendfsync always), as the service asks for. Knows nothing of stores.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


def program() -> str:
    """The path of redis-server. Where there is none, the test is skipped, or fails if it was to be run."""
    found = shutil.which("redis-server")
    if found is None:
        if "redis" in os.environ.get("FEWSHOT_TEST_REQUIRE", "").split(","):
            pytest.fail("redis-server is not installed, and FEWSHOT_TEST_REQUIRE names redis")
        pytest.skip("redis-server is not installed")
    return found


class RedisServer:
    """Use it as a context manager: it is gone at the end, whatever state it is in."""

    def __init__(self, folder: Path, *options: str):
        self._command = [
            program(),
            *("--bind", "127.0.0.1", "--dir", str(folder), "--logfile", str(folder / "redis.log")),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always", *options),
        ]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Returns when it has loaded its data and answers."""
        self._process = subprocess.Popen([*self._command, "--port", str(self.port)])
        give_up = time.monotonic() + 10
        # "-NOAUTH ..." is an answer as well; "-LOADING ..." is not.
        while not self._ask("PING").startswith((b"+PONG", b"-NOAUTH")):
            assert self._process.poll() is None, "redis-server has ended; see redis.log"
            assert time.monotonic() < give_up, "redis-server does not answer"
            time.sleep(0.01)

    def _ask(self, command: str) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"{command}\r\n".encode())
                return connection.recv(4096)
        except OSError:
            return b""

    def hang(self) -> None:
        """It keeps its connections and takes new ones, but answers nothing."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a power button would; works on one that hangs, too."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
