"""What the computer brings: Python, packages, a clock, a port, room on the disk. Knows nothing of stores or secrets."""

from __future__ import annotations

import errno
import importlib
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.doctor.check import Check
from service.doctor.running import health

if TYPE_CHECKING:
    from service.settings import Settings

PROGRAM = Path(__file__).resolve().parents[1]
# What serving imports -> what it is called where packages come from.
PACKAGES = {
    "array_api_compat": "array-api-compat",
    "fastapi": "fastapi",
    "fastapi_offline": "fastapi-offline",
    "numpy": "numpy",
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "pydantic": "pydantic",
    "python_multipart": "python-multipart",
    "redis": "redis",
    "safetensors": "safetensors",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
}
LEAST_PYTHON = (3, 11)
LEAST_FREE, FEW_FREE = 100_000_000, 1_000_000_000  # bytes of a disk


def python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] < LEAST_PYTHON:
        return Check("python", "fail", version, "Install Python 3.11 or later.")
    return Check("python", "ok", version)


def packages(environment: Mapping[str, str]) -> Check:
    """Imports them: one that is there and broken is found as well."""
    # With an extractor on torch, as on a GPU, onnxruntime is not needed.
    extractor = "torch" if environment.get("FEWSHOT_DEVICE") in ("cuda", "torch-cpu") else "onnxruntime"
    bad: dict[str, str] = {}
    for module, name in {**PACKAGES, extractor: extractor}.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            bad[name] = "missing" if isinstance(error, ModuleNotFoundError) else f"broken: {error}"
    if bad:
        found = ", ".join(f"{name} ({why})" for name, why in bad.items())
        return Check("packages", "fail", found, "In the project's folder: pip install '.[serve]'")
    versions = (f"{name} {metadata.version(name)}" for name in ("fastapi", "numpy", extractor))
    return Check("packages", "ok", ", ".join(versions))


def clock() -> Check:
    """Keys and tasks that end, end by it."""
    newest = max(path.stat().st_mtime for path in PROGRAM.glob("*.py"))
    behind = newest - time.time()
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if behind > 3600:
        return Check("clock", "warn", f"{now}, which is before this program was installed", "Set the clock.")
    return Check("clock", "ok", now)


def port(settings: Settings) -> Check:
    """Free, or held by a service of ours."""
    from service.settings import spelled

    where = f"{spelled(settings.host)}:{settings.port}"
    if settings.port == 0:
        return Check("port", "ok", "any free one")
    try:
        for address in socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM):
            _listen(address)
    except socket.gaierror:
        return Check("port", "fail", f"{settings.host} is no address", "Correct FEWSHOT_HOST.")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if health(settings.address()) is not None:
                return Check("port", "ok", f"fewshot is running on {where}")
            found = f"{where} is taken by another program"
            return Check("port", "fail", found, "Choose another with FEWSHOT_PORT, or stop that program.")
        fix = (
            "Ports below 1024 need privileges: choose another."
            if error.errno == errno.EACCES
            else "Correct FEWSHOT_HOST."
        )
        return Check("port", "fail", f"{where}: {error.strerror}", fix)
    return Check("port", "ok", f"{where} is free")


def _listen(found: tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]) -> None:
    """For a moment, as the service does: on IPv6 alone where the address is one of it."""
    family, kind, proto, _, address = found
    with socket.socket(family, kind, proto) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)


def disk(settings: Settings) -> Check:
    place = nearest(settings.data_dir)
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free for {settings.data_dir}"
    if free < LEAST_FREE:
        return Check("disk", "fail", found, "Make room, or set FEWSHOT_DATA_DIR to another disk.")
    return Check("disk", "warn" if free < FEW_FREE else "ok", found, "Make room." if free < FEW_FREE else "")


def nearest(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    folder = folder.absolute() if not folder.exists() else folder
    while not folder.exists():
        folder = folder.parent
    return folder
