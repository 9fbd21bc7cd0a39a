"""Redis goes away, hangs, is slow, full, emptied, set up wrongly or refuses us, and the way to it is cut."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import shutil
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import redis as redis_py
import redis.asyncio as redis_asyncio

from models.errors import FewshotError, StoreUnavailable
from models.head import Affine, Head
from service.stores import Record, SealBroken, redis_link
from service.stores.lru import Recent
from service.stores.opening import PUBLIC_KEY
from service.stores.redis import MARK, RedisStore
from tests.fakes import picture
from tests.redis_server import RedisServer
from tests.torture._toxic import HARMLESS, Proxy, Toxic
from tests.torture.line import Outcome, fault
from tests.torture.world import RAW, Service, support

QUESTION = picture("red", seed=99)
POOL = 16  # connections of one replica
WARM = [f"warm{number}" for number in range(40)]


def teach(http: httpx.Client, task: str, seed: int = 0) -> httpx.Response:
    return http.put(f"/v1/tasks/{task}", files=support(seed, shots=1))


def ask(http: httpx.Client, task: str) -> httpx.Response:
    return http.post(f"/v1/tasks/{task}/classify", content=QUESTION, headers=RAW)


def warm(http: httpx.Client, tasks: Sequence[str] = WARM) -> dict[str, str]:
    """Teaches tasks; by name, the head that was acknowledged."""
    heads = {}
    for seed, task in enumerate(tasks):
        answer = teach(http, task, seed)
        assert answer.status_code == 201, answer.text
        heads[task] = answer.json()["head"]
    return heads


def gone(http: httpx.Client, heads: dict[str, str]) -> list[str]:
    """The tasks that are not at the head that was acknowledged."""
    return [task for task, head in heads.items() if http.get(f"/v1/tasks/{task}").json().get("head") != head]


def ready(http: httpx.Client) -> tuple[int, str]:
    answer = http.get("/readyz")
    return answer.status_code, answer.json()["status"]


def until(done: Callable[[], object], limit_s: float = 20) -> float:
    """Seconds until it is so."""
    start = time.monotonic()
    while not done():
        assert time.monotonic() < start + limit_s, "it does not come about"
        time.sleep(0.01)
    return time.monotonic() - start


def p99_ms(times: Sequence[float]) -> float:
    return round(1e3 * float(np.percentile(times, 99)), 1) if times else 0.0


def refusal(answer: httpx.Response) -> str:
    """What is wrong about an answer that is to say: the store is away, come back later."""
    code = answer.json().get("code", "")
    if answer.status_code == 503 and code == "store_unavailable" and answer.headers.get("retry-after"):
        return ""
    return f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {code}"


@dataclass(frozen=True, slots=True)
class Asked:
    began: float
    took: float
    status: int
    stale: bool


class Askers:
    """Clients that classify with one warm task after the other. Use as a context manager."""

    def __init__(self, service: Service, tasks: Sequence[str] = WARM, *, clients: int = 4):
        self._service = service
        self._tasks = tasks
        self._stop = threading.Event()
        self.asked: list[Asked] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Askers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, number: int) -> None:
        tasks = deque(self._tasks)
        tasks.rotate(10 * number)
        with self._service.client() as http:
            while not self._stop.is_set():
                tasks.rotate(1)
                began = time.monotonic()
                try:
                    answer = ask(http, tasks[0])
                    status, stale = answer.status_code, bool(answer.json().get("stale"))
                except httpx.HTTPError:
                    status, stale = 0, False
                self.asked.append(Asked(began, time.monotonic() - began, status, stale))
                time.sleep(0.01)

    def since(self, moment: float) -> list[Asked]:
        return [one for one in list(self.asked) if one.began >= moment]


@contextlib.contextmanager
def world(folder: Path, *options: str, **settings: object) -> Iterator[tuple[RedisServer, Service, httpx.Client]]:
    """A Redis, a service over it, and somebody to talk to it."""
    (folder / "redis").mkdir(parents=True)
    with (
        RedisServer(folder / "redis", *options) as redis,
        Service(folder / "service", redis_url=redis.url, **settings) as service,
        service.client() as http,
    ):
        yield redis, service, http


def inspector(redis: RedisServer, **options: Any) -> redis_py.Redis:
    return redis_py.Redis(port=redis.port, socket_timeout=10, **options)


@fault("G10", n=60, quick=3)
def redis_down(n: int, seed: int, folder: Path) -> Outcome:
    """While Redis is dead for n seconds every known task classifies as fast as before; the rest is refused at once."""
    wrong: list[str] = []
    missed: list[str] = []
    taught: dict[str, str] = {}
    with world(folder, lru_heads=64) as (redis, service, http):
        heads = warm(http)
        for number in range(100):  # names that are no tasks must not drive out those that are
            ask(http, f"nobody{seed}x{number}")

        def others(seconds: float) -> list[httpx.Response]:
            """Asks for what is not known, beside the load."""
            answers, end = [], time.monotonic() + seconds
            while time.monotonic() < end:
                number = len(answers)
                answers.append(ask(http, "nobody") if number % 2 else teach(http, f"new{time.monotonic_ns()}", number))
                time.sleep(0.1)
            return answers

        with Askers(service) as askers:
            before = time.monotonic()
            for answer in others(max(2.0, n / 3)):
                if answer.status_code == 201:
                    taught[answer.json()["task"]] = answer.json()["head"]
            redis.kill()
            killed = time.monotonic()
            refused = others(n)
            state = ready(http)
            end = time.monotonic()
            redis.start()
            back_s = until(lambda: teach(http, "after").status_code in (200, 201))
            time.sleep(0.3)
        fresh = [ask(http, task).json().get("stale", False) for task in WARM]
        lost_tasks = gone(http, {**heads, **taught})
        control = asyncio.run(distrustful(redis))
    calm = [one.took for one in askers.asked if before <= one.began < killed]
    during = [one for one in askers.since(killed) if one.began < end]
    failed = [one for one in during if one.status != 200]
    wrong += sorted({text for answer in refused if (text := refusal(answer))})
    wrong += [
        f"answered as if the store were there: {one}" for one in during[20:] if one.status == 200 and not one.stale
    ]
    if state != (200, "degraded"):
        wrong.append(f"readyz {state}")
    if any(fresh) or lost_tasks:
        wrong.append(f"after it was back, stale {sum(fresh)}, lost {lost_tasks}")
    if not control["failed"]:
        wrong.append("without trust in what was known nothing failed")
    figures = {
        "p99_before_ms": p99_ms(calm),
        "p99_ms": p99_ms([one.took for one in during]),
        "max_ms": round(1e3 * max(one.took for one in during), 1),
        "refused": len(refused),
        "refused_p99_ms": p99_ms([answer.elapsed.total_seconds() for answer in refused]),
        "back_s": round(back_s, 2),
    }
    if figures["p99_ms"] > 1.2 * figures["p99_before_ms"]:
        missed.append("p99 of known tasks above 1.2x")
    if figures["refused_p99_ms"] > 50:
        missed.append("p99 of refusals above 50 ms")
    if back_s > 1:
        missed.append("full service later than 1 s after Redis was back")
    return Outcome(len(during), len(failed), control, figures, tuple(wrong[:10]), tuple(missed))


async def distrustful(redis: RedisServer) -> dict[str, Any]:
    """The same with what was known not trusted; Redis is killed and stays away."""
    store = Recent(RedisStore(redis.url, key=PUBLIC_KEY, timeout_s=5), most=64, stale_ok_s=0)
    await store.open()
    scope = store.scope("default")
    known = [task for task in WARM if await scope.pointer(task)]
    redis.kill()
    found = await asyncio.gather(*(scope.pointer(task) for task in known), return_exceptions=True)
    await store.close()
    failed = sum(isinstance(one, StoreUnavailable) for one in found)
    return {"without": "trust in what is known", "asked": len(known), "failed": failed}


@fault("G10", n=20, quick=1)
def redis_slow(n: int, seed: int, folder: Path) -> Outcome:
    """A Redis slower than the deadline costs known tasks nothing; one that is within it costs them just its delay."""
    wrong: list[str] = []
    missed: list[str] = []
    phases: dict[str, list[Asked]] = {}
    with contextlib.ExitStack() as stack:
        (folder / "redis").mkdir()
        redis = stack.enter_context(RedisServer(folder / "redis"))
        proxy, other = (stack.enter_context(Proxy(redis.port)) for _ in range(2))
        service = stack.enter_context(Service(folder / "service", redis_url=proxy.url))
        http = stack.enter_context(service.client())
        warm(http)
        askers = stack.enter_context(Askers(service))
        time.sleep(0.5)
        descriptors = service.descriptors
        for name, delay_s in (("before", 0), ("0.1", 0.1), ("1", 1), ("10", 10), ("after", 0)):
            proxy.always(Toxic(delay_s=delay_s) if delay_s else HARMLESS)
            if delay_s == 1:  # more at once than there are connections
                with ThreadPoolExecutor(4 * POOL) as many, service.client() as all_at_once:
                    answers = list(many.map(all_at_once.get, ["/v1/tasks/nobody"] * 4 * POOL))
                wrong += sorted({text for answer in answers if (text := refusal(answer))})
            if name == "after":
                back_s = until(lambda: teach(http, "after").status_code in (200, 201))
            began = time.monotonic()
            time.sleep(n)
            phases[name] = askers.since(began)
        waited = asyncio.run(patient(other, Toxic(delay_s=2)))
        grown = service.descriptors - descriptors
    answered = [one for phase in phases.values() for one in phase]
    failed = [one for one in answered if one.status != 200]
    p99 = {name: p99_ms([one.took for one in phase]) for name, phase in phases.items()}
    calm = max(p99["before"], p99["after"])
    for name, most in (("0.1", 1.2 * (calm + 100)), ("1", 1.2 * calm), ("10", 1.2 * calm)):
        if p99[name] > most:
            missed.append(f"p99 at {name} s above {most:.1f} ms")
        if name != "0.1" and not any(one.stale for one in phases[name]):
            wrong.append(f"at {name} s nothing was marked stale")
    if proxy.most > POOL + 4:  # some are about to end
        wrong.append(f"{proxy.most} connections at once")
    if grown > POOL:
        wrong.append(f"{grown} descriptors more than before")
    if waited < 2:
        wrong.append(f"without a deadline a request waited {waited:.1f} s only")
    if back_s > 2:
        missed.append("full service later than 2 s after Redis was fast again")
    figures = {"p99_ms": p99, "connections_most": proxy.most, "descriptors_more": grown, "back_s": round(back_s, 2)}
    control = {"without": "a deadline", "known_task_waited_s": round(waited, 2)}
    return Outcome(len(answered), len(failed), control, figures, tuple(wrong), tuple(missed))


async def patient(proxy: Proxy, toxic: Toxic) -> float:
    """How long a known task's question waits when answers may take their time."""
    store = Recent(RedisStore(proxy.url, key=PUBLIC_KEY, timeout_s=100), most=64, stale_ok_s=300)
    await store.open()
    await store.scope("default").pointer("warm0")
    proxy.always(toxic)
    began = time.monotonic()
    await store.scope("default").pointer("warm0")
    waited = time.monotonic() - began
    proxy.always(HARMLESS)
    await store.close()
    return waited


