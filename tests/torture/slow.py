"""Clients that are slow, silent, many, or leave: what they cost those who are not.

The odd clients are raw sockets of this process, whose limit of open files is raised for them; the good ones are
deploy/load.py. Controls run the same service on uvicorn's own connections. Knows nothing of overload.
"""

from __future__ import annotations

import io
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.torture.line import Outcome, fault
from tests.torture.overload import load, p99, taught, unanswered
from tests.torture.world import RAW, Service, support

# The service as it is, but for its connections.
BARE = """
import sys
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from service.web import connections
connections.Door.protocol = lambda self: HttpToolsProtocol
from service.__main__ import main
sys.exit(main())
"""
LARGE = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n"  # more than a socket holds
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


def bare(folder: Path, **settings: object) -> Service:
    return Service(folder, wrapper=(sys.executable, "-c", BARE), **settings)


def few_files(files: int, program: str = "") -> Sequence[str]:
    """A wrapper under which the service may open so many files; with `program`, that runs in its place."""
    instead = f"exec {sys.executable} -c '{program}'" if program else 'exec "$@"'
    return ("sh", "-c", f"ulimit -n {files}; {instead}", "sh")


def many_files(files: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = files if hard == resource.RLIM_INFINITY else min(files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), hard))


def connected(service: Service, first: bytes = b"", *, window: int = 0) -> socket.socket:
    client = socket.socket()
    if window:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    client.settimeout(10)
    client.connect(("127.0.0.1", service.port))
    if first:
        client.sendall(first)
    return client


