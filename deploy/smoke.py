"""Teaches a running service two classes, asks about others of them, and tells by its exit status what came of it.

    python deploy/smoke.py http://127.0.0.1:8000                 learns a task, classifies with it, forgets it
    python deploy/smoke.py http://127.0.0.1:8000 --keep NAME     leaves the task under that name
    python deploy/smoke.py http://127.0.0.1:8000 --check NAME    asks a task that was left

With keys it presents the one in FEWSHOT_KEY, which needs the scope adapt, and sees the tasks of that key's tenant.
Standard library only: it makes its own pictures or texts, whichever the artifact reads, and runs wherever Python does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import secrets
import struct
import sys
import time
import zlib
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

COLOURS = {"red": (215, 40, 40), "blue": (40, 40, 215)}  # noise of 35 stays within a byte
TEXTS = {  # a line has one of each
    "code": (("for", "while", "if", "return"), ("x", "i", "rows", "n"), ("+= 1", "== y:", "[0]", "= f(x)")),
    "prose": (("The old", "A quiet", "Our small"), ("house", "garden", "sister"), ("slept well.", "was there.")),
}
SHOTS, QUERIES, EDGE = 5, 4, 64
OPENER = build_opener(ProxyHandler({}))  # a proxy of the environment's would not know the way to a local service


class Failed(Exception):
    """A step did not do what it should."""


def picture(colour: tuple[int, int, int], seed: int) -> bytes:
    """A PNG of noise around a colour."""
    rng = random.Random(seed)
    lines = [bytes(value + rng.randint(-35, 35) for _ in range(EDGE) for value in colour) for _ in range(EDGE)]
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", EDGE, EDGE, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + line for line in lines)),
        b"IEND": b"",
    }
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks.items():
        png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png


def text(label: str, seed: int) -> bytes:
    """A few lines of code or of prose."""
    rng = random.Random(seed)
    return "\n".join(" ".join(map(rng.choice, TEXTS[label])) for _ in range(4)).encode()


def multipart(files: list[tuple[str, bytes]], kind: str = "image") -> tuple[bytes, str]:
    """A body and its type; each file stands in the field named with it."""
    boundary = secrets.token_hex(16)
    end, of = ("png", "image/png") if kind == "image" else ("txt", "text/plain")
    head = f'--{{}}\r\nContent-Disposition: form-data; name="{{}}"; filename="{{}}.{end}"\r\nContent-Type: {of}\r\n\r\n'
    parts = [head.format(boundary, field, n).encode() + data + b"\r\n" for n, (field, data) in enumerate(files)]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


class Service:
    kind = "image"  # what its artifact reads

    def __init__(self, address: str, key: str = ""):
        self.address = address.rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def classes(self) -> list[str]:
        return list(COLOURS if self.kind == "image" else TEXTS)

    def example(self, label: str, seed: int) -> bytes:
        return picture(COLOURS[label], seed) if self.kind == "image" else text(label, seed)

    def call(self, method: str, path: str, files: list[tuple[str, bytes]] | None = None) -> tuple[int, Any]:
        """The status and what the JSON of the answer holds. Raises OSError when there is no answer."""
        body, kind = multipart(files, self.kind) if files else (None, "application/json")
        headers = {"Content-Type": kind, **self.headers}
        request = Request(self.address + path, data=body, method=method, headers=headers)  # noqa: S310
        try:
            with OPENER.open(request, timeout=10) as answer:
                status, content = answer.status, answer.read()
        except HTTPError as error:
            with error:
                status, content = error.code, error.read()
        except http.client.HTTPException as error:  # cut off in the middle of an answer
            raise ConnectionError(str(error)) from error
        return status, json.loads(content) if content else None

    def expect(
        self, statuses: tuple[int, ...], method: str, path: str, files: list[tuple[str, bytes]] | None = None
    ) -> Any:
        try:
            status, answer = self.call(method, path, files)
        except (OSError, ValueError) as error:
            raise Failed(f"{method} {path}: no answer ({error})") from error
        if status not in statuses:
            raise Failed(f"{method} {path}: status {status}: {json.dumps(answer)[:500]}")
        return answer


def wait(service: Service, limit_s: float) -> str:
    """Until the service is ready and so is its store."""
    start, last = time.monotonic(), "no answer"
    while time.monotonic() - start < limit_s:
        try:
            status, answer = service.call("GET", "/readyz")
            if status == 200 and answer["status"] == "ok":
                return f"after {time.monotonic() - start:.2f} s"
            last = json.dumps(answer)
        except (OSError, ValueError) as error:
            last = str(error)
        time.sleep(0.1)
    raise Failed(f"not ready within {limit_s:g} s: {last}")


def learn(service: Service, task: str) -> str:
    files = [(label, service.example(label, seed)) for label in service.classes() for seed in range(SHOTS)]
    answer = service.expect((200, 201), "PUT", f"/v1/tasks/{task}", files)
    shots = {item["label"]: item["shots"] for item in answer["classes"]}
    if shots != dict.fromkeys(service.classes(), SHOTS):
        raise Failed(f"learned {shots}")
    return f"{task}, version {answer['version']}, {len(shots)} classes of {SHOTS} by {answer['method']}"


def classify(service: Service, task: str) -> str:
    asked = [(label, service.example(label, 1000 + n)) for label in service.classes() for n in range(QUERIES)]
    answer = service.expect(
        (200,), "POST", f"/v1/tasks/{task}/classify?reject=off", [("query", data) for _, data in asked]
    )
    wrong = [
        f"{row.get('label', row.get('error'))} instead of {label}"
        for (label, _), row in zip(asked, answer["predictions"], strict=True)
        if row.get("label") != label
    ]
    if wrong or answer["stale"]:
        raise Failed("; ".join(wrong) or "the answer is from memory, not from the store")
    return f"{len(asked)} of {len(asked)} right, version {answer['version']}"


def listed(service: Service, task: str) -> str:
    cursor, pages = "", 0
    while True:
        query = urlencode({"limit": 200, **({"cursor": cursor} if cursor else {})})
        answer = service.expect((200,), "GET", f"/v1/tasks?{query}")
        pages += 1
        if task in (item["task"] for item in answer["items"]):
            return f"{task} is on page {pages}"
        cursor = answer["next_cursor"]
        if not cursor:
            raise Failed(f"{task} is on none of {pages} pages")


def forget(service: Service, task: str) -> str:
    service.expect((204,), "DELETE", f"/v1/tasks/{task}")
    service.expect((404,), "GET", f"/v1/tasks/{task}")
    return task


def main() -> int:
    parser = argparse.ArgumentParser(description="Teaches a running service two classes and asks about others.")
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:8000")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--keep", metavar="NAME", help="leave the task under this name")
    what.add_argument("--check", metavar="NAME", help="ask a task that was left under this name")
    parser.add_argument("--wait", type=float, default=60, metavar="SECONDS", help="for the service to be ready")
    given = parser.parse_args()
    service = Service(given.address, os.environ.get("FEWSHOT_KEY", ""))
    task = given.check or given.keep or f"smoke-{secrets.token_hex(6)}"
    steps = [classify, listed] if given.check else [learn, classify, listed]
    if not given.check and not given.keep:
        steps.append(forget)
    name = "ready"
    try:
        print(f"{name:9} {wait(service, given.wait)}", flush=True)
        service.kind = service.expect((200,), "GET", "/v1/artifact")["input"]["kind"]
        for step in steps:
            name = step.__name__
            print(f"{name:9} {step(service, task)}", flush=True)
    except Failed as error:
        print(f"{name:9} FAILED: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
