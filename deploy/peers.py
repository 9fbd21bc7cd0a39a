"""The service beside LitServe and MLServer: the same graph, the same decoder, one JPEG a request, one machine, one run.

    python deploy/peers.py

Each peer lives in a virtual environment of its own, which is made here (`--environments` says where; about 700 MB) and
found again the next time. Each is tuned first: of the settings below those count that answer most at 64 connections in
this very run. Then the floor (deploy/floor.py), the service and the peers are measured in turns, each alone on the
machine. Prints tables and, last, one JSON line. What the peers run is in deploy/peers/.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]

from floor import CORES, Floor, pictures  # noqa: E402
from load import WARM_S, Closed, run  # noqa: E402
from smoke import multipart  # noqa: E402

from models.artifact import Artifact  # noqa: E402

CONNECTIONS = (1, 8, 64)
OURS = ("numpy", "pillow", "safetensors", "array-api-compat", "onnxruntime")  # what models/ needs
Settings = dict[str, Any]


@dataclass(frozen=True)
class Server:
    name: str
    path: str
    kind: str  # Content-Type
    body: Callable[[bytes], bytes]
    ready: str
    command: Callable[[Path, Path, int, Settings], list[str]]  # python, folder, port, settings -> command
    requirements: tuple[str, ...] = ()
    tunings: tuple[Settings, ...] = ({},)


def _litserve(python: Path, folder: Path, port: int, settings: Settings) -> list[str]:
    return [str(python), str(ROOT / "deploy" / "peers" / "lit.py"), str(port), json.dumps(settings)]


def _mlserver(python: Path, folder: Path, port: int, settings: Settings) -> list[str]:
    server = {"http_port": port, "grpc_port": free_port(), "host": "127.0.0.1", "parallel_workers": settings["workers"]}
    # What costs and is not asked for is off.
    server |= {"debug": False, "gzip_enabled": False, "metrics_endpoint": None}
    model = {"name": "photos", "implementation": "mls.Model", "parameters": {"extra": {"threads": settings["threads"]}}}
    model |= {"max_batch_size": settings["batch"], "max_batch_time": 0.001 if settings["batch"] else 0.0}
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(python.parent / "mlserver"), "start", str(folder)]


def _service(python: Path, folder: Path, port: int, settings: Settings) -> list[str]:
    return [sys.executable, "-u", "-m", "service"]


def _open_inference(image: bytes) -> bytes:
    data = {"datatype": "BYTES", "shape": [1], "data": [base64.b64encode(image).decode()]}
    return json.dumps({"inputs": [{"name": "image", **data, "parameters": {"content_type": "base64"}}]}).encode()


def _as_it_is(image: bytes) -> bytes:
    return image


SERVICE = Server("this service", "/v1/tasks/peers/classify", "image/jpeg", _as_it_is, "/readyz", _service)
PEERS = (
    Server(
        "LitServe",
        "/predict",
        "application/octet-stream",
        _as_it_is,
        "/health",
        _litserve,
        ("litserve==0.2.17",),
        (
            {"workers": CORES, "servers": 1, "batch": 1, "fast": False},
            {"workers": CORES, "servers": 1, "batch": 8, "fast": False},
            {"workers": CORES, "servers": 1, "batch": 8, "fast": True},
            {"workers": CORES, "servers": 2, "batch": 8, "fast": True},
        ),
    ),
    Server(
        "MLServer",
        "/v2/models/photos/infer",
        "application/json",
        _open_inference,
        "/v2/models/photos/ready",
        _mlserver,
        # Its workers do not start with the event loop of a later uvloop.
        ("mlserver==1.7.1", "uvloop<0.22"),
        (
            {"workers": CORES, "threads": 0, "batch": 0},
            {"workers": CORES, "threads": 0, "batch": 8},
            {"workers": 0, "threads": CORES, "batch": 8},
            {"workers": 0, "threads": CORES, "batch": 16},
        ),
    ),
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def environment(server: Server, folder: Path) -> Path:
    """The Python of a virtual environment with what the server needs; made if it is not there yet."""
    if not server.requirements:
        return Path(sys.executable)
    home = folder / server.name.lower()
    python, done = home / "bin" / "python", home / "installed"
    wanted = " ".join((*server.requirements, *OURS))
    if not done.exists() or done.read_text() != wanted:
        print(f"Installing {server.requirements[0]} into {home} ...", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *server.requirements, *OURS]
        subprocess.run(command, check=True, stdout=sys.stderr)
        done.write_text(wanted)
    return python


def tree(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(path.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def cpu_s(pid: int) -> float:
    """What a process and its children took of the processors, the children that have ended included."""
    ticks = 0
    for one in tree(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Memory of all of them; what they share counts once (PSS)."""
    total = 0
    for one in tree(pid):
        with suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1e3


