"""Requests that are no longer what they were: bits, bytes, lengths, methods, paths, types and values changed at random.

Whatever comes in is answered, or refused by closing the connection. Knows nothing of single formats: those have tests
of their own, and files that are no pictures are in hostile.py.
"""

from __future__ import annotations

import json
import random
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from tests.fakes import picture
from tests.service.web.asks import folders, support_json, tarred, text, zipped
from tests.torture.hostile import LEAKS
from tests.torture.isolation import LENGTH, message, without
from tests.torture.line import Outcome, fault
from tests.torture.world import RAW, Service, support

CALLERS = 32
PATIENCE_S = 10.0
MORE_S = 0.4  # who has no answer by then may have said less than was announced, and says that there is no more
CONTROL = "the handlers of refusals: each is an error of the program then"
BARE = without("from fastapi import FastAPI\nFastAPI.exception_handler = lambda self, *_: lambda handler: handler")
JSON = {"Content-Type": "application/json"}
INTERIM = re.compile(rb"\A(HTTP/1\.1 1\d\d [^\r\n]*\r\n\r\n)+")  # "100 Continue": the answer follows
FINE = {503, 501, 505}  # busy, and what HTTP itself names: a method or a version that is not spoken
ODD = (
    *("", "0", "-1", "null", "true", "1e999", "9" * 40, "%00", "%ff", "../..", "%2e%2e%2f", "a" * 5000, "\u202e", "'"),
    *("{", "[[[[", "\x00", "é", "🦊", "NaN", "Infinity", "-0.0", "1.5", "$ne", "; DROP", "\r\nX-A: b", " ", "*", "?"),
)
VALUES = (None, True, -1, 0, 10**400, 1.5, float("nan"), "", "a" * 70_000, "\u0000", "\ud800", [], {}, [[]], {"a": {}})
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "PRI", "BREW")
KINDS = (
    "application/json",
    "image/png",
    "application/zip",
    "application/x-tar",
    "multipart/form-data",
    "text/plain",
    "x",
)
HEADERS = (
    *("Transfer-Encoding: chunked", "Content-Length: 7", "Content-Length: -1", "Content-Length: 99999999999999"),
    *("Content-Encoding: gzip", "Content-Encoding: br", "Expect: 100-continue", "Connection: upgrade", "Upgrade: h2c"),
    *("Idempotency-Key: a", "If-Match: *", 'If-Match: "v1-hd_x"', "If-None-Match: *", "Prefer: return=minimal"),
    *("Range: bytes=0-1", "Authorization: Bearer fs_x", "Inference-Header-Content-Length: 9", "X-A: " + "b" * 20_000),
)


def good(task: str) -> list[bytes]:
    """Requests as they should be, at least one of each kind of body; `task` may be changed by them."""
    image, at = picture("red", seed=3), f"/v1/tasks/{task}"
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text(image)]}
    infer = {"inputs": [{**tensor, "parameters": {"content_type": "base64"}}]}

    def sent(method: str, path: str, value: object) -> bytes:
        return message(method, path, content=json.dumps(value).encode(), headers=JSON)

    return [
        message("PUT", at, files=support(1)),
        message("POST", "/v1/tasks?ttl=60", files=support(2)),
        sent("PUT", at, {"support": support_json("red", "blue", shots=1), "method": "ridge"}),
        message(
            "PUT", at, content=zipped(folders("red", "blue", shots=1)), headers={"Content-Type": "application/zip"}
        ),
        message(
            "PUT", at, content=tarred(folders("red", "blue", shots=1)), headers={"Content-Type": "application/x-tar"}
        ),
        message("POST", f"{at}/examples", files=[("lime", picture("lime", seed=4))]),
        message("PATCH", f"{at}?method=ridge"),
        sent("POST", f"{at}/rollback?version=1", {}),
        message("DELETE", f"{at}/classes/lime"),
        message("DELETE", f"{at}/examples/ex_0"),
        message("GET", at),
        message("GET", f"{at}?version=1"),
        message("GET", f"{at}/versions"),
        message("GET", "/v1/tasks?limit=3"),
        message("POST", f"{at}/classify", content=image, headers=RAW),
        message("POST", f"{at}/classify?explain=true", files=[("query", image)]),
        sent("POST", f"{at}/classify", {"queries": [text(image)]}),
        message("POST", "/v1/classify", files=[*support(5, shots=1), ("query", image)]),
        message("POST", "/v1/embed", content=image, headers=RAW),
        sent("POST", f"/v2/models/{task}/infer", infer),
        message("GET", f"/v2/models/{task}"),
        message("GET", "/metrics"),
        message("GET", "/openapi.json"),
    ]


