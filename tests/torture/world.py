"""The world that faults happen in: services and their clients as processes and sockets of their own.

Redis is in tests/redis_server.py. Knows nothing of faults.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import audit
from tests.fakes import picture

ROOT = Path(__file__).resolve().parents[2]
CHARACTERS = ROOT / "models" / "pretrained" / "characters"  # small and fast: faults are about the rest
RAW = {"Content-Type": "image/png"}


def tool(name: str) -> str:
    """The path of a program that a fault needs; `make torture` and `make test` install it where they can."""
    found = shutil.which(name)
    if found is None:
        if "torture" in os.environ.get("FEWSHOT_TEST_REQUIRE", "").split(","):
            pytest.fail(f"{name} is not installed, and FEWSHOT_TEST_REQUIRE names torture")
        pytest.skip(f"{name} is not installed")
    return found


def support(seed: int, *, shots: int = 2, colours: Sequence[str] = ("red", "blue")) -> list[tuple[str, bytes]]:
    """A support set as multipart files; another seed gives other images."""
    return [(label, picture(label, seed=1000 * seed + k)) for label in colours for k in range(shots)]


class Service:
    """`python -m service` as a process; the port stays the same over restarts. Use as a context manager."""

    def __init__(self, folder: Path, *, wrapper: Sequence[str] = (), **settings: object):
        """`settings`: of the service, without prefix. `wrapper`: a command that the service is started by."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.wrapper = list(wrapper)
        self.settings: dict[str, object] = {"artifact": CHARACTERS, "data_dir": folder / "data", **settings}
        self.log = folder / "service.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, *, ready: bool = True, limit_s: float = 60) -> float:
        """Seconds until it is ready (`ready=False`: until it listens at all)."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
        settings = {f"FEWSHOT_{name.upper()}": str(value) for name, value in self.settings.items()}
        start = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, sys.executable, "-u", "-m", audit.program()],
                cwd=ROOT,
                env={**clean, **audit.passed_on(), "FEWSHOT_PORT": str(self.port), **settings},
                stdout=log,
                stderr=log,
            )
        while True:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < start + limit_s, "the service does not get ready"
            try:
                answer = httpx.get(self.url + ("/readyz" if ready else "/healthz"), timeout=2)
                if answer.status_code == 200:
                    return time.monotonic() - start
            except httpx.HTTPError:
                pass
            time.sleep(0.02)

    def kill(self) -> None:
        """As if the power went: SIGKILL."""
        self._end(signal.SIGKILL)

    def terminate(self, limit_s: float = 40) -> int:
        """As a supervisor asks it to end: SIGTERM. Its exit status."""
        return self._end(signal.SIGTERM, limit_s)

    def _end(self, number: int, limit_s: float = 40) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        status = self.process.wait(limit_s)
        self.process = None
        return status

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 30, **options})

    @property
    def rss(self) -> int:
        """Bytes of memory that it holds."""
        return 1024 * int(self._status("VmRSS").split()[0])

    @property
    def descriptors(self) -> int:
        assert self.process is not None
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def _status(self, name: str) -> str:
        assert self.process is not None
        found = re.search(rf"^{name}:\s+(.+)$", Path(f"/proc/{self.process.pid}/status").read_text(), re.M)
        assert found is not None
        return found[1]
