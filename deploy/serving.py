"""A service of its own process for deploy/bench.py, with all features on, and how it is asked: alone or under load.

It has keys, metrics, rejection, logs and deadlines as it ships; only the bounds on the size of a support set are
raised, and the key that is used may do everything. Knows nothing of the floor.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]

from load import WARM_S  # noqa: E402
from smoke import multipart  # noqa: E402

from service.keys import create  # noqa: E402

TENANT = "bench"
IDLE_S = 20  # after which the service may have closed a connection
LARGEST = {"MAX_EXAMPLES": 4_000, "MAX_BODY_BYTES": 200_000_000}  # for a support set of a thousand


class Service:
    """Started with its data in `folder`, which may hold tasks of an earlier one. `program`: what Python is to run."""

    def __init__(
        self,
        artifact: Path,
        precision: str,
        folder: Path,
        *,
        settings: Mapping[str, object] | None = None,
        program: Sequence[str] = ("-m", "service"),
    ):
        keys = folder / "keys"
        if not keys.exists():
            _, made = create(keys, tenant=TENANT, scopes=("adapt", "classify", "admin"))
            (folder / "key").write_text(made)
        self.key = (folder / "key").read_text()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
        given = {
            "PORT": 0,
            "ARTIFACT": artifact,
            "PRECISION": precision,
            "DATA_DIR": folder / "data",
            "KEYS_FILE": keys,
        }
        environment |= {
            f"FEWSHOT_{name}": str(value) for name, value in (given | LARGEST | dict(settings or {})).items()
        }
        self.started = time.perf_counter()
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-u", *program],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout
        for line in self.process.stdout:
            if "ready at" in line:
                self.url = line.split()[4]
                break
        else:
            self.log.seek(0)
            raise SystemExit(self.log.read())
        self.ready_s = time.perf_counter() - self.started
        self.connection = Connection(self.url, self.key)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:  # what is measured next needs the machine
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self.log.close()

    def adapt(
        self, task: str, images: Sequence[bytes], way: int, *, method: str = "PUT", path: str = "", brief: bool = False
    ) -> float:
        """Milliseconds to learn `way` classes from images dealt among them; `brief`: until that is sure to be done."""
        body, kind = multipart([(f"class {index % way}", image) for index, image in enumerate(images)])
        return self.connection.ask(method, f"/v1/tasks/{task}{path}", body, kind, brief=brief)

    def classify(self, task: str, image: bytes) -> float:
        """Milliseconds to ask about one image."""
        return self.connection.ask("POST", f"/v1/tasks/{task}/classify", image, "image/jpeg")

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MiB that it has in memory now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    def load(self, files: Sequence[str], seconds: float, *, tasks: str = "bench", **options: object) -> dict[str, Any]:
        """What deploy/load.py found, a process of its own; `cpu_ms` is the service's CPU for an answer."""
        command = [sys.executable, str(ROOT / "deploy" / "load.py"), self.url, *files, "--tasks", tasks]
        command += ["--seconds", str(seconds)]
        command += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        before = self.cpu()
        environment = {**os.environ, "FEWSHOT_KEY": self.key}
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        found: dict[str, Any] = json.loads(out)
        if not found["answers"]:
            raise SystemExit(f"Nothing was answered in {seconds:g} s: make the windows longer.")
        # The warm-up is in the CPU time too.
        found["cpu_ms"] = 1e3 * (self.cpu() - before) * seconds / (seconds + WARM_S) / found["answers"]
        found["bad"] = sum(count for status, count in found["statuses"].items() if status != "200")
        return found


class Connection:
    """One connection, one request at a time, with as little around it as possible."""

    def __init__(self, url: str, key: str):
        parts = urlsplit(url)
        self.address = parts.hostname, parts.port
        self.key = key
        self.socket: socket.socket | None = None
        self.used = 0.0

    def close(self) -> None:
        if self.socket:
            self.socket.close()
            self.socket = None

    def ask(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/octet-stream", *, brief: bool = False
    ) -> float:
        """Milliseconds until the answer is there. Raises AssertionError unless it is a good one."""
        if time.monotonic() - self.used > IDLE_S:
            self.close()
        if self.socket is None:
            self.socket = socket.create_connection(self.address, timeout=120)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: service\r\nAuthorization: Bearer {self.key}\r\nContent-Type: {kind}\r\n"
        )
        head += "Prefer: return=minimal\r\n" * brief
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        start = time.perf_counter()
        self.socket.sendall(request)
        answer = bytearray()
        while not _whole(answer):
            received = self.socket.recv(1 << 20)
            assert received, "the service hung up"
            answer += received
        spent = time.perf_counter() - start
        self.used = time.monotonic()
        assert answer[9:10] == b"2", answer[:2000].decode(errors="replace")
        return 1e3 * spent


def _whole(answer: bytearray) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    return bool(found) and len(body) >= int(head.lower().partition(b"content-length:")[2].split(b"\r", 1)[0])