def held(service: Service) -> set[int]:
    """The ports of clients whose connections the service holds; the kernel may have more to say to others."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = f":{service.port:04X}"
    return {int(row[2].split(":")[1], 16) for row in rows if row[1].endswith(ours) and row[9] != "0"} - {0}


class Crowd:
    """Slow clients, each with a step of its own that it takes twice a second, until the service lets them go."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.inside: dict[socket.socket, tuple[str, int, Callable[[socket.socket], object]]] = {}
        self.lasted: dict[str, float] = {}  # the longest of each kind
        self.start = time.monotonic()

    def join(self, kind: str, client: socket.socket, step: Callable[[socket.socket], object]) -> None:
        client.setblocking(False)
        self.inside[client] = kind, client.getsockname()[1], step

    def live(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.inside and time.monotonic() < until:
            time.sleep(1 if len(self.inside) > 500 else 0.2)  # all of them at once would be another fault
            ports = held(self.service)
            for client, (kind, port, step) in list(self.inside.items()):
                if port in ports:
                    with suppress(OSError):
                        step(client)
                else:
                    self.lasted[kind] = round(time.monotonic() - self.start, 1)
                    client.close()
                    del self.inside[client]

    def kinds(self) -> dict[str, int]:
        return dict(Counter(kind for kind, _, _ in self.inside.values()))

    def leave(self) -> None:
        for client in self.inside:
            client.close()
        self.inside.clear()


def slow_crowd(service: Service, n: int) -> Crowd:
    """n clients of five kinds that keep the service waiting for ever."""
    crowd = Crowd(service)
    body = b"POST /v1/tasks/t/classify HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n"
    for number in range(n):
        match number % 5:
            case 0:
                crowd.join("silent", connected(service), lambda client: None)
            case 1:
                crowd.join("slow header", connected(service, HEALTH[:-2]), lambda client: client.send(b"X"))
            case 2:
                crowd.join("slow body", connected(service, body), lambda client: client.send(b"x"))
            case 3:
                crowd.join("no reader", connected(service, LARGE, window=4096), lambda client: None)
            case 4:
                client = connected(service, LARGE, window=4096)
                crowd.join("slow reader", client, lambda client: client.recv(1))
    return crowd


class Good(threading.Thread):
    """deploy/load.py beside what happens meanwhile."""

    def __init__(self, service: Service, folder: Path, seconds: float):
        super().__init__()
        self.found: dict[str, Any] = {}
        self._run = lambda: load(service, folder, connections=4, seconds=seconds)
        self.start()

    def run(self) -> None:
        self.found = self._run()

    def end(self) -> dict[str, Any]:
        self.join()
        assert self.found, "the load did not come to its end"
        return self.found


@fault("G15", n=2000, quick=50)
def slow_clients(n: int, seed: int, folder: Path) -> Outcome:
    """Clients that do not send, or do not take what they asked for, are let go, and good ones hardly notice them."""
    many_files(n + 200)
    # The short form waits less, by settings that anybody may give.
    short = {"header_timeout_s": 1, "body_timeout_s": 2, "answer_timeout_s": 2}
    settings, bound = ({}, 35) if n > 500 else (short, 15)
    wrong, missed = [], []
    with Service(folder / "bounded", max_connections=n + 100, **settings) as service:
        taught(service)
        before = load(service, folder, connections=4, seconds=10 if n > 500 else 1)
        crowd = slow_crowd(service, n)
        good = Good(service, folder, 20 if n > 500 else 2)
        crowd.live(bound + 5)
        found = good.end()
        left, lasted = crowd.kinds(), crowd.lasted
        crowd.leave()
    with bare(folder / "bare", **settings) as service:
        crowd = slow_crowd(service, min(n, 100))
        crowd.live(max(lasted.values(), default=bound) + 2)
        control = {"connections": "uvicorn's own", "clients": min(n, 100), "never_closed": crowd.kinds()}
        crowd.leave()
    if left:
        wrong.append(f"never closed: {left}")
    if max(lasted.values(), default=0) > bound:
        missed.append(f"closed after {max(lasted.values()):.0f} s")
    if len(control["never_closed"]) < 2:
        wrong.append("the control closed them as well")
    if p99(found) > 1.5 * p99(before):
        missed.append(f"p99 of good clients is {p99(found) / p99(before):.1f} of what it was")
    lost = unanswered(found) + found["statuses"].get("503", 0) + found["statuses"].get("late", 0)
    figures = {
        "closed_after_s": lasted,
        "good_p99_ms": {"before": p99(before), "beside": p99(found)},
        "good": found["statuses"],
    }
    return Outcome(sum(found["statuses"].values()), lost, control, figures, tuple(wrong), tuple(missed))


def silent(service: Service, count: int) -> tuple[list[socket.socket], int]:
    """So many connections that say nothing, and how many of them were refused."""
    clients, refused = [], 0
    for _ in range(count):
        try:
            clients.append(connected(service))
        except OSError:
            refused += 1
    time.sleep(1)
    for client in clients:
        client.setblocking(False)
        with suppress(BlockingIOError):
            try:
                refused += client.recv(100).startswith((b"HTTP/1.1 503", b""))
            except ConnectionResetError:
                refused += 1
    return clients, refused


def gone(clients: list[socket.socket]) -> None:
    for client in clients:
        client.close()


def served(service: Service, tries: int) -> int:
    """How many new clients get an answer, each within two seconds."""
    done = 0
    for _ in range(tries):
        with suppress(httpx.HTTPError):
            done += httpx.get(service.url + "/healthz", timeout=2).status_code == 200
    return done


@fault("G16", n=10_000, quick=300)
def idle_connections(n: int, seed: int, folder: Path) -> Outcome:
    """Ten thousand connections that are idle cost others nothing and the service little; they make room for others."""
    many_files(n + 1000)
    wrong, missed = [], []
    seconds = 5 if n > 1000 else 1
    with Service(folder / "bounded", max_connections=n + 50, header_timeout_s=600) as service:
        taught(service)
        before = load(service, folder, connections=20, seconds=seconds)
        memory = service.rss
        clients, refused = silent(service, n)
        if refused:
            wrong.append(f"{refused} connections that there is room for were refused")
        found = load(service, folder, connections=20, seconds=2 * seconds)
        grown = (service.rss - memory) / 1e6
        more, refused = silent(service, 300)
        beyond = load(service, folder, connections=20, seconds=0.5)
        gone(clients + more)
        time.sleep(2)
        after = load(service, folder, connections=20, seconds=0.5)
    most = min(2048, n // 4)  # as it ships, or with fewer idle ones in proportion
    with Service(folder / "few", max_connections=most) as service:
        taught(service)
        alone = load(service, folder, connections=20, seconds=seconds)
        clients, turned_away = silent(service, n)
        full = load(service, folder, connections=20, seconds=seconds)
        came = served(service, 50)
        gone(clients)
    with Service(folder / "unbounded", wrapper=few_files(150, BARE)) as service:
        taught(service)
        held, _ = silent(service, 300)
        control = {"bound": "none, 150 files", "held": len(held), "tried": 3, "served": served(service, 3)}
        gone(held)
    if refused:
        wrong.append(f"{refused} of 300 that came to a full house of silent connections were refused")
    for name, one in (("in a full house", beyond), ("afterwards", after), (f"with room for {most}", full)):
        if set(one["statuses"]) != {"200"}:
            wrong.append(f"{name}: {one['statuses']}")
    if came < 50:
        wrong.append(f"with room for {most}, {50 - came} of 50 that came anew were not served")
    if grown > 300:
        missed.append(f"memory grew by {grown:.0f} MB")
    for one, other in ((found, before), (full, alone)):
        if p99(one) > 1.5 * p99(other):
            missed.append(f"p99 of good clients is {p99(one) / p99(other):.1f} of what it was")
    if control["served"]:
        wrong.append("the control served new clients as well")
    figures = {
        "memory_mb": round(grown, 1),
        "p99_ms": {"before": p99(before), "beside": p99(found)},
        "good": found["statuses"],
        "in_a_full_house": beyond["statuses"],
        "as_it_ships": {
            "max_connections": most,
            "turned_away": turned_away,
            "p99_ms": {"before": p99(alone), "beside": p99(full)},
            "good": full["statuses"],
            "new_clients": 50,
            "served": came,
        },
    }
    asked = [sum(one["statuses"].values()) for one in (found, full)]
    answers = [one["statuses"].get("200", 0) for one in (found, full)]
    return Outcome(sum(answers), sum(asked) - sum(answers), control, figures, tuple(wrong), tuple(missed))


@fault("P10", n=20, quick=2)
def descriptors_exhausted(n: int, seed: int, folder: Path) -> Outcome:
    """With few files to open, those inside are served, others refused, and all is well when there is room again."""
    wrong: list[str] = []
    asked = lost = 0
    with Service(folder / "bounded", wrapper=few_files(120)) as service:
        taught(service)
        files = service.descriptors
        for turn in range(n):
            with service.client() as client:
                client.get("/healthz").raise_for_status()  # it is inside, before they come
                clients, refused = silent(service, 150)
                if not 50 < refused < 150:
                    wrong.append(f"{refused} of 150 were refused")
                for number in range(5):  # learning opens files of the store
                    asked += 2
                    learned = client.put(f"/v1/tasks/n{turn}-{number}", files=support(number))
                    answer = client.post("/v1/tasks/t/classify", content=support(9)[0][1], headers=RAW)
                    lost += (learned.status_code != 201) + (answer.status_code != 200)
                gone(clients)
            time.sleep(0.5)
            asked += 5
            lost += 5 - served(service, 5)
        more = service.descriptors - files
        if more > 5:
            wrong.append(f"{more} descriptors are left open")
    with Service(folder / "unbounded", wrapper=few_files(120, BARE)) as service:
        clients, refused = silent(service, 150)
        control = {"bound": "none", "held": len(clients), "told": refused, "tried": 3, "served": served(service, 3)}
        gone(clients)
    if control["served"]:
        wrong.append("the control served new clients as well")
    return Outcome(asked, lost, control, {"turns": n, "descriptors_more": more}, tuple(wrong))


def upload(name: str, seed: int) -> bytes:
    """A request that teaches a task from four images, byte for byte."""
    request = httpx.Request("PUT", f"http://a/v1/tasks/{name}", files=support(seed))
    body = request.read()
    headers = b"".join(key + b": " + value + b"\r\n" for key, value in request.headers.raw)
    return f"PUT /v1/tasks/{name} HTTP/1.1\r\n".encode() + headers + b"\r\n" + body


@fault("N1", n=5000, quick=110)
def leaving_clients(n: int, seed: int, folder: Path) -> Outcome:
    """Who hangs up in the middle of an upload leaves nothing behind, who does so after it a whole task or none."""
    wrong: list[str] = []
    acknowledged: list[str] = []
    whole = Counter[str]()
    with Service(folder / "service") as service, service.client() as client:
        taught(service)
        memory, files = 0, service.descriptors
        for number in range(n):
            if number == n // 5:  # by then all is loaded and every cache has something in it
                memory = service.rss
            name, tenths = f"n{number}", number % 11
            request = upload(name, number)
            with socket.create_connection(("127.0.0.1", service.port)) as leaver:
                leaver.sendall(request[: len(request) * tenths // 10] if tenths < 10 else request)
                if number % 22 == 10:
                    leaver.settimeout(30)
                    if leaver.recv(100).startswith(b"HTTP/1.1 201"):
                        acknowledged.append(name)
        time.sleep(1)
        lost = 0
        for number in range(n):
            name, tenths = f"n{number}", number % 11
            answer = client.get(f"/v1/tasks/{name}")
            if answer.status_code == 404:
                lost += name in acknowledged
                whole["absent"] += 1
            elif tenths < 10:
                wrong.append(f"{name} was learned from {tenths} tenths of its upload")
            elif len(answer.json()["examples"]) != 4:
                wrong.append(f"{name} has {len(answer.json()['examples'])} of 4 examples")
            else:
                asked = client.post(f"/v1/tasks/{name}/classify", content=support(number)[0][1], headers=RAW)
                whole["whole"] += asked.status_code == 200
        grown, more = (service.rss - memory) / 1e6, service.descriptors - files
        skipped = next(
            (
                line.split()[1]
                for line in client.get("/metrics").text.splitlines()
                if line.startswith("fewshot_abandoned_images_total")
            ),
            "0",
        )
        held = []
        for number in range(50):
            request = upload(f"h{number}", number)
            held.append(connected(service, request[: len(request) // 2]))
        time.sleep(0.5)
        control = {"did": "stayed", "clients": 50, "descriptors": service.descriptors - files}
        gone(held)
    if control["descriptors"] < 45:
        wrong.append("the control shows nothing: clients that stay hold no descriptors")
    if more > 5:
        wrong.append(f"{more} descriptors are left open")
    missed = [f"memory grew by {grown:.0f} MB"] if grown > 30 else []
    figures = {
        "cut": sum(k % 11 < 10 for k in range(n)),
        "left_after_it": sum(k % 11 == 10 for k in range(n)),
        "whole": whole["whole"],
        "absent": whole["absent"],
        "memory_mb": round(grown, 1),
        "descriptors_more": more,
        "images_skipped": float(skipped),
    }
    return Outcome(len(acknowledged), lost, control, figures, tuple(wrong), tuple(missed))


def large_image() -> bytes:
    """A PNG of 16.7 million pixels, just within MAX_PIXELS. Unlike a JPEG, it cannot be decoded at a smaller size."""
    rows = np.linspace(0, 255, 4090, dtype=np.uint8)
    image = np.stack([np.broadcast_to(rows, (4090, 4090)), np.broadcast_to(rows[:, None], (4090, 4090))], axis=-1)
    out = io.BytesIO()
    Image.fromarray(np.concatenate([image, image[:, :, :1]], axis=-1)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def percentiles(found: dict[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in ("p50_ms", "p95_ms", "p99_ms")}


class Big(threading.Thread):
    """Asks about a large image twice a second, or as often as it is answered, until told to stop."""

    def __init__(self, service: Service, image: bytes):
        super().__init__()
        self.stop = threading.Event()
        self.statuses: Counter[int] = Counter()
        self._service, self._image = service, image
        self.start()

    def run(self) -> None:
        with self._service.client() as client:
            while not self.stop.wait(0.5):
                answer = client.post("/v1/tasks/t/classify", content=self._image, headers=RAW)
                self.statuses[answer.status_code] += 1


@fault("N10", n=20, quick=2)
def big_beside_small(n: int, seed: int, folder: Path) -> Outcome:
    """Images of sixteen million pixels do not keep small ones waiting.

    n: seconds. Small ones come when they come, so that each that has to wait counts. In the control there is one lane.
    """
    image = large_image()
    ratios: dict[int, dict[str, float]] = {}
    figures: dict[str, Any] = {"large_bytes": len(image)}
    asked = lost = 0
    for lanes in (2, 1):
        with Service(folder / f"lanes-{lanes}", lanes=lanes) as service:
            taught(service)
            alone = load(service, folder, rate=100, seconds=n)
            big = Big(service, image)
            beside = load(service, folder, rate=100, seconds=n)
            big.stop.set()
            big.join()
        ratios[lanes] = {name: round(beside[name] / alone[name], 2) for name in ("p95_ms", "p99_ms")}
        figures[f"lanes_{lanes}"] = {"alone": percentiles(alone), "beside": percentiles(beside)}
        if lanes == 2:
            asked = sum(beside["statuses"].values()) + big.statuses.total()
            lost = asked - beside["statuses"].get("200", 0) - big.statuses[200]
            figures["large_answered"] = big.statuses[200]
    longer = ratios[2]["p99_ms"]
    missed = (f"p99 of small ones is {longer} of what it was",) if longer > 2 else ()
    waited = ratios[1]["p95_ms"] > 2 or figures["lanes_1"]["beside"]["p95_ms"] > 100
    wrong = () if waited else ("the control kept them waiting no longer",)
    return Outcome(asked, lost, {"lanes": 1, "ratios": ratios[1]}, {**figures, "ratios": ratios[2]}, wrong, missed)
