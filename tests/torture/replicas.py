"""Replicas on one Redis: restarted, killed, started with the wrong artifact or before their store.

The nginx in front of them is that of deploy/nginx.conf, for it is part of what is promised to operators.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.fakes import picture
from tests.redis_server import RedisServer
from tests.torture._traffic import Asked, Load, Nginx, Warm, raw
from tests.torture.line import Outcome, fault
from tests.torture.world import CHARACTERS, RAW, Service, support, tool

PAUSE_S = 3  # as docs/operating.md has it: nginx leaves a replica alone for 2 s, and counts in whole ones
REQUESTS = 1000  # at least so many for each restart, at full length


@contextmanager
def replicas(folder: Path, *each: dict[str, Any]) -> Iterator[tuple[RedisServer, list[Service]]]:
    """Services on one Redis, started at once; `each`: settings of one, and its wrapper.

    They wait long for the store: a disk that others keep busy is no fault of theirs, and none that is meant here.
    """
    (folder / "redis").mkdir(parents=True)
    patient = {"store_timeout_s": 5}
    with RedisServer(folder / "redis") as redis, ExitStack() as stack:
        found = [
            Service(folder / f"replica{k}", redis_url=redis.url, **{**patient, **given}) for k, given in enumerate(each)
        ]
        for service in found:
            stack.callback(service.kill)
        together(*(service.start for service in found))
        yield redis, found


def together(*calls: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(len(calls)) as pool:
        for each in [pool.submit(call) for call in calls]:
            each.result()


def patched(code: str) -> list[str]:
    """A wrapper for Service: the service, after some lines that take from it what protects it."""
    return [sys.executable, "-c", code + "\nimport runpy; runpy.run_module('service', run_name='__main__')"]


class Taught:
    """Tasks that are taught under load, each once, under a key that lets it be sent again."""

    def __init__(self, name: str = "taught") -> None:
        self.name = name
        self.heads: dict[str, bytes] = {}

    def ask(self, number: int) -> Asked:
        task = f"{self.name}{number}"

        def judge(status: int, body: bytes) -> str:
            if status != 201:
                return f"teach {status}"
            self.heads[task] = body
            return ""

        key = {"Idempotency-Key": f"key-{task}"}
        return raw("PUT", f"/v1/tasks/{task}", files=support(number), headers=key), judge

    def lost(self, http: httpx.Client) -> list[str]:
        """What was acknowledged and is not there, or not once."""
        found = []
        for task, body in self.heads.items():
            answer = http.get(f"/v1/tasks/{task}").json()
            if answer.get("version") != 1 or f'"head": "{answer.get("head")}"'.encode() not in body:
                found.append(task)
        return found


def mixed(warm: Warm, taught: Taught, *, every: int = 40) -> Any:
    """Questions, with a task to be taught among `every`."""
    return lambda number: taught.ask(number) if number % every == every - 1 else warm.question(number)


def capacity(port: int, warm: Warm, *, seconds: float) -> float:
    """Good answers a second that there are when everybody asks as fast as possible."""
    with Load([port], mixed(warm, Taught("measured")), connections=16) as load:
        time.sleep(seconds)
    assert not load.failed, load.failed
    return load.figures(0.3)["per_s"]


@fault("G8", n=100, quick=2)
def rolling_restart(n: int, seed: int, folder: Path) -> Outcome:
    """Replicas behind nginx are restarted one after the other under 70 % load, and no request fails.

    The control: one is killed instead, behind an nginx that repeats nothing.
    """
    wrong, missed, ready_s, stop_s = [], [], [], []
    with replicas(folder, *[{"drain_s": 0.2}] * 3) as (_, services):
        ports = [service.port for service in services]
        with Nginx(folder / "nginx", ports) as nginx, nginx.client() as http:
            warm, taught = Warm(http), Taught()
            most = capacity(nginx.port, warm, seconds=1 if n <= 3 else 10)
            rate = 0.7 * most if n > 3 else min(0.7 * most, 150)  # the short form leaves cores to the starts
            with Load([nginx.port], mixed(warm, taught), connections=32, rate=rate) as load:
                time.sleep(0.3)
                for k in range(n):
                    service = services[k % 3]
                    start = time.monotonic()
                    status = service.terminate()
                    stop_s.append(time.monotonic() - start)
                    if status != 0:
                        wrong.append(f"restart {k}: status {status}")
                    ready_s.append(service.start())
                    time.sleep(PAUSE_S)
                    while n > 3 and load.sent < (k + 1) * REQUESTS:
                        time.sleep(0.05)
            lost = taught.lost(http)
            if load.failed:
                wrong.append(f"failed: {dict(load.failed)} at {[round(at, 2) for at in load.failed_at[:10]]} s")
            if max(ready_s) > 10:
                missed.append(f"a replica was ready after {max(ready_s):.1f} s")
        with (
            Nginx(folder / "plain", ports, retries=False) as plain,
            Load([plain.port], warm.question, connections=32, rate=rate) as bare,
        ):
            time.sleep(0.3)
            services[0].kill()
            time.sleep(0.5)
    if not bare.failed:
        wrong.append("the control lost nothing")
    return Outcome(
        acknowledged=len(load.answers),
        lost=load.failed.total() + len(lost),
        control={"killed, nothing repeated": dict(bare.failed), "of": bare.sent},
        figures={
            "taught": len(taught.heads),
            "taught_lost": lost,
            "capacity_per_s": most,
            **load.figures(),
            "stop_s": round(max(stop_s), 2),
            "ready_s": round(max(ready_s), 2),
            "reset_by_the_end": nginx.resets,  # and sent again by nginx
        },
        wrong=tuple(wrong),
        missed=tuple(missed),
    )


# It asks the store once for each task, and from then on itself.
TRUSTING = """
from service.stores.lru import RecentScope
asked = RecentScope.pointer
async def pointer(self, task):
    known = self._recent.known.get((self.tenant, task))
    return known.pointer if known and known.pointer else await asked(self, task)