def silent(redis: RedisServer) -> None:
    """Returns when it does not answer any more."""
    with socket.create_connection(("127.0.0.1", redis.port), timeout=0.05) as client, contextlib.suppress(TimeoutError):
        while True:
            client.sendall(b"PING\r\n")
            client.recv(100)


@fault("G11", n=100, quick=3)
def redis_hangs(n: int, seed: int, folder: Path) -> Outcome:
    """Redis hangs n times, or is blocked by a long command: known tasks classify, and nothing is left behind by it."""
    wrong: list[str] = []
    missed: list[str] = []
    backs: list[float] = []
    statuses: Counter[int] = Counter()
    chance = random.Random(seed)

    async def cycles(redis: RedisServer, http: httpx.Client) -> tuple[int, float]:
        """Beside the service a store of our own, to count its tasks; and how long a patient one waits."""
        store = RedisStore(redis.url, key=PUBLIC_KEY)
        endless = RedisStore(redis.url, key=PUBLIC_KEY, timeout_s=1000)
        await store.open()
        await endless.open()
        tasks, waited = len(asyncio.all_tasks()), 0.0
        for cycle in range(n):
            if cycle % 5 == 2:
                blocker = threading.Thread(target=lambda: inspector(redis).execute_command("DEBUG", "SLEEP", "0.8"))
                blocker.start()
                await asyncio.to_thread(silent, redis)
            else:
                redis.hang()
            began = time.monotonic()
            asking = asyncio.create_task(asyncio.to_thread(ask, http, WARM[cycle % len(WARM)]))
            pause = asyncio.create_task(asyncio.sleep(0.6 + chance.uniform(0, 0.4)))
            long = asyncio.create_task(endless.ping()) if cycle == 0 else None
            many = (store.scope("default").pointer(task) for task in 2 * WARM)
            found = await asyncio.gather(*many, return_exceptions=True)
            if not all(isinstance(one, StoreUnavailable) for one in found):
                wrong.append(f"cycle {cycle}: {Counter(type(one).__name__ for one in found)}")
            statuses[(await asking).status_code] += 1
            await pause
            if cycle % 5 == 2:
                await asyncio.to_thread(blocker.join)
            else:
                redis.go_on()
            if long is not None:
                await long
                waited = time.monotonic() - began
            backs.append(await asyncio.to_thread(until, lambda: not ask(http, "warm0").json().get("stale")))
            while not await store.ping():
                await asyncio.sleep(0.01)
        await endless.close()
        left = len(asyncio.all_tasks()) - tasks + 1  # the watcher of the endless one is gone
        await store.close()
        return left, waited

    with world(folder, "--enable-debug-command", "yes") as (redis, service, http):
        warm(http)
        with ThreadPoolExecutor(POOL) as many:  # as many connections as there ever will be
            list(many.map(lambda task: http.get(f"/v1/tasks/{task}"), 2 * WARM))
        before = service.descriptors, service.rss
        left, waited = asyncio.run(cycles(redis, http))
        time.sleep(0.5)
        grown, rss = service.descriptors - before[0], service.rss - before[1]
    if statuses.keys() != {200}:
        wrong.append(f"known tasks got {dict(statuses)}")
    if grown > POOL or left > 0:
        wrong.append(f"left behind: {grown} descriptors, {left} tasks")
    if waited < 0.5:
        wrong.append(f"without a deadline the wait was {waited:.2f} s only")
    if max(backs) > 2:
        missed.append("not back within 2 s")
    figures = {
        "back_p50_s": round(float(np.median(backs)), 2),
        "back_max_s": round(max(backs), 2),
        "descriptors_more": grown,
        "tasks_more": left,
        "rss_more_mb": round(rss / 1e6, 1),
    }
    control = {"without": "timeout_s=1000", "waited_s": round(waited, 2)}
    lost = sum(count for status, count in statuses.items() if status != 200)
    return Outcome(sum(statuses.values()), lost, control, figures, tuple(wrong[:10]), tuple(missed))