def damaged(request: bytes, donor: bytes, chance: random.Random) -> bytes:
    """One to three accidents: to the line, a header, a value of the body, or to bytes anywhere."""
    for _ in range(chance.randint(1, 3)):
        head, end, body = request.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        method, _, rest = lines[0].partition(b" ")
        path, _, version = rest.rpartition(b" ")
        match chance.randrange(10):
            case 0:
                method = chance.choice(METHODS).encode()
            case 1:
                parts = re.split(rb"([/?&=])", path)
                parts[chance.randrange(len(parts))] = chance.choice(
                    [quote(chance.choice(ODD)), chance.choice(ODD)]
                ).encode()
                path = b"".join(parts)
            case 2:
                name = chance.choice(("method", "ttl", "version", "limit", "cursor", "explain", "on_bad_image", "x"))
                path += (b"&" if b"?" in path else b"?") + f"{name}={quote(chance.choice(ODD))}".encode()
            case 3:
                lines.insert(chance.randint(1, len(lines)), chance.choice(HEADERS).encode())
            case 4:
                kind = f"Content-Type: {chance.choice(KINDS)}".encode()
                lines = [kind if line.lower().startswith(b"content-type") else line for line in lines]
            case 5 if body.startswith(b"{"):
                body = _with_another_value(body, chance)
                lines = _measured(lines, body)
            case 6:
                body = donor.partition(b"\r\n\r\n")[2]
                lines = _measured(lines, body)
            case 7:  # the body, with its length as it is then
                body = _accident(body, chance)
                lines = _measured(lines, body)
            case 8:
                version = chance.choice([b"HTTP/1.0", b"HTTP/2", b"HTTP/1.1", b"", b"HTTP/1.1 x"])
            case _:
                request = _accident(request, chance)
                continue
        lines[0] = method + b" " + path + b" " + version
        request = b"\r\n".join(lines) + end + body
    return request


def _measured(lines: Sequence[bytes], body: bytes) -> list[bytes]:
    kept = [line for line in lines if not line.lower().startswith(b"content-length")]
    return [*kept, b"Content-Length: %d" % len(body)]


def _accident(data: bytes, chance: random.Random) -> bytes:
    found, at = bytearray(data), chance.randrange(len(data) + 1)
    match chance.randrange(4):
        case 0 if found:
            for _ in range(chance.randint(1, 8)):
                found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
        case 1:
            del found[at:]
        case 2:
            found[at:at] = chance.randbytes(chance.choice([1, 4, 300]))
        case _:
            found[at : at + chance.choice([1, 4, 64])] = b""
    return bytes(found)


def _with_another_value(body: bytes, chance: random.Random) -> bytes:
    """The JSON with one of its values another, or under another name."""
    try:
        whole = json.loads(body)
    except ValueError:
        return body
    places: list[tuple[object, object]] = []

    def walk(value: object) -> None:
        pairs: Iterator[tuple[object, object]] = iter(())
        if isinstance(value, dict):
            pairs = iter(list(value.items()))
        elif isinstance(value, list):
            pairs = iter(enumerate(value))
        for name, inner in pairs:
            places.append((value, name))
            walk(inner)

    walk(whole)
    if places:
        where, name = chance.choice(places)
        if isinstance(where, dict) and chance.random() < 0.3:
            where[chance.choice(ODD)] = where.pop(name)
        elif isinstance(where, dict | list):
            where[name] = chance.choice(VALUES)  # type: ignore[index,call-overload]
    return json.dumps(whole).encode()


