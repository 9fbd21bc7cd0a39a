"""Several tenants on one service, of whom one asks for more than there is. Knows nothing of other overload."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from service.keys import create
from service.waiting import cost
from tests.torture.line import Outcome, fault
from tests.torture.overload import LONG, Peak, at_work, load, loading, p99, taught, told, unanswered
from tests.torture.world import Service

FLOOD = 10  # times what the service can do
LARGE_FLOOD = 3  # times, of large pictures: more is a flood of the network before it is one of the lanes
CALM = 0.3  # of it: less than a half, which is its share of two
LEAST = 0.9  # of what is served where nobody floods
PATIENCE_MS = 400  # beside twice the p99 at the peak: as long as the service lets anybody wait
NO_TURNS = """
import types, service.batcher as batcher
batcher.tenant = types.SimpleNamespace(get=lambda: "")
"""


def photograph(seed: int) -> bytes:
    """A JPEG of twelve million pixels, with noise, as a telephone takes it: some two megabytes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((4000, 3000)), np.float32) + 3 * rng.standard_normal((3000, 4000, 3), np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def served(found: dict[str, Any]) -> float:
    """The share of what was asked that was answered in time."""
    return float(found["statuses"].get("200", 0) / sum(found["statuses"].values()))


@fault("A4", n=15, quick=2)
def flooding_tenant(n: int, seed: int, folder: Path) -> Outcome:
    """Beside a tenant who asks for ten times what there is, one who asks for less than its share is served.

    n: seconds. At full length once more with a flood of large pictures, each of which takes as long as many small ones.
    """
    wrong, missed = [], []
    keys = folder / "keys.json"
    calm, flood = (create(keys, tenant=tenant, scopes=["adapt", "classify"])[1] for tenant in ("calm", "flood"))
    large = folder / "large.jpg"
    large.write_bytes(photograph(seed))
    asked = lost = 0
    figures: dict[str, Any] = {}

    def both(service: Service, files: tuple[Path, ...]) -> dict[str, Any]:
        """What the calm one got alone, and beside the flood."""
        nonlocal asked, lost
        for key in (calm, flood):
            taught(service, key=key)
        peak = Peak.of(service, folder, n, key=flood)
        little = {"key": calm, "rate": CALM * peak.per_s}
        alone = load(service, folder, seconds=max(2, n / 2), **little)
        little["deadline_ms"] = PATIENCE_MS + 2 * peak.p99_ms
        rate = LARGE_FLOOD * peak.per_s / cost(files[0].read_bytes()) if files else FLOOD * peak.per_s
        other = loading(service, folder, key=flood, files=files, rate=rate, seconds=n + 1, deadline_ms=1000)
        beside, flooded = load(service, folder, seconds=n, **little), told(other)
        asked += sum(sum(found["statuses"].values()) for found in (beside, flooded))
        lost += unanswered(beside) + unanswered(flooded)
        return {
            "served": round(served(beside) / served(alone), 3),
            "p99_ms": [round(p99(alone)), round(p99(beside))],
            "statuses": beside["statuses"],
            "flood": flooded["statuses"],
        }

    with at_work(folder / "turns", n, keys_file=keys) as service:
        for name, files in (("small", ()), ("large", (large,)))[: 2 if n >= LONG else 1]:
            found = figures[name] = both(service, files)
            if not found["flood"].get("503"):
                wrong.append(f"the flood of {name} pictures was not refused")
            if found["served"] < LEAST:
                missed.append(
                    f"beside a flood of {name} pictures {found['served']:.2f} of what is served alone is served"
                )
    with at_work(folder / "no-turns", n, changed=NO_TURNS, keys_file=keys) as service:
        found = both(service, ())
    if found["served"] > 0.6 or found["served"] > 0.7 * figures["small"]["served"]:
        wrong.append("the control did as well without turns")
    control = {"turns": "by request alone", "served": found["served"], "statuses": found["statuses"]}
    return Outcome(asked, lost, control, figures, tuple(wrong), tuple(missed))