def teach_big(http: httpx.Client, task: str, seed: int) -> httpx.Response:
    """A task of some 100 kB, for its images are kept: Redis's own needs come and go by a tenth of that."""
    files = [(label, picture(label, seed=2 * seed + k, size=(128, 128))) for k, label in enumerate(("red", "blue"))]
    return http.put(f"/v1/tasks/{task}?retain=images", files=files)


def filled(http: httpx.Client, client: redis_py.Redis, name: str) -> tuple[dict[str, str], httpx.Response]:
    """Teaches big tasks until Redis has no room for more, or 40; what was acknowledged, and the last answer."""
    client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + 1_000_000)
    heads: dict[str, str] = {}
    for number in range(40):
        answer = teach_big(http, f"{name}x{number}", number)
        if answer.status_code != 201:
            break
        heads[answer.json()["task"]] = answer.json()["head"]
    return heads, answer


@fault("R5", n=20, quick=1)
def redis_full(n: int, seed: int, folder: Path) -> Outcome:
    """A full Redis refuses new tasks, keeps what it acknowledged, does the rest, and takes new ones when it can."""
    wrong: list[str] = []
    lost: list[str] = []
    acknowledged = 0
    with world(folder / "kept", "--maxmemory-policy", "noeviction") as (redis, service, http):
        with inspector(redis) as client:
            for cycle in range(n):
                heads, answer = filled(http, client, f"c{cycle}")
                wrong += filter(None, [refusal(answer)])
                if ready(http) != (200, "degraded"):
                    wrong.append(f"full and {ready(http)}")
                answers = [*(ask(http, task) for task in heads), http.get("/v1/tasks", params={"limit": 5})]
                acknowledged += len(heads)
                lost += gone(http, heads)
                answers += [http.delete(f"/v1/tasks/{task}") for task in heads]
                wrong += [f"full: {one.request.method} {one.status_code}" for one in answers if one.is_error]
                answer = teach_big(http, f"again{cycle}", cycle)
                if answer.status_code != 201:
                    wrong.append(f"with room again: {answer.status_code} {answer.text}")
        if "OutOfMemoryError" not in service.log.read_text():
            wrong.append("the log says nothing")
    control = asyncio.run(evicted(folder / "evicted"))
    if not control["lost"]:
        wrong.append("allkeys-lru lost nothing")
    return Outcome(acknowledged, len(lost), control, {}, tuple(wrong[:10]))


