"""A service that runs, asked as a client asks. Knows nothing of this computer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from service.doctor.check import Check

if TYPE_CHECKING:
    from service.client import Client, Health
    from service.client.pictures import Support

SAMPLE = Path(__file__).resolve().parents[1] / "sample"
# Three texts of each of two kinds, and one to ask about.
TEXTS = {
    "code": [
        b"def add(a, b):\n    return a + b",
        b"for n in range(10):\n    print(n)",
        b"if x is None:\n    x = {}",
    ],
    "prose": [
        b"It was a dark night, and nobody was on the road.",
        b"She had walked to the sea with her brother.",
        b"In the morning the whole town was covered with snow.",
    ],
}
CODE = b"if not x:\n    break"
ASK_S = 5.0  # for an answer of the service


def health(url: str) -> Health | None:
    from service.client import Client, FewshotError

    try:
        with Client(url, timeout=ASK_S, retries=0) as client:
            return client.health()
    except FewshotError:
        return None


def service(url: str, key: str | None) -> Check:
    """Asks it for something: is it there, is it ready, and does it tell two letters apart, or two kinds of text?"""
    from service.client import Client, FewshotError, Forbidden, Unauthorized

    try:
        with Client(url, key, timeout=4 * ASK_S, retries=0) as client:
            health = client.health()
            if health.status == "unavailable":
                text = f"{client.base_url} has stopped working on images"
                return Check("service", "fail", text, "Restart it; its log says why.")
            if health.status == "stopping":
                return Check("service", "warn", f"{client.base_url} is being stopped", "Ask the one that follows it.")
            kind = client.artifact().input["kind"]
            right, found, took_ms = _round_trip(client, kind)
            if health.status != "ok":
                return Check("service", "warn", f"{client.base_url} has lost its store", "See to Redis or the disk.")
    except Unauthorized as error:
        return Check("service", "fail", f"{url}: {error.detail}", "Set FEWSHOT_KEY, or use --key.")
    except Forbidden as error:
        return Check("service", "note", f"{url} is up; {error.detail}", "Its round trip needs a key with more scopes.")
    except (FewshotError, ValueError) as error:
        return Check("service", "fail", str(error), "Correct --url or FEWSHOT_URL, or start it with `fewshot serve`.")
    sort, learned = (
        ("texts", "kinds of text and knew another") if kind == "text" else ("pictures", "letters and knew a third")
    )
    if found != right:
        text = f"{url} took {right} for {found!r}"
        return Check("service", "warn", text, f"Is its artifact made for other {sort} than these?")
    return Check("service", "ok", f"{url} learned two {learned} in {took_ms:.0f} ms")


def _round_trip(client: Client, kind: str) -> tuple[str, str | None, float]:
    """What it is asked about in one call that stores nothing, what it takes that for, and milliseconds."""
    support: Support = TEXTS
    right, query = "code", CODE
    if kind != "text":
        support = {label: [SAMPLE / label / f"{n}.png" for n in (1, 2, 3)] for label in ("alpha", "theta")}
        right, query = "theta", (SAMPLE / "theta" / "9.png").read_bytes()
    start = time.perf_counter()
    found = client.classify_once(support, query, reject="off")
    return right, found[0].label, (time.perf_counter() - start) * 1e3
