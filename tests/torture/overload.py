"""More asked of the service than it can do: what it does then, whom it refuses and how fast, and what is left after.

The load comes from deploy/load.py, a process of its own on the same cores. So that it and the refusals do not take from
the lanes what these are measured by, the lanes do expensive work on one core less than there are, and in the short form
they sleep, as if they waited for a device. Knows nothing of slow clients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.floor import pictures, steadiness
from service.settings import PRETRAINED
from tests.torture.line import Outcome, fault
from tests.torture.world import ROOT, Service, support

LANES = max(1, (os.cpu_count() or 1) - 1)
CLIENTS = 64  # of the closed loop that finds the peak
TIMES = {2: 0.98, 5: 0.95, 10: 0.90}  # load over capacity -> least goodput over peak
EXPENSIVE = {"artifact": PRETRAINED / "photos", "precision": "float32", "lanes": LANES}
SLEEPING = """
import time, models.extractor_onnx as onnx
run = onnx.OnnxExtractor.__call__
onnx.OnnxExtractor.__call__ = lambda self, batch: (time.sleep(0.005 * len(batch)), run(self, batch))[1]
"""
STARTED = """
import sys
from service.__main__ import main
sys.exit(main())
"""
UNBOUNDED = {"max_waiting": 10**9, "max_wait_s": 86_400}
LONG = 5  # from this n on
LEAST_IN_STORM = 0.25  # of the peak: the event loop has more to do than the lanes
NORMAL_S = 10  # after which all is as before


def loading(
    service: Service, folder: Path, *, key: str = "", files: Sequence[Path] = (), **options: object
) -> subprocess.Popen[str]:
    """deploy/load.py, begun, which asks the tasks named `tasks` (or `t`) about `files` (or small pictures)."""
    shown = [str(file) for file in files] or images(folder)
    given = {"tasks": "t", **options}
    arguments = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(ROOT / "deploy" / "load.py"), service.url, *shown, *arguments]
    environment = {**os.environ, "FEWSHOT_KEY": key}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it found."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(out)
    return found


def load(service: Service, folder: Path, **options: Any) -> dict[str, Any]:
    """Both."""
    return told(loading(service, folder, **options))


def images(folder: Path) -> Sequence[str]:
    """Sixteen JPEGs like photographs."""
    kept = folder / "images"
    if not kept.exists():
        kept.mkdir()
        for number, image in enumerate(pictures(16, seed=1)):
            (kept / f"{number}.jpg").write_bytes(image)
    return sorted(map(str, kept.iterdir()))


def at_work(folder: Path, n: int, *, changed: str = "", **settings: object) -> Service:
    """The service with work that is a bottleneck, not started; `changed`: code that breaks something before it is."""
    work, also = (STARTED, EXPENSIVE) if n >= LONG else (SLEEPING + STARTED, {"lanes": LANES})
    if n >= LONG and not changed:
        return Service(folder, **{**also, **settings})
    return Service(folder, wrapper=(sys.executable, "-c", changed + work), **{**also, **settings})


def taught(service: Service, *tasks: str, key: str = "") -> None:
    with service.client(headers={"Authorization": f"Bearer {key}"} if key else {}) as client:
        for number, task in enumerate(tasks or ("t",)):
            client.put(f"/v1/tasks/{task}", files=support(number)).raise_for_status()


def p99(found: dict[str, Any], status: str = "200") -> float:
    return float(found["by_status"].get(status, {}).get("p99_ms", 0))


@dataclass(frozen=True, slots=True)
class Peak:
    """What the service can do: sixty-four clients, each with one request at a time."""

    per_s: float
    p99_ms: float

    @staticmethod
    def of(service: Service, folder: Path, n: int, *, key: str = "") -> Peak:
        found = load(service, folder, connections=CLIENTS, seconds=max(1, n / 2), key=key)
        if "503" in found["statuses"]:  # so slow just now that these are too many
            found = load(service, folder, connections=CLIENTS // 2, seconds=max(1, n / 2), key=key)
        return Peak(max(1.0, found["goodput_per_s"]), p99(found))

    def __add__(self, other: Peak) -> Peak:
        """The mean of two."""
        return Peak(round((self.per_s + other.per_s) / 2, 1), round((self.p99_ms + other.p99_ms) / 2, 1))


def unanswered(found: dict[str, Any]) -> int:
    """Requests that got neither an answer nor a refusal before their client gave up for good."""
    return sum(count for status, count in found["statuses"].items() if status not in ("200", "503", "late"))


def normal_after(service: Service, folder: Path, before: dict[str, Any]) -> float:
    """Seconds until a few clients are served as before: all of them, and about as fast."""
    start = time.monotonic()
    while time.monotonic() < start + 60:
        began = time.monotonic()
        found = load(service, folder, connections=2, seconds=0.5)
        if set(found["statuses"]) == {"200"} and found["p50_ms"] < 2 * before["p50_ms"]:
            return began - start
    return 60.0


@fault("G9", n=15, quick=2)
def overload(n: int, seed: int, folder: Path) -> Outcome:
    """Asked for up to ten times what it can do, it does as much as ever, and refuses the rest at once.

    n: seconds at each load.
    """
    times = list(TIMES) if n >= LONG else [5]
    asked = lost = 0
    wrong, missed = [], []
    figures: dict[str, Any] = {"lanes": LANES, "steadiness_ms": steadiness(min(3.0, n / 4))}
    with at_work(folder / "bounded", n) as service:
        taught(service)
        alone = load(service, folder, connections=2, seconds=0.5)
        peak = before = Peak.of(service, folder, n)
        for factor in times:
            # Who waits for as long as the service lets anybody wait, and twice as long as at the peak for the work.
            deadline = 400 + 2 * before.p99_ms
            found = load(service, folder, rate=factor * before.per_s, seconds=n, deadline_ms=deadline)
            after = Peak.of(service, folder, n)
            peak = before + after  # the computer may do other things as well: what it could do just then
            before = after
            share = found["goodput_per_s"] / peak.per_s
            figures[f"x{factor}"] = {
                "peak_per_s": peak.per_s,
                "goodput": round(share, 3),
                "peak_p99_ms": peak.p99_ms,
                "p99_ms": p99(found),
                "refused_p99_ms": p99(found, "503"),
                "lag_p99_ms": found["lag_p99_ms"],
                "deadline_ms": deadline,
                "statuses": found["statuses"],
            }
            asked += sum(found["statuses"].values())
            lost += unanswered(found)
            if not found["statuses"].get("503"):
                wrong.append(f"nobody was refused at x{factor}")
            if share < TIMES[factor]:
                missed.append(f"goodput at x{factor} is {share:.2f} of the peak")
            if p99(found) > 2 * peak.p99_ms:
                missed.append(
                    f"p99 of who is served at x{factor} is {p99(found) / peak.p99_ms:.1f} of that at the peak"
                )
            if p99(found, "503") > 20:
                missed.append(f"p99 of refusals at x{factor} is {p99(found, '503'):.0f} ms")
        figures["normal_after_s"] = round(normal_after(service, folder, alone), 1)
        if figures["normal_after_s"] > NORMAL_S:
            missed.append(f"normal after {figures['normal_after_s']} s")
    with at_work(folder / "unbounded", n, **UNBOUNDED) as service:
        taught(service)
        seconds = 4 * deadline / 1e3  # in the first quarter of it some are still in time
        found = load(service, folder, rate=5 * peak.per_s, seconds=seconds, deadline_ms=deadline)
        share = round(found["goodput_per_s"] / peak.per_s, 3)
        control = {"queue": "unbounded", "times": 5, "goodput": share, "statuses": found["statuses"]}
        if share > 0.5:
            wrong.append("the control did as well without a bound on the queue")
    return Outcome(asked, lost, control, figures, tuple(wrong), tuple(missed))


@fault("N4", n=15, quick=2)
def retry_storm(n: int, seed: int, folder: Path) -> Outcome:
    """Clients who ask again at once, refused or out of patience, do not bring it to a stand, and leave nothing behind.

    n: seconds. They come as fast as two processes can talk, thirty to forty times what can be served.
    """
    wrong, missed = [], []
    with at_work(folder / "bounded", n) as service:
        taught(service)
        alone = load(service, folder, connections=2, seconds=0.5)
        before = Peak.of(service, folder, n)
        deadline = 400 + 2 * before.p99_ms
        crowd = int(4 * before.per_s * deadline / 1e3)  # four times as many as can be served before they give up
        crowd = max(4 * CLIENTS, min(crowd, 1500))
        found = load(service, folder, connections=crowd, seconds=n, deadline_ms=deadline)
        after = normal_after(service, folder, alone)
        peak = before + Peak.of(service, folder, n)
        share = found["goodput_per_s"] / peak.per_s
    with at_work(folder / "unbounded", n, **UNBOUNDED) as service:
        taught(service)
        storm = load(service, folder, connections=crowd, seconds=3 * deadline / 1e3, deadline_ms=deadline)
        control = {
            "queue": "unbounded",
            "goodput": round(storm["goodput_per_s"] / peak.per_s, 3),
            "statuses": storm["statuses"],
        }
        if n >= LONG:
            control["normal_after_s"] = round(normal_after(service, folder, alone), 1)
    if control["goodput"] > 0.5:
        wrong.append("the control did as well without a bound on the queue")
    if not found["statuses"].get("503"):
        wrong.append("nobody was refused")
    if share < LEAST_IN_STORM:
        missed.append(f"goodput is {share:.2f} of the peak")
    if after > NORMAL_S:
        missed.append(f"normal after {after:.1f} s")
    figures = {
        "clients": crowd,
        "deadline_ms": deadline,
        "peak_per_s": peak.per_s,
        "goodput": round(share, 3),
        "p99_ms": p99(found),
        "refused_p99_ms": p99(found, "503"),
        "statuses": found["statuses"],
        "normal_after_s": round(after, 1),
    }
    return Outcome(sum(found["statuses"].values()), unanswered(found), control, figures, tuple(wrong), tuple(missed))