RecentScope.pointer = pointer
"""


def taught_with(http: httpx.Client, task: str, *, seed: int, swapped: bool) -> tuple[str, int]:
    """Teaches red and blue, or blue as red and red as blue. Head and version."""
    names = {"red": "blue", "blue": "red"} if swapped else {"red": "red", "blue": "blue"}
    answer = http.put(f"/v1/tasks/{task}", files=[(names[label], image) for label, image in support(seed)])
    assert answer.is_success, answer.text
    return answer.json()["head"], answer.json()["version"]


def said_by(http: httpx.Client, task: str) -> tuple[str, int, str]:
    """What a replica says to something red: by which head, in which version, and the label. Or why it says nothing."""
    answer = http.post(f"/v1/tasks/{task}/classify", content=picture("red", seed=77), headers=RAW)
    body = answer.json()
    if answer.status_code != 200:
        return "", answer.status_code, body["code"]
    return body["head"], body["version"], body["predictions"][0]["label"]


@fault("NL3", n=1000, quick=24)
def kill_a_replica(n: int, seed: int, folder: Path) -> Outcome:
    """A task taught on one replica is served by the other on the next request, also when one is killed under load.

    The control: a replica that trusts what it once read of a task.
    """
    wrong, stale, lost = [], 0, 0
    with ExitStack() as stack:
        _, (one, other, trusting) = stack.enter_context(replicas(folder, {}, {}, {"wrapper": patched(TRUSTING)}))
        nginx = stack.enter_context(Nginx(folder / "nginx", [one.port, other.port]))
        with nginx.client() as http:
            warm = Warm(http)
            pair = [stack.enter_context(service.client()) for service in (one, other)]
            careless = stack.enter_context(trusting.client())
            now: dict[str, tuple[str, int, str]] = {}
            restart = threading.Thread(target=one.start)
            with Load([nginx.port], warm.question, connections=8, rate=100) as load:
                for k in range(n):
                    if k == n // 2:
                        one.kill()
                        restart.start()
                    away = n // 2 <= k and restart.is_alive()
                    teacher, asked = (pair[1], pair[1]) if away else (pair[k % 2], pair[1 - k % 2])
                    task, swapped = f"task{k // 4}", k % 2 == 1
                    head, version = taught_with(teacher, task, seed=k, swapped=swapped)
                    now[task] = (head, version, "blue" if swapped else "red")
                    lost += (found := said_by(asked, task)) != now[task]
                    if found != now[task]:
                        wrong.append(f"round {k}: {found}, not {now[task]}")
                    stale += said_by(careless, task) != now[task]
                restart.join()
            # Whatever was taught by or before the killed one is there at both.
            gone = [task for task, known in now.items() for http in pair if said_by(http, task) != known]
    if load.failed:
        wrong.append(f"failed: {dict(load.failed)}")
    if not stale:
        wrong.append("the control served nothing stale")
    return Outcome(
        acknowledged=n,
        lost=lost + len(gone),
        control={"trusts what it knows, stale answers": stale, "of": n},
        figures={"questions": len(load.answers), **load.figures()},
        wrong=tuple(wrong[:10]),
    )


# It takes every head for one of its own.
NO_DIGEST = """
from dataclasses import replace
import service.engine as engine
class Engine(engine.Engine):
    def __init__(self, artifact, *given, **named):
        super().__init__(artifact, *given, **named)
        from service.stores.lru import RecentScope
        asked = RecentScope.head
        async def head(scope, head_id):
            found = await asked(scope, head_id)
            return found and replace(found, artifact=artifact.digest)
        RecentScope.head = head