async def evicted(folder: Path) -> dict[str, Any]:
    """A store that does not look at the policy, over a Redis that evicts: what it acknowledged, and what is there."""
    folder.mkdir()
    with RedisServer(folder, "--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru") as redis:
        store = RedisStore(redis.url, key=PUBLIC_KEY, timeout_s=5)

        async def unseen(_: redis_asyncio.Redis) -> None:
            pass

        store.link._check = unseen  # type: ignore[method-assign]
        await store.open()
        for number in range(60):
            record, head_id, head = a_record(number)
            big = replace(record, images=(bytes(50_000), bytes(50_000)))
            await store.scope("t").commit(f"task{number}", big, head_id, head, expect=None)
        lost = 0
        for number in range(60):
            with contextlib.suppress(SealBroken):
                if await store.scope("t").record(f"task{number}") is not None:
                    continue
            lost += 1
        await store.close()
    return {"without": "a look at the policy", "acknowledged": 60, "lost": lost}


@fault("R6", n=3, quick=1)
def redis_evicts(n: int, seed: int, folder: Path) -> Outcome:
    """A Redis that may evict records is refused at the start, and found out within 30 s when it becomes one later."""
    wrong: list[str] = []
    missed: list[str] = []
    noticed: list[float] = []
    with world(folder / "later") as (redis, service, http), inspector(redis) as client:
        heads = warm(http, WARM[:5])
        for cycle in range(n):
            policy = ("allkeys-lru", "allkeys-lfu", "allkeys-random")[cycle % 3]
            client.config_set("maxmemory-policy", policy)
            noticed.append(until(lambda: ready(http) == (200, "degraded"), 40))  # nobody does anything else
            until(lambda name=policy: name in service.log.read_text())
            answer, known = teach(http, "new"), ask(http, "warm0")
            wrong += filter(None, [refusal(answer)])
            if policy not in answer.text or known.status_code != 200:
                wrong.append(f"{policy}: {answer.text}, known task {known.status_code}")
            metrics = http.get("/metrics").text
            if "fewshot_store_up 0.0" not in metrics:
                wrong.append("the metrics say that all is well")
            client.config_set("maxmemory-policy", "noeviction")
            until(lambda: ready(http) == (200, "ok"))
        lost = gone(http, heads)
        client.config_set("maxmemory-policy", "allkeys-lru")
        late = Service(folder / "late", redis_url=redis.url, store_timeout_s=5)
        try:
            late.start()
            wrong.append("it started")
        except AssertionError:
            if "maxmemory-policy allkeys-lru" not in late.log.read_text():
                wrong.append("the refusal to start says something else")
        finally:
            late.kill()
    if max(noticed) > 30:
        missed.append("noticed later than 30 s")
    control = asyncio.run(evicted(folder / "control"))
    if not control["lost"]:
        wrong.append("allkeys-lru lost nothing")
    return Outcome(
        len(heads), len(lost), control, {"noticed_s": [round(s, 1) for s in noticed]}, tuple(wrong), tuple(missed)
    )


