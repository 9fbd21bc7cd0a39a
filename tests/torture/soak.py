"""What only time shows: memory that grows, descriptors that stay open, a loop that is held up, an outage at peak."""

from __future__ import annotations

import io
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.redis_server import RedisServer
from tests.torture._traffic import Load, Warm, raw
from tests.torture.line import Outcome, fault
from tests.torture.replicas import patched, together
from tests.torture.world import RAW, ROOT, Service, support

TASKS = 200  # names that come and go

# Bodies that are never let go of.
LEAK = """
from service.web.boundary import Boundary
serve, kept = Boundary.__call__, []
async def leaking(self, scope, receive, send):
    async def keeping():
        message = await receive()
        kept.append(bytes(bytearray(message.get("body", b""))))
        return message
    await serve(self, scope, keeping, send)
Boundary.__call__ = leaking
"""


def noise(seed: int, edge: int = 256) -> bytes:
    """An image that no compression makes small: about 200 kB."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (edge, edge, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


class Crowd(threading.Thread):
    """Clients of the worse kind until told to stop: they break off anywhere, teach and forget, are killed at work."""

    def __init__(self, service: Service, seed: int):
        super().__init__(daemon=True)
        self.service = service
        self.random = random.Random(seed)
        self.stop = threading.Event()
        self.did: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.broken_off = raw("POST", "/v1/tasks/warm0/classify", content=noise(1), headers=RAW)
        (service.folder / "image.png").write_bytes(noise(2))

    def run(self) -> None:
        with self.service.client() as http:
            turn = 0
            while not self.stop.wait(0.02):
                turn += 1
                self.breaks_off()
                task = f"/v1/tasks/churn{self.random.randrange(TASKS)}"
                if self.random.random() < 0.5:
                    self.note("taught", http.put(task, files=support(turn % 1000)).status_code, {200, 201})
                else:
                    self.note("forgot", http.delete(task).status_code, {204, 404})
                if turn % 200 == 100:
                    self.is_killed()

    def note(self, what: str, status: int, good: set[int]) -> None:
        self.did[what] += 1
        if status not in good:
            self.failed[f"{what} {status}"] += 1

    def breaks_off(self) -> None:
        """A reset after some bytes of a request, or after all of them."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.service.port), timeout=5) as client:
            client.sendall(self.broken_off[: self.random.randrange(len(self.broken_off) + 1)])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.did["broken off"] += 1

    def is_killed(self) -> None:
        command = ("deploy/load.py", self.service.url, "warm0", str(self.service.folder / "image.png"))
        client = subprocess.Popen(
            [sys.executable, *command, "--connections", "8", "--seconds", "60"], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        self.stop.wait(self.random.uniform(0.5, 2))
        client.send_signal(signal.SIGKILL)
        client.wait()
        self.did["killed"] += 1


def soaked(service: Service, seconds: float, seed: int) -> dict[str, Any]:
    """What became of a service under such a crowd: memory, descriptors and threads over time, and who was failed."""
    with service.client() as http:
        warm = Warm(http)
    quiet = service.descriptors
    pictures = [raw("POST", "/v1/embed", content=noise(k), headers=RAW) for k in range(8)]

    def ask(number: int) -> Any:
        if number % 2:
            return warm.question(number)
        return pictures[number // 2 % 8], lambda status, _: "" if status == 200 else f"embed {status}"

    crowd, samples = Crowd(service, seed), []
    with Load([service.port], ask, connections=4, rate=80) as load:
        crowd.start()
        begin, every = time.monotonic(), min(5.0, seconds / 60)
        while (at := time.monotonic() - begin) < seconds:
            if at > seconds / 6:  # until then caches fill
                samples.append((at, service.rss, service.descriptors, int(service._status("Threads"))))
            time.sleep(every)
        crowd.stop.set()
        crowd.join(30)
    give_up = time.monotonic() + 5
    while service.descriptors > quiet and time.monotonic() < give_up:
        time.sleep(0.05)
    at, rss, descriptors, threads = zip(*samples, strict=True)
    slope = statistics.linear_regression(at, rss).slope / statistics.mean(rss)
    return {
        "slope_percent_an_hour": round(100 * 3600 * slope, 2),
        "grown_percent": round(100 * slope * (at[-1] - at[0]), 2),
        "rss_mb": [round(rss[0] / 1e6, 1), round(rss[-1] / 1e6, 1)],
        "descriptors": {"quiet": quiet, "most": max(descriptors), "after": service.descriptors},
        "threads": sorted(set(threads)),
        "answered": len(load.answers),
        "failed": dict(load.failed + crowd.failed),
        "crowd": dict(crowd.did),
    }


@fault("G13", n=3600, quick=6)
def soak(n: int, seed: int, folder: Path) -> Outcome:
    """Under clients that crash, teach and forget for n seconds, memory, descriptors and threads stay what they were.

    The control: a service that keeps every body. It is watched for 20 s at most.
    """
    wrong: list[str] = []
    service, leaks = Service(folder / "service"), Service(folder / "leaks", wrapper=patched(LEAK))
    with ExitStack() as stack:
        for each in (service, leaks):
            stack.callback(each.kill)
        together(service.start, leaks.start)
        found: list[dict[str, Any]] = [{}, {}]

        def watch(k: int, one: Service, seconds: float) -> None:
            found[k] = soaked(one, seconds, seed + k)

        short = min(n, 20)
        if n <= 60:
            together(lambda: watch(0, service, n), lambda: watch(1, leaks, short))
        else:
            watch(1, leaks, short)
            leaks.kill()
            watch(0, service, n)
    true, planted = found
    # An hour is judged by the promise itself. A few seconds cannot be: they are still warm-up, and find what is gross.
    limit = 1.0 if n >= 3600 else None
    if limit is not None and true["slope_percent_an_hour"] >= limit:
        wrong.append(f"memory grows by {true['slope_percent_an_hour']} % an hour")
    if limit is None and true["grown_percent"] >= 8:
        wrong.append(f"memory grew by {true['grown_percent']} %")
    if planted["grown_percent"] < max(8.0, 2 * true["grown_percent"] if n <= 60 else 0):
        wrong.append(f"the control grew by {planted['grown_percent']} % only")
    if true["descriptors"]["after"] > true["descriptors"]["quiet"]:
        wrong.append(f"descriptors: {true['descriptors']}")
    if true["threads"][-1] - true["threads"][0] > 2:
        wrong.append(f"threads: {true['threads']}")
    if true["failed"]:
        wrong.append(f"failed: {true['failed']}")
    control = {"keeps bodies, grown_percent": planted["grown_percent"], "rss_mb": planted["rss_mb"], "seconds": short}
    return Outcome(
        acknowledged=true["answered"],
        lost=sum(true["failed"].values()),
        control=control,
        figures=true,
        wrong=tuple(wrong),
    )


@fault("G10", n=600, quick=4)
def peak_with_redis_restart(n: int, seed: int, folder: Path) -> Outcome:
    """Ten minutes at the peak, Redis restarted in the middle: every question about a known task is answered, and right.

    The control: a service that trusts nothing it knows while the store is away.
    """
    wrong: list[str] = []
    away_s = 1.0 if n < 60 else 5.0
    (folder / "redis").mkdir()
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        photos = {"artifact": ROOT / "models" / "pretrained" / "photos", "redis_url": redis.url}
        if n < 60:  # on a machine that does something else as well; refusals have faults of their own
            photos["max_wait_s"] = 5
        service, control = Service(folder / "service", **photos), Service(folder / "control", stale_ok_s=0, **photos)
        for each in (service, control):
            stack.callback(each.kill)
        together(service.start, control.start)
        with service.client() as http:
            warm = Warm(http)
        bare = Load([control.port], warm.question, connections=2, rate=20)
        if n >= 60:  # the peak is to be one: the control comes after it
            control.kill()
        else:
            stack.enter_context(bare)
        with Load([service.port], warm.question, connections=64) as load:
            time.sleep(n / 2)
            stopped = time.perf_counter() - load.began
            restart(redis, away_s)
            back = time.perf_counter() - load.began
            time.sleep(n / 2)
            end = time.perf_counter() - load.began
        if n >= 60:
            control.start()
            with bare:
                time.sleep(1)
                restart(redis, away_s)
                time.sleep(2)
    if load.failed:
        wrong.append(f"failed: {dict(load.failed)} at {[round(at, 2) for at in load.failed_at[:10]]} s")
    if not bare.failed:
        wrong.append("the control lost nothing")
    seconds = [load.figures(second, second + 1).get("answers", 0) for second in range(1, int(end))]
    return Outcome(
        acknowledged=load.sent,
        lost=load.failed.total(),
        control={"trusts nothing it knows, failed": dict(bare.failed), "of": bare.sent},
        figures={
            "redis_away_s": [round(stopped, 1), round(back, 1)],
            "before": load.figures(1, stopped),
            "during": load.figures(stopped, back + 1),
            "after": load.figures(back + 1, end),
            "slowest_second": min(seconds),
            "per_second_around": seconds[max(0, int(stopped) - 6) : int(back) + 6],
        },
        wrong=tuple(wrong),
    )


def restart(redis: RedisServer, away_s: float) -> None:
    """As an operator does it: SIGTERM, a while of nothing, start."""
    process = redis._process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    time.sleep(away_s)
    redis.start()


# The mistake that async services are known for.
BLOCKING = """
import time
from service.engine import Engine
adapt = Engine.adapt
async def blocking(self, *given, **named):
    time.sleep(0.3)
    return await adapt(self, *given, **named)
Engine.adapt = blocking
"""


@fault("P9", n=1000, quick=40)
def loop_blocked(n: int, seed: int, folder: Path) -> Outcome:
    """While tasks are taught as fast as it can, the service says within 100 ms that it lives.

    The control: 0.3 s of work on the event loop for each task.
    """
    wrong, missed = [], []
    service, control = Service(folder / "service"), Service(folder / "control", wrapper=patched(BLOCKING))
    with ExitStack() as stack:
        for each in (service, control):
            stack.callback(each.kill)
        together(service.start, control.start)
        times, taught = liveness(service, n, seed)
        slow, _ = liveness(control, 5, seed)
    p50, p99 = (round(1e3 * times[int(share * len(times))], 1) for share in (0.5, 0.99))
    if times[-1] > 0.1:
        missed.append(f"alive after {1e3 * times[-1]:.0f} ms")
    if slow[-1] < 0.25:
        wrong.append(f"the control was alive after {1e3 * slow[-1]:.0f} ms")
    return Outcome(
        acknowledged=n,
        lost=n - len(times),
        control={"0.3 s on the loop, slowest_ms": round(1e3 * slow[-1])},
        figures={"p50_ms": p50, "p99_ms": p99, "slowest_ms": round(1e3 * times[-1], 1), **taught},
        wrong=tuple(wrong),
        missed=tuple(missed),
    )


def liveness(service: Service, n: int, seed: int) -> tuple[list[float], dict[str, Any]]:
    """Sorted times to n answers of /healthz while others teach tasks of 64 examples."""
    path = b"/v1/tasks/heavy"
    sets = [raw("PUT", path.decode(), files=support(seed + k, shots=32)) for k in range(4)]

    def teach(number: int) -> Any:
        request = sets[number % 4].replace(path, b"%s%d" % (path, number), 1)
        return request, lambda status, _: "" if status == 201 else f"teach {status}"

    times = []
    with Load([service.port], teach, connections=8) as load, service.client() as http:
        time.sleep(0.5)
        for _ in range(n):
            start = time.perf_counter()
            assert http.get("/healthz").status_code == 200
            times.append(time.perf_counter() - start)
            time.sleep(0.02)
    return sorted(times), {"taught": len(load.answers), "failed": dict(load.failed)}