engine.Engine = Engine
"""


@fault("NL3", n=200, quick=10)
def mixed_artifacts(n: int, seed: int, folder: Path) -> Outcome:
    """In a pool with two artifacts each replica answers with heads of its own, and says `task_stale` otherwise.

    The control: a replica that does not look whose a head is.
    """
    wrong, foreign, moved = [], Counter[str](), 0
    second = one_bit_off(folder / "second")  # so near that only the digest tells
    careless = {"artifact": second, "wrapper": patched(NO_DIGEST)}
    with replicas(folder, {}, {"artifact": second}, careless) as (_, services), ExitStack() as clients:
        ours, theirs, control = (clients.enter_context(service.client()) for service in services)
        for k in range(n):
            bare, kept = f"bare{k}", f"kept{k}"
            head, version = taught_with(ours, bare, seed=k, swapped=False)
            foreign["with a foreign head" if said_by(control, bare)[0] == head else "none"] += 1
            if (found := said_by(theirs, bare)) != ("", 409, "task_stale"):
                wrong.append(f"{bare} at the other: {found}")
            if (found := said_by(ours, bare)) != (head, version, "red"):
                wrong.append(f"{bare} at its own: {found}")
            answer = ours.put(f"/v1/tasks/{kept}?retain=images", files=support(k))
            first = (answer.json()["head"], 1, "red")
            again = said_by(theirs, kept)  # learned again
            back = said_by(ours, kept)  # and back
            if again[0] in ("", first[0]) or again[1:] != (2, "red"):
                wrong.append(f"{kept} at the other: {again}, first {first}")
            if (back[0], back[2]) != (first[0], "red") or back[1] <= again[1]:
                wrong.append(f"{kept} at its own: {back}, first {first}")
            moved = back[1]
    if foreign["with a foreign head"] != n:
        wrong.append("the control did not answer with a foreign head")
    return Outcome(
        acknowledged=2 * n,
        lost=len(wrong),
        control={"takes any head, its answers": dict(foreign)},
        figures={"versions_after_two_moves": moved},
        wrong=tuple(wrong[:10]),
    )


@fault("G11", n=20, quick=1)
def started_without_redis(n: int, seed: int, folder: Path) -> Outcome:
    """Started before its Redis, a replica is ready but degraded, refuses in words, and recovers by itself.

    The control: one that does not look again.
    """
    wrong, missed, taught, back_s = [], [], 0, []
    never = patched("from service.stores import redis_link; redis_link.PAUSE_S = 1e9")
    (folder / "redis").mkdir()
    redis = RedisServer(folder / "redis")
    services = [
        Service(folder / "replica", redis_url=redis.url),
        Service(folder / "never", redis_url=redis.url, wrapper=never),
    ]
    refused = 0
    for k in range(n):
        try:
            together(*(service.start for service in services))
            with services[0].client() as http:
                state = http.get("/readyz")
                if (state.status_code, state.json()["status"]) != (200, "degraded"):
                    wrong.append(f"readyz: {state.status_code} {state.text}")
                answer = http.put("/v1/tasks/early", files=support(k))
                if (answer.status_code, answer.json()["code"]) != (503, "store_unavailable"):
                    wrong.append(f"taught too early: {answer.status_code} {answer.text}")
                if "retry-after" not in answer.headers:
                    wrong.append("no Retry-After")
                redis.start()
                start = time.monotonic()
                while (answer := http.put(f"/v1/tasks/late{k}", files=support(k))).status_code != 201:
                    if time.monotonic() > start + 20:
                        wrong.append(f"never recovered: {answer.text}")
                        break
                    time.sleep(0.02)
                else:
                    back_s.append(time.monotonic() - start)
                    taught += said_by(http, f"late{k}") == (answer.json()["head"], 1, "red")
            with services[1].client() as http:
                refused += http.put("/v1/tasks/never", files=support(k)).status_code == 503
        finally:
            for service in services:
                service.kill()
            redis.kill()
    if max(back_s, default=99) > 1:
        missed.append(f"recovered after {max(back_s, default=99):.2f} s")
    if refused < n:
        wrong.append("the control recovered")
    return Outcome(
        acknowledged=n,
        lost=n - taught,
        control={"does not look again, still refusing after that": refused, "of": n},
        figures={"recovered_s": round(max(back_s, default=99), 2)},
        wrong=tuple(wrong[:10]),
        missed=tuple(missed),
    )


def damaged(folder: Path, kind: str, rng: random.Random) -> Path:
    """A copy of an artifact with something wrong in it."""
    shutil.copytree(CHARACTERS, folder)
    member = folder / rng.choice([path.name for path in sorted(CHARACTERS.iterdir()) if path.name != "manifest.json"])
    if kind == "missing":
        member.unlink()
    elif kind == "cut":
        member.write_bytes(member.read_bytes()[: rng.randrange(member.stat().st_size)])
    elif kind == "a bit":
        flip(member, rng.randrange(member.stat().st_size), 1 << rng.randrange(8))
    elif kind == "a link":
        target = folder.parent / f"{folder.name}-{member.name}"
        shutil.move(member, target)
        member.symlink_to(target)
    elif kind == "version":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": "fewshot-artifact-2"}))
    elif kind == "manifest":
        (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-100])
    return folder


def flip(path: Path, at: int, bits: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def one_bit_off(folder: Path) -> Path:
    """A copy with one bit of the weights flipped and a manifest that agrees: another artifact, and a whole one."""
    weights = shutil.copytree(CHARACTERS, folder) / "extractor.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    flip(weights, weights.stat().st_size - 2001, 1)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(before, hashlib.sha256(weights.read_bytes()).hexdigest()))
    return folder


KINDS = ("a bit", "missing", "cut", "a link", "version", "manifest")


@fault("P4", n=60, quick=6)
def artifact_faults(n: int, seed: int, folder: Path) -> Outcome:
    """A damaged artifact is not served: one line, status 2, while who runs goes on, even when its files are damaged.

    The control: a bit of the weights flipped, and the manifest made to agree.
    """
    rng, wrong, refused = random.Random(seed), [], Counter[str]()
    exact = {"precision": "float32"}  # the graph that uses the weights which the control changes
    with (
        Service(folder / "running", artifact=shutil.copytree(CHARACTERS, folder / "served"), **exact) as running,
        running.client() as http,
    ):
        assert http.put("/v1/tasks/known", files=support(1)).status_code == 201

        def features(client: httpx.Client) -> Any:
            answer = client.post("/v1/embed", content=picture("red", seed=5), headers=RAW)
            return answer.json()["features"] if answer.status_code == 200 else answer.text

        expected = features(http)
        for k in range(n):
            kind = KINDS[k % len(KINDS)]
            service = Service(folder / f"service{k}", artifact=damaged(folder / f"artifact{k}", kind, rng))
            try:
                service.start(ready=False)
                wrong.append(f"{kind}: it started")
            except AssertionError:
                said = [line for line in service.log.read_text().splitlines() if not line.startswith("{")]
                status = service.process.wait(10) if service.process else None
                refused[kind] += status == 2 and len(said) == 1 and said[0].startswith("fewshot cannot start: ")
                if refused[kind] != k // len(KINDS) + 1:
                    wrong.append(f"{kind}: status {status}, {said}")
            finally:
                service.kill()
        # The files of the one that runs: one flipped, one emptied in place, one gone.
        flip(folder / "served" / "extractor.safetensors", 100_000, 255)
        (folder / "served" / "extractor.safetensors").write_bytes(b"")
        (folder / "served" / "extractor.onnx").unlink()
        if features(http) != expected or http.put("/v1/tasks/later", files=support(2)).status_code != 201:
            wrong.append("the running service was affected")
    agreed = one_bit_off(folder / "agreed")
    with Service(folder / "control", artifact=agreed, **exact) as control, control.client() as http:
        differs = features(http) != expected
    if not differs:
        wrong.append("the control served what is right")
    return Outcome(
        acknowledged=n,
        lost=n - refused.total(),
        control={"the manifest agrees, other features served": differs},
        figures={"refused": dict(refused)},
        wrong=tuple(wrong[:10]),
    )


JUMPS_S = (3600, -3600, 86_400, -86_400)


@fault("P11", n=40, quick=4)
def clock_jumps(n: int, seed: int, folder: Path) -> Outcome:
    """When the clock jumps by an hour or a day, either way, tasks are taught, answered, kept and counted as before.

    The control: a task whose end, by the clock, has come: it is gone, so the service does see the false clock.
    """
    wrong, library = [], Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
    clock = folder / "clock"
    false = {"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": clock, "FAKETIME_NO_CACHE": 1}
    settings = [*(f"{name}={value}" for name, value in false.items()), "FAKETIME_DONT_FAKE_MONOTONIC=1"]
    if not library.exists():
        tool("faketime")  # skips, or fails where it was to be run
    clock.write_text("+0")
    with Service(folder / "service", wrapper=["env", *settings]) as service, service.client() as http:
        head, _ = taught_with(http, "known", seed=seed, swapped=False)
        assert http.put("/v1/tasks/ends?ttl=7200", files=support(seed)).status_code == 201
        moved, lost = 0, 0
        for k in range(n):
            clock.write_text(f"{JUMPS_S[k % len(JUMPS_S)]:+d}")
            if (found := said_by(http, "known")) != (head, 1, "red"):
                wrong.append(f"jump {k}: {found}")
            lost += found != (head, 1, "red")
            _, version = taught_with(http, "moves", seed=k, swapped=False)
            if version <= moved:
                wrong.append(f"jump {k}: version {version} after {moved}")
            moved = version
            answer = http.put(f"/v1/tasks/short{k}?ttl=600", files=support(k))
            if answer.status_code != 201 or said_by(http, f"short{k}")[2] != "red":
                wrong.append(f"jump {k}: a new task with an end is gone, {answer.status_code}")
        ended = said_by(http, "ends")[2]
    if ended != "task_not_found":
        wrong.append(f"the control: {ended}")
    return Outcome(
        acknowledged=2 * n + 1,
        lost=lost,
        control={"a task that ended by the false clock": ended},
        figures={"versions": moved},
        wrong=tuple(wrong[:10]),
    )