def asked(port: int, request: bytes) -> tuple[int, bytes, float]:
    """Status, what came and seconds; 0 where the connection was closed without an answer, -1 where nothing came."""
    began, found = time.monotonic(), b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as wire:
            with suppress(ConnectionError):
                wire.sendall(request)
            if not select.select([wire], [], [], MORE_S)[0]:
                wire.shutdown(socket.SHUT_WR)
            while not _whole(found) and (part := wire.recv(1 << 16)):
                found += part
                wire.settimeout(1)  # it may announce what is not sent, as for HEAD
    except ConnectionError:
        pass
    except TimeoutError:
        if not found:
            return -1, b"", time.monotonic() - began
    final = INTERIM.sub(b"", found)
    status = int(final[9:12]) if re.match(rb"HTTP/1\.[01] \d{3} ", final) else 0
    return status, final, time.monotonic() - began


def _whole(answer: bytes) -> bool:
    """Whether this is all, as it says itself; where it does not say, the end of the connection does."""
    head, found, body = INTERIM.sub(b"", answer).partition(b"\r\n\r\n")
    length = LENGTH.search(head + b"\r\n")
    return bool(found) and length is not None and len(body) >= int(length[1])


def ask_all(port: int, n: int, seed: int) -> tuple[Counter[str], list[str], float]:
    """What n damaged requests got, by hundreds; what they must not get; seconds of the longest."""
    plain = good("scratch")

    def one(number: int) -> tuple[int, bytes, float, bytes]:
        chance = random.Random(f"{seed} {number}")
        request = damaged(chance.choice(plain), chance.choice(plain), chance)
        return *asked(port, request), request

    counts: Counter[str] = Counter()
    wrong, longest = [], 0.0
    with ThreadPoolExecutor(CALLERS) as pool:
        for status, answer, seconds, request in pool.map(one, range(n)):
            longest = max(longest, seconds)
            name = {-1: "unanswered", 0: "closed"}.get(status, f"{status // 100}xx")
            counts["errors of the program" if status >= 500 and status not in FINE else name] += 1
            body = answer.partition(b"\r\n\r\n")[2].decode(errors="replace")
            leak = status >= 400 and LEAKS.search(body)
            if status == -1 or leak or (status >= 500 and status not in FINE):
                wrong.append(f"{status} {leak and leak[0]} for {request[:300]!r}: {body[:200]}")
    return counts, wrong, longest


@fault("G7", n=50_000, quick=1500)
def damaged_requests(n: int, seed: int, folder: Path) -> Outcome:
    """Whatever is sent is answered, or the connection ended, and never by an error of the program."""
    with Service(folder / "service") as service, service.client() as http:
        kept = http.put("/v1/tasks/kept-as-it-was", files=support(9)).json()["head"]
        http.put("/v1/tasks/scratch", files=support(1))
        counts, wrong, longest = ask_all(service.port, n, seed)
        found = http.get("/v1/tasks/kept-as-it-was").json()
        if found.get("head") != kept:
            wrong.append("a task that nobody named is not what it was")
        if (
            http.post("/v1/tasks/kept-as-it-was/classify", content=picture("red", seed=1), headers=RAW).status_code
            != 200
        ):
            wrong.append("a good question is not answered any more")
        said = service.log.read_text()
        if "Traceback" in said:
            wrong.append("the log has a traceback: " + said[said.index("Traceback") :][:1500])
    with Service(folder / "bare", wrapper=BARE) as service, service.client() as http:
        http.put("/v1/tasks/scratch", files=support(1))
        bare, _, _ = ask_all(service.port, max(300, n // 50), seed)
    if not bare["errors of the program"]:
        wrong.append("without the handlers there was no error of the program")
    control = {"without": CONTROL, **bare}
    lost = counts["errors of the program"] + counts["unanswered"]
    return Outcome(n, lost, control, {**counts, "longest_s": round(longest, 2)}, tuple(wrong[:10]))