PASSWORD = "a-word-that-nobody-may-read"


@fault("R7", n=10, quick=2)
def redis_password(n: int, seed: int, folder: Path) -> Outcome:
    """A Redis that does not let us in, or refuses a command, is asked now and then, told of, and used when it does."""
    wrong: list[str] = []
    missed: list[str] = []
    figures: dict[str, Any] = {}
    (folder / "redis").mkdir()
    (folder / "users.acl").write_text(
        f"user default on nopass ~* &* +@all\nuser fewshot on >{PASSWORD} ~fs:* resetchannels -@all +@all\n"
    )
    (folder / "password").write_text(PASSWORD)
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis", "--aclfile", str(folder / "users.acl")))
        client = stack.enter_context(inspector(redis))
        settings = {"redis_url": redis.url, "redis_user": "fewshot", "redis_password_file": folder / "password"}
        service = Service(folder / "service", **settings)
        http = stack.enter_context(service.client())

        def user(*rules: str) -> None:
            client.execute_command("ACL", "SETUSER", "fewshot", *rules)

        def out() -> None:
            client.client_kill_filter(_type="normal", skipme=True)

        def attempts() -> int:
            stats = client.info("stats")
            return int(stats["total_connections_received"]) + int(stats["rejected_connections"])

        def away(name: str, says: str, back: Callable[[], Any]) -> None:
            """Nobody gets in for n seconds, while clients go on asking."""
            until(lambda: ready(http)[1] == "degraded")
            start, already = time.monotonic(), attempts()
            while time.monotonic() < start + n:
                wrong.extend(filter(None, [refusal(teach(http, "new")), refusal(ask(http, "nobody"))]))
                if known and (ask(http, "warm0").status_code != 200 or ready(http) != (200, "degraded")):
                    wrong.append(f"{name}: a known task fails, or {ready(http)}")
                time.sleep(0.05)
            took = time.monotonic() - start
            figures[f"{name}_attempts_a_second"] = round((attempts() - already) / took, 2)
            if attempts() - already > took / redis_link.PAUSE_S + 1:
                wrong.append(f"{name}: {attempts() - already} attempts in {took:.1f} s")
            said = service.log.read_text().split("\n")
            if not any("Redis cannot be used" in line and says in line for line in said):
                wrong.append(f"{name}: the log does not say {says!r}")
            back()
            back_s = until(lambda: teach(http, "after").status_code in (200, 201))
            figures[f"{name}_back_s"] = round(back_s, 2)
            if back_s > 1:
                missed.append(f"{name}: back after {back_s:.2f} s")

        known = False
        user("resetpass", ">another")
        stack.callback(service.kill)
        service.start()
        away("wrong", "invalid username-password", lambda: user("resetpass", f">{PASSWORD}"))
        heads, known = warm(http, WARM[:5]), True
        user("resetpass", ">another")
        out()
        away("rotated", "invalid username-password", lambda: user("resetpass", f">{PASSWORD}"))
        client.config_set("maxclients", 1)
        out()
        away("maxclients", "max number of clients", lambda: client.config_set("maxclients", 1000))
        user("-set")
        until(lambda: bool(refusal(teach(http, "new"))) is False)
        found = ask(http, "warm1")
        if found.status_code != 200 or found.json().get("stale") or ready(http) != (200, "degraded"):
            wrong.append(f"without a right: known task {found.status_code}, {ready(http)}")
        user("+set")
        if teach(http, "right").status_code not in (200, 201):
            wrong.append("with the right again a task is refused")
        if n > 2:
            until(lambda: ready(http) == (200, "ok"))
        lost = gone(http, heads)
        said = service.log.read_text()
        if said.count("Redis refused a command: NoPermissionError") != 1 or "'set'" not in said:
            wrong.append("the log does not name the missing right, or more than once")
        if PASSWORD in said:
            wrong.append("the log holds the password")
        user("resetpass", ">another")
        control = asyncio.run(hasty(redis, attempts))
    if control["attempts_a_second"] < 3:
        wrong.append("without the pause there were as few attempts")
    return Outcome(len(heads), len(lost), control, figures, tuple(wrong[:10]), tuple(missed))


