"""Python, packages, clock, port and disk: what is wrong with them is found, and said with what to do."""

from __future__ import annotations

import shutil
import socket
import time
import tomllib
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest

from service.doctor import computer, running
from service.settings import Settings
from tests.service.doctor.findings import fine, taken, wrong
from tests.service.test_client import service


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def test_every_package_that_serving_imports_is_looked_for() -> None:
    root = Path(__file__).resolve().parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["serve"]
    names = {line.split(">")[0].split("[")[0] for line in needed}
    # The extractor's runtime is looked for by device; the command itself could not run without its own; onnx is
    # loaded by the first export only.
    assert names - {"onnxruntime", "onnx", "httpx", "rich", "typer"} == set(computer.PACKAGES.values())


@pytest.mark.slow
def test_a_port_is_free_taken_or_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ASK_S", 0.5)  # the other program takes the connection and says nothing
    with taken() as port:
        wrong(computer.port(Settings(port=port)), f"127.0.0.1:{port} is taken by another program")
    fine(computer.port(Settings(port=port)), "is free")
    wrong(computer.port(Settings(host="nowhere.invalid")), "is no address")
    wrong(computer.port(Settings(host="192.0.2.1")), "192.0.2.1")
    with service(tmp_path) as (url, _):
        fine(computer.port(Settings(port=int(url.rsplit(":", 1)[1]))), "fewshot is running")


@pytest.mark.slow
@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize("host", ["::", "::1"])
def test_a_port_of_ipv6_is_another_than_that_of_ipv4(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ASK_S", 0.5)
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        fine(computer.port(Settings(host=host, port=port)), f"[{host}]:{port} is free")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        wrong(computer.port(Settings(host="::1", port=port)), f"[::1]:{port} is taken by another program")


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    for free, status in ((5e9, "ok"), (5e8, "warn"), (5e7, "fail")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(1e10, 0, free))
        assert computer.disk(Settings()).status == status


def test_a_clock_that_is_behind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fine(computer.clock())
    monkeypatch.setattr(time, "time", lambda: 1e9)
    wrong(computer.clock(), "before this program was installed", status="warn")