@contextmanager
def running(
    server: Server, python: Path, artifact: Path, precision: str, settings: Settings
) -> Iterator[tuple[str, int]]:
    """The address and the process id of a server that is ready."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("FEWSHOT_", "MLSERVER_"))}
    given |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    given |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'deploy' / 'peers'}"}
    for prefix in ("PEER", "FEWSHOT"):
        given |= {f"{prefix}_ARTIFACT": str(artifact.resolve()), f"{prefix}_PRECISION": precision}
    for _ in range(3):  # a port may be taken between asking for it and using it
        with tempfile.TemporaryDirectory() as name, (Path(name) / "log").open("w+") as log:
            port = free_port()
            process = subprocess.Popen(
                server.command(python, Path(name), port, settings),
                cwd=name,
                env={**given, "FEWSHOT_PORT": str(port), "FEWSHOT_DATA_DIR": f"{name}/data"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                address = f"http://127.0.0.1:{port}"
                if _waited(process, address + server.ready):
                    if server is SERVICE:
                        _teach(address + server.path.removesuffix("/classify"))
                    yield address, process.pid
                    return
                log.seek(0)
                said = log.read()[-3000:]
            finally:
                # All of its group, which is its own: not every peer ends its workers.
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                        os.killpg(process.pid, number)
                        process.wait(10)
    raise SystemExit(f"{server.name} does not start:\n{said}")


def _waited(process: subprocess.Popen[bytes], url: str, *, limit_s: float = 60) -> bool:
    """Whether it got ready."""
    give_up = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < give_up:
        if _ready(url):
            return True
        time.sleep(0.05)
    return False


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def _teach(url: str) -> None:
    body, kind = multipart([(f"class {n % 5}", image) for n, image in enumerate(pictures(25, seed=2))])
    request = urllib.request.Request(url, body, {"Content-Type": kind}, method="PUT")  # noqa: S310
    with urllib.request.urlopen(request, timeout=60):  # noqa: S310
        pass


def load(server: Server, address: str, pid: int, images: Sequence[bytes], *, connections: int, seconds: float) -> Any:
    requests = []
    for image in images:
        body = server.body(image)
        head = f"POST {server.path} HTTP/1.1\r\nHost: peer\r\nContent-Type: {server.kind}\r\n"
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def ask() -> dict[str, Any]:
        return await Closed(address, requests, seconds=seconds, deadline_s=60, connections=connections).measure()

    before = cpu_s(pid)
    found = run(ask())
    # The warm-up is in the CPU time too.
    found["cpu_ms"] = 1e3 * (cpu_s(pid) - before) * seconds / (seconds + WARM_S) / max(1, found["answers"])
    found["bad"] = sum(count for status, count in found["statuses"].items() if status != "200")
    return found


def tuned(server: Server, python: Path, given: argparse.Namespace, precision: str, images: list[bytes]) -> Settings:
    """Those of its settings that answer most at 64 connections."""
    if len(server.tunings) == 1:
        return server.tunings[0]
    found = []
    for settings in server.tunings:
        with running(server, python, given.artifact, precision, settings) as (address, pid):
            result = load(server, address, pid, images, connections=64, seconds=given.seconds)
        found.append(0 if result["bad"] else result["per_s"])
        print(
            f"| {server.name} | {json.dumps(settings)} | {result['per_s']:.0f} | {result['cpu_ms']:.2f} |", flush=True
        )
    return server.tunings[found.index(max(found))]


def compare(artifact: Artifact, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    images = pictures(64, seed=1)
    servers = (SERVICE, *(peer for peer in PEERS if peer.name.lower() in given.peers.lower().split(",")))
    pythons = {server.name: environment(server, given.environments) for server in servers}
    print(f"\n## {artifact.manifest.name}, {precision}\n\n| tuning | | images/s | CPU ms an image |\n|---|---|---|---|")
    settings = {server.name: tuned(server, pythons[server.name], given, precision, images) for server in servers}
    floor = Floor(artifact, precision, images)
    floor.throughput(1)
    floors, singles, memories = [], [], {}
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(given.rounds):
        for server in servers:
            floors.append(floor.throughput(given.seconds))
            singles.append(floor.single())
            chosen = settings[server.name]
            with running(server, pythons[server.name], given.artifact, precision, chosen) as (address, pid):
                for connections in CONNECTIONS:
                    found = load(server, address, pid, images, connections=connections, seconds=given.seconds)
                    # Beside the floor that was measured just before.
                    found["share"], found["cpu"] = found["per_s"] / floors[-1][0], found["cpu_ms"] / floors[-1][1] / 1e3
                    found["over_bare"] = found["p50_ms"] / singles[-1] if connections == 1 else None
                    rows.setdefault((server.name, connections), []).append(found)
                memories[server.name] = round(rss_mb(pid), 1)
    result = {"precision": precision, "settings": settings, "memory_mb": memories}
    result["floor_per_s"] = round(statistics.median(per_s for per_s, _ in floors), 1)
    result["floor_cpu_ms"] = round(1e3 * statistics.median(cpu for _, cpu in floors), 3)
    result["single_ms"] = round(statistics.median(singles), 3)
    result["rows"] = [_row(*key, windows) for key, windows in rows.items()]
    show(result)
    return result


def _row(name: str, connections: int, windows: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"server": name, "connections": connections}
    for figure in ("per_s", "share", "cpu", "p50_ms", "p99_ms", "over_bare"):
        values = [window[figure] for window in windows if window[figure] is not None]
        row[figure] = round(statistics.median(values), 3) if values else None
    row["bad"] = sum(window["bad"] for window in windows)
    return row


def show(result: dict[str, Any]) -> None:
    print(
        f"\nfloor {result['floor_per_s']:.0f} images/s, {result['floor_cpu_ms']:.2f} ms CPU an image, "
        f"{result['single_ms']:.2f} ms for one alone\n\n"
        "| | connections | images/s | of the floor | CPU of the floor's | p50 ms | p99 ms | not 200 |\n|---|"
        + 7
        * "---|"
    )
    for row in result["rows"]:
        cells = (row["server"], row["connections"], f"{row['per_s']:.0f}", f"{row['share']:.2f}", f"{row['cpu']:.2f} x")
        print("| " + " | ".join(map(str, (*cells, row["p50_ms"], row["p99_ms"], row["bad"]))) + " |")
    alone = [f"{row['server']} {row['over_bare']:.2f} x" for row in result["rows"] if row["over_bare"]]
    print("\np50 of one connection over bare decoding and extraction: " + ", ".join(alone))
    print("memory: " + ", ".join(f"{name} {size:.0f} MB" for name, size in result["memory_mb"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ROOT / "models" / "pretrained" / "photos")
    parser.add_argument("--precision", default="float32,int8")
    parser.add_argument("--peers", default="litserve,mlserver")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "fewshot-peers")
    given = parser.parse_args()
    artifact = Artifact.load(given.artifact)
    machine = f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}"
    print(f"{machine}; medians of {given.rounds} windows of {given.seconds:g} s, each beside the floor before it")
    results = [compare(artifact, precision, given) for precision in given.precision.split(",")]
    print("\n" + json.dumps({"machine": machine, "artifact": artifact.digest, "results": results}))


if __name__ == "__main__":
    main()