async def hasty(redis: RedisServer, attempts: Callable[[], int]) -> dict[str, Any]:
    """The same without the pause between two attempts."""
    pause, redis_link.PAUSE_S = redis_link.PAUSE_S, 0.0
    try:
        store = RedisStore(redis.url, key=b"any", user="fewshot", password=PASSWORD)
        await store.open()
        already = attempts()
        await asyncio.sleep(1)
        made = attempts() - already
        await store.close()
    finally:
        redis_link.PAUSE_S = pause
    return {"without": "the pause", "attempts_a_second": made}


# The way to Redis is cut: in process, and with values that name themselves.

TIMEOUT_S = 0.3
MANY = 500  # tasks
WORKERS = 250


def a_record(number: int) -> tuple[Record, str, Head]:
    labels = (f"label{number}", "other")
    features = np.full((2, 4), number % 1000, np.float16)
    record = Record("sha256:a", "ridge", labels, ("a", "b"), np.arange(2, dtype=np.int32), features, features[:0], 1.0)
    affine = Affine(np.full((2, 4), number, np.float32), np.zeros(2, np.float32))
    return record, f"hd_{number}", Head(affine, labels, (1, 1), "ridge", "sha256:a")


class Weather:
    """Chooses what happens to a piece: most of the time, nothing."""

    def __init__(self, seed: int, share: float):
        self.chance = random.Random(seed)
        self.share = share
        self.met: Counter[str] = Counter()

    def down(self) -> Toxic:
        if self.chance.random() >= self.share:
            return HARMLESS
        name = self.chance.choice(("cut", "cut one way", "reset", "hang", "slices", "late", "late and half"))
        self.met[name] += 1
        half = self.chance.random()
        return {
            "slices": Toxic(slice=1),
            "late": Toxic(delay_s=1.3 * TIMEOUT_S),  # the answer comes when nobody waits for it any more
            "late and half": Toxic(delay_s=0.9 * TIMEOUT_S, slice=7, rate=500),
        }.get(name, Toxic(share=half, then=name))

    def up(self) -> Toxic:
        if self.chance.random() >= self.share / 4:
            return HARMLESS
        self.met["request cut"] += 1
        return Toxic(share=self.chance.random(), then=self.chance.choice(("cut", "cut one way", "hang")))


