"""Several tenants on one service, of whom one asks for more than there is. Knows nothing of other overload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.keys import create
from tests.torture.line import Outcome, fault
from tests.torture.overload import LONG, Peak, at_work, load, loading, p99, taught, told, unanswered
from tests.torture.world import Service

FLOOD = 10  # times what the service can do
CALM = 0.3  # of it: less than a half, which is its share of two
LEAST = 0.9  # of what is served where nobody floods
NO_TURNS = """
import types, service.batcher as batcher
batcher.tenant = types.SimpleNamespace(get=lambda: "")
"""


def served(found: dict[str, Any]) -> float:
    """The share of what was asked that was answered in time."""
    return float(found["statuses"].get("200", 0) / sum(found["statuses"].values()))


@fault("A4", n=15, quick=2)
def flooding_tenant(n: int, seed: int, folder: Path) -> Outcome:
    """A tenant who asks for ten times what the service can do is refused; others are served as if it were not there.

    n: seconds.
    """
    wrong, missed = [], []
    keys = folder / "keys.json"
    calm, flood = (create(keys, tenant=tenant, scopes=["adapt", "classify"])[1] for tenant in ("calm", "flood"))

    def both(service: Service) -> tuple[dict[str, Any], dict[str, Any], float, Peak]:
        """What the calm one got beside the flood, what the flood got, and what share of its questions were served in
        time, over that without a flood."""
        for key in (calm, flood):
            taught(service, key=key)
        peak = Peak.of(service, folder, n, key=flood)
        deadline = 400 + 2 * peak.p99_ms
        little = {"key": calm, "rate": CALM * peak.per_s, "deadline_ms": deadline}
        alone = load(service, folder, seconds=max(1, n / 2), **little)
        other = loading(service, folder, key=flood, rate=FLOOD * peak.per_s, seconds=n + 1, deadline_ms=deadline)
        beside = load(service, folder, seconds=n, **little)
        return beside, told(other), round(served(beside) / served(alone), 3), peak

    with at_work(folder / "turns", n, keys_file=keys) as service:
        beside, other, share, peak = both(service)
    if not other["statuses"].get("503"):
        wrong.append("the flood was not refused")
    if share < LEAST:
        (missed if n >= LONG else wrong).append(f"beside a flood {share:.2f} of what is served without is served")
    with at_work(folder / "no-turns", n, changed=NO_TURNS, keys_file=keys) as service:
        first, _, without, _ = both(service)
    if without > 0.6:
        wrong.append("the control did as well without turns")
    figures = {
        "peak_per_s": peak.per_s,
        "asked_per_s": round(CALM * peak.per_s, 1),
        "served": share,
        "p99_ms": p99(beside),
        "statuses": beside["statuses"],
        "flood": other["statuses"],
    }
    asked, lost = (
        sum(f(found) for found in (beside, other)) for f in (lambda f: sum(f["statuses"].values()), unanswered)
    )
    control = {"turns": "by request alone", "served": without, "statuses": first["statuses"]}
    return Outcome(asked, lost, control, figures, tuple(wrong), tuple(missed))