@fault("G6", n=100_000, quick=4000)
def redis_cut(n: int, seed: int, folder: Path) -> Outcome:
    """However the way to Redis is cut, each operation ends within its deadline, and no answer goes to another one."""
    (folder / "redis").mkdir()
    with RedisServer(folder / "redis") as redis:
        counts, over, lag_s = asyncio.run(operations(n, seed, redis))
        naive = asyncio.run(careless(max(1000, n // 20), seed, redis))
    wrong = []
    if counts["right"] < 0.1 * n:
        wrong.append(f"only {counts['right']} of {n} were answered")
    if not naive.get("foreign"):
        wrong.append("connections that are used again after a timeout or a cancel gave no foreign answer")
    late = {name: round(seconds, 2) for name, seconds in over.items() if seconds > lag_s + 0.05}
    missed = [f"later than the deadline: {late}"] if late else []
    figures = {**counts, "most_over_deadline_s": round(max(over.values()), 2), "loop_lag_s": round(lag_s, 2)}
    return Outcome(counts["right"], counts["foreign"], naive, figures, tuple(wrong), tuple(missed))


ANSWERS = {"pointer": 2, "head": 1, "recall": 1, "remember": 3, "commit": 4, "record": 2}
LIMITS = {name: answers * TIMEOUT_S + redis_link.GRACE_S for name, answers in ANSWERS.items()}


async def operations(n: int, seed: int, redis: RedisServer) -> tuple[Counter[str], dict[str, float], float]:
    """n operations of many callers at once, some of whom leave.

    Returns how they ended, by how much the longest of each kind passed its deadline, and how late the loop itself was.
    """
    counts: Counter[str] = Counter()
    over, lag_s = dict.fromkeys(ANSWERS, -math.inf), 0.0
    chance, weather = random.Random(seed), Weather(seed, 0.02)
    proxy = await Proxy(redis.port).__aenter__()
    store = RedisStore(proxy.url, key=b"a key for tests", timeout_s=TIMEOUT_S, connections=64)
    # Each cut shuts the store for a moment: here, a short one, and without a word.
    pause, redis_link.PAUSE_S = redis_link.PAUSE_S, 0.01
    redis_link.log.disabled = True
    await store.open()
    scope = store.scope("t")
    for number in range(MANY):
        await scope.commit(f"task{number}", *a_record(number), expect=None)
        await scope.remember(f"task{number}", "key", f"value{number}".encode(), ttl_s=1000)
    proxy.down, proxy.up = weather.down, weather.up

    async def one(name: str, number: int) -> bool:
        """Whether the answer is the one to this question."""
        task, head_id = f"task{number}", f"hd_{number}"
        if name == "pointer":
            pointer = await scope.pointer(task)
            return pointer is not None and pointer.head == head_id
        if name == "head":
            head = await scope.head(head_id)
            return head is not None and head.labels[0] == f"label{number}"
        if name == "recall":
            return await scope.recall(task, "key") == f"value{number}".encode()
        if name == "record":
            found = await scope.record(task)
            return found is not None and found[1].labels[0] == f"label{number}"
        if name == "remember":
            return await scope.remember(task, "key", f"value{number}".encode(), ttl_s=1000) is True
        return (await scope.commit(task, *a_record(number), expect=None)).head == head_id

    async def work() -> None:
        while counts.total() < n:
            if store.link._closed:
                await asyncio.sleep(chance.uniform(0.01, 0.1))
                continue
            name = chance.choices(list(ANSWERS), (60, 12, 12, 4, 4, 8))[0]
            doing = asyncio.create_task(one(name, chance.randrange(MANY)))
            began = time.monotonic()
            leaves = chance.random() < 0.1
            try:
                done, _ = await asyncio.wait((doing,), timeout=chance.uniform(0, 0.02) if leaves else None)
                if not done:
                    doing.cancel()
                counts["right" if await doing else "foreign"] += 1
            except asyncio.CancelledError:
                counts["left"] += 1
            except SealBroken:
                counts["foreign"] += 1
            except FewshotError as error:
                counts["failed" if isinstance(error, StoreUnavailable) else type(error).__name__] += 1
            if not leaves:
                over[name] = max(over[name], time.monotonic() - began - LIMITS[name])

    async def late() -> None:
        nonlocal lag_s
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            lag_s = max(lag_s, time.monotonic() - began - 0.01)

    clock = asyncio.create_task(late())
    try:
        await asyncio.gather(*(work() for _ in range(WORKERS)))
    finally:
        clock.cancel()
        redis_link.PAUSE_S, redis_link.log.disabled = pause, False
        await store.close()
        await proxy.__aexit__()
    return counts + Counter({f"met {name}": count for name, count in weather.met.items()}), over, lag_s


async def careless(n: int, seed: int, redis: RedisServer) -> dict[str, Any]:
    """A client as one might write it: after a timeout or a cancel the connection goes back to the pool.

    It asks n times, and on until an answer went to another one: how soon that is, is chance. After 20 n it gives up.
    """
    counts: Counter[str] = Counter()
    chance, weather = random.Random(seed), Weather(seed, 0.02)
    with inspector(redis) as client:
        client.mset({f"plain{number}": f"value{number}" for number in range(MANY)})
    free: asyncio.LifoQueue[tuple[asyncio.StreamReader, asyncio.StreamWriter] | None] = asyncio.LifoQueue()
    for _ in range(POOL):
        free.put_nowait(None)
    proxy = await Proxy(redis.port).__aenter__()
    proxy.down = weather.down

    async def get(number: int) -> bytes:
        connection = await free.get() or await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            reader, writer = connection
            writer.write(f"GET plain{number}\r\n".encode())
            async with asyncio.timeout(TIMEOUT_S):
                size = await reader.readline()
                return (await reader.readexactly(int(size[1:]) + 2)).strip()
        except (ConnectionError, asyncio.IncompleteReadError, ValueError):
            connection[1].close()
            connection = None
            raise ConnectionError from None
        finally:
            free.put_nowait(connection)

    async def work() -> None:
        while counts.total() < (n if counts["foreign"] else 20 * n):
            number = chance.randrange(MANY)
            doing = asyncio.create_task(get(number))
            try:
                await asyncio.wait((doing,), timeout=chance.uniform(0, 0.02) if chance.random() < 0.1 else None)
                doing.cancel()
                counts["right" if await doing == f"value{number}".encode() else "foreign"] += 1
            except asyncio.CancelledError:
                counts["left"] += 1
            except (OSError, TimeoutError):
                counts["failed"] += 1

    await asyncio.gather(*(work() for _ in range(50)))
    while not free.empty():
        connection = free.get_nowait()
        if connection:
            connection[1].close()
            with contextlib.suppress(OSError):
                await connection[1].wait_closed()
    await proxy.__aexit__()
    return {"without": "dropping connections after a timeout or a cancel", **counts}


@fault("R13", n=12, quick=3)
def redis_emptied(n: int, seed: int, folder: Path) -> Outcome:
    """An emptied Redis, or another one in its place, is found out: nobody hears 404, and nothing is written to it."""
    wrong: list[str] = []
    missed: list[str] = []
    found_s: list[float] = []
    acknowledged = lost = 0
    with world(folder) as (redis, service, http), inspector(redis) as client:
        log, saved = folder / "redis" / "appendonlydir", folder / "saved"
        for cycle in range(n):
            heads = warm(http, [f"c{cycle}x{number}" for number in range(5)])
            task = next(iter(heads))
            kind = ("swapped", "restored empty", "flushed")[cycle % 3]
            if kind == "swapped":
                client.swapdb(0, 1)
            elif kind == "flushed":
                client.flushall()
            else:
                redis.kill()
                shutil.move(log, saved)
                redis.start()
            began = time.monotonic()
            answers = [
                ask(http, "nobody"),
                http.get("/v1/tasks"),
                http.get(f"/v1/tasks/{task}"),
                http.delete(f"/v1/tasks/{task}"),
                teach(http, "new", cycle),
                teach(http, task, cycle + 1),
            ]
            wrong += [f"{kind}: {text}" for answer in answers if (text := refusal(answer))]
            if "restart the service" not in answers[0].text:
                wrong.append(f"{kind}: the answer does not say what to do: {answers[0].text}")
            known = ask(http, task)
            if known.status_code != 200 or not known.json().get("stale") or ready(http) != (200, "degraded"):
                wrong.append(f"{kind}: a known task {known.status_code}, {ready(http)}")
            found_s.append(time.monotonic() - began)
            if client.dbsize():
                wrong.append(f"{kind}: written to the wrong store: {client.keys()}")
            if kind == "flushed":  # as the operator wanted it
                service.terminate()
                service.start()
                if ask(http, task).status_code != 404 or teach(http, "anew").status_code != 201:
                    wrong.append("a restart does not accept the new store")
                continue
            if kind == "swapped":
                client.swapdb(0, 1)
            else:
                redis.kill()
                shutil.rmtree(log)
                shutil.move(saved, log)
                redis.start()
            back_s = until(lambda: teach(http, "back").status_code in (200, 201))
            if back_s > 1:
                missed.append(f"{kind}: back after {back_s:.2f} s")
            acknowledged += len(heads)
            lost += len(gone(http, heads))
        control = asyncio.run(unmarked(redis))
    if not control["wrongly_none"] or not control["wrongly_acknowledged"]:
        wrong.append("without the mark nothing went wrong")
    return Outcome(acknowledged, lost, control, {"found_s": round(max(found_s), 2)}, tuple(wrong[:10]), tuple(missed))


async def unmarked(redis: RedisServer) -> dict[str, Any]:
    """The same with a store that does not look at the mark."""

    class Trusting(RedisStore):
        def recognise(self, mark: bytes | None) -> None:
            pass

    store = Trusting(redis.url, key=b"a key for tests")
    await store.open()
    scope = store.scope("t")
    await scope.commit("task", *a_record(1), expect=None)
    with inspector(redis) as client:
        client.flushall()
    none = await scope.pointer("task") is None
    told = (await scope.commit("other", *a_record(2), expect=None)).version == 1
    await store.close()
    return {"without": MARK, "wrongly_none": int(none), "wrongly_acknowledged": int(told)}
