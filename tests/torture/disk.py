"""Disks that are full, fail or lose what was not synced, a log that is damaged, and a cache that is wiped.

The clients and what they know are those of durability.py. What a disk had synced is read from the system calls of the
process, which strace writes down; a power cut leaves that, and of the rest whatever it likes.
"""

from __future__ import annotations

import random
import re
import resource
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
from redis import Redis

from tests.redis_server import RedisServer
from tests.torture.durability import CLAIMS, EARLY, PROBES, School, calm, recovered, rounded, told, traced, variant
from tests.torture.line import Outcome, fault
from tests.torture.world import RAW, Service, support, tool

GIVEN_BACK = resource.RLIM_INFINITY
DEAF = ["sh", "-c", 'trap "" XFSZ; exec "$@"', "sh"]  # a file that may not grow is an error then, and no signal
NORMAL = """
from service.stores.sqlite import SqliteStore
prepare = SqliteStore._prepare
def lax(self):
    prepare(self)
    self._writer.execute("PRAGMA synchronous = NORMAL")
SqliteStore._prepare = lax
"""


class WrappedRedis(RedisServer):
    def __init__(self, folder: Path, wrapper: Sequence[str], *options: str):
        folder.mkdir()
        super().__init__(folder, *options)
        self._command = [*wrapper, *self._command]
        self.folder = folder

    @property
    def log(self) -> Path:
        """What was appended since the last rewrite."""
        (found,) = (self.folder / "appendonlydir").glob("*.incr.aof")
        return found


def limit_files(pid: int, size: int) -> None:
    """No file of the process grows beyond it; lifted again without a restart."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, GIVEN_BACK))


def largest(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def patience(school: School, done: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not done():
        assert time.monotonic() < give_up, f"{school.refused} {school.wrong}"
        time.sleep(0.01)


@contextmanager
def no_space(service: Service, kind: str, dice: random.Random) -> Iterator[None]:
    """From some moment on the disk is full (limit: within a write, ENOSPC: before one), or answers EIO."""
    assert service.process is not None
    pid = service.process.pid
    if kind == "limit":
        wal = service.folder / "data" / "fewshot.sqlite3-wal"
        limit_files(pid, max(wal.stat().st_size, service.log.stat().st_size) + dice.randrange(40_000))
        yield
        if service.process is not None:
            limit_files(pid, GIVEN_BACK)
    else:
        calls = "pwrite64" if kind == "ENOSPC" else "pwrite64,fdatasync"
        fail = f"inject={calls}:error={kind}:when={dice.randint(1, 30)}+"
        with traced(pid, "-e", f"trace={calls}", "-e", fail):
            yield


def fill_sqlite(n: int, seed: int, folder: Path, *lines: str) -> tuple[School, list[float]]:
    """n times a full disk under load; every other time the service is killed before there is space again."""
    dice, times = random.Random(seed), []
    with Service(folder, wrapper=variant(CLAIMS, *lines)) as service:
        school = School(service.url, seed)
        for k in range(n):
            with school.at_work():
                time.sleep(0.1)
                school.acknowledges()
                school.deletes = False  # which would make room
                with no_space(service, ("limit", "ENOSPC", "EIO")[k % 3], dice):
                    refused = school.refused.total()
                    if lines:  # who acknowledges too early refuses nothing
                        school.acknowledges()
                    else:
                        patience(school, lambda refused=refused: school.refused.total() > refused)
                        school.deletes = True
                        time.sleep(0.2)
                    if k % 2 or lines:
                        service.kill()
                if service.process is None:
                    service.start()
                times.append(recovered(service.url))
                school.deletes = True
            school.settle()
        service.terminate()
    with closing(sqlite3.connect(folder / "data" / "fewshot.sqlite3")) as db:
        (state,) = db.execute("PRAGMA integrity_check").fetchone()
    if state != "ok":
        school.wrong.append(f"the file is damaged: {state}")
    return school, times


@fault("G3", n=50, quick=3)
def disk_full_sqlite(n: int, seed: int, folder: Path) -> Outcome:
    """A disk that is full or fails refuses changes, answers questions, and loses nothing; space is all it needs.

    Files that may not grow, ENOSPC and EIO, from a random write on. The control acknowledges before it commits.
    """
    school, times = fill_sqlite(n, seed, folder / "service")
    calm(school)
    control, _ = fill_sqlite(1, seed, folder / "control", EARLY)
    return told(school, control, recovered_s=rounded(times))


def ended(redis: RedisServer, service: Service) -> bool:
    """Asks for one more change, for the clients may have none that is not in doubt, and looks whether Redis is gone."""
    with service.client() as http:
        http.put("/v1/tasks/recovered", files=support(time.time_ns() % 10**6))
    return redis._process.poll() is not None


def fill_redis(n: int, seed: int, folder: Path, *options: str) -> tuple[School, list[float]]:
    """n times a full disk of Redis under load; every third time it is restarted once before there is space again."""
    folder.mkdir()
    dice, times = random.Random(seed), []
    with (
        WrappedRedis(folder / "redis", DEAF, *options) as redis,
        Service(folder / "service", wrapper=variant(CLAIMS), redis_url=redis.url) as service,
    ):
        school = School(service.url, seed)
        for k in range(n):
            with school.at_work():
                time.sleep(0.1)
                school.acknowledges()
                for full in range(2 if k % 3 == 2 else 1):
                    if full:
                        redis.start()
                    limit_files(redis._process.pid, largest(redis.folder) + dice.randrange(40_000))
                    refused = school.refused.total()
                    if options:  # it goes on, and refuses
                        patience(school, lambda refused=refused: school.refused.total() > refused)
                    else:
                        patience(school, lambda: ended(redis, service))
                time.sleep(0.2)
                redis.kill()
                redis.start()
                times.append(recovered(service.url))
            school.settle()
    return school, times


@fault("G3", n=50, quick=2)
def disk_full_redis(n: int, seed: int, folder: Path) -> Outcome:
    """A Redis whose disk is full ends; questions are answered, changes refused, and its restart with space is enough.

    The control syncs once a second: it goes on, and what it acknowledged as the disk became full is in memory alone.
    """
    school, times = fill_redis(n, seed, folder / "always")
    calm(school)
    control = School("", seed)
    for attempt in range(5):  # that one write may have been of no consequence
        if not control.lost:
            control, _ = fill_redis(1, seed + attempt, folder / f"everysec{attempt}", "--appendfsync", "everysec")
    missed = [f"recovered after {t:.3f} s, not 1" for t in times if t > 1]
    return told(school, control, missed=missed, recovered_s=rounded(times))


# Power cuts.

CALL = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\(\d+<(?P<file>[^>]+)>(?P<rest>.*)")
RESUMED = re.compile(r"(?P<thread>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)")
DONE = re.compile(r" = \d+$")
VALUE = re.compile(rb"\$(\d+)\r\n(?=fs1\0)")  # a sealed one in the log of Redis; the first is the mark of the store


def tracer(log: Path) -> list[str]:
    """Writes down which bytes of files are written and synced; the process is started by it, but not its child."""
    calls = "trace=write,pwrite64,fdatasync,fsync"
    return [tool("strace"), "-D", "-f", "--seccomp-bpf", "-y", "-s", "0", "-e", calls, "-o", str(log)]


def unsynced(log: Path, file: Path, pid: int) -> list[tuple[int, int]]:
    """Where (0 for what is appended), and how many bytes, a killed process wrote after its last sync of a file."""
    give_up = time.monotonic() + 30
    while not re.search(rf"^{pid} +\+\+\+ killed", text := log.read_text(), re.MULTILINE):
        assert time.monotonic() < give_up, "strace does not end"
        time.sleep(0.01)
    written: list[tuple[int, int]] = []
    begun: dict[str, tuple[str, str, int]] = {}  # of calls that others came between: how they began, and after what
    for line in text.splitlines():
        call, resumed = CALL.match(line), RESUMED.match(line)
        if call is not None and call["file"] == str(file):
            name, rest, before = call["name"], call["rest"], len(written)
        elif resumed is not None and resumed["thread"] in begun:
            name, rest, before = begun.pop(resumed["thread"])
            rest += resumed["rest"]
        else:
            continue
        if not DONE.search(rest):  # or never, and then it may not have been done at all
            begun[line.split()[0]] = name, rest, before
        elif name in ("write", "pwrite64"):
            numbers = [int(number) for number in re.findall(r", (\d+)", rest)]
            written.append((numbers[1] if name == "pwrite64" else 0, numbers[0]))
        else:
            written = written[before:]
    return written


def cut_sqlite(folder: Path, trace: Path, pid: int, dice: random.Random) -> int:
    """Leaves of each write that was not synced all, half or nothing; how many bytes went."""
    gone = 0
    for name in ("fewshot.sqlite3", "fewshot.sqlite3-wal"):
        with (folder / name).open("r+b") as file:
            size = file.seek(0, 2)
            for offset, length in unsynced(trace, folder / name, pid):
                keep = dice.choice((0, 0, length // 2, length))
                file.seek(offset + keep)
                count = max(0, min(length - keep, size - offset - keep))
                file.write(bytes(count))
                gone += count
    (folder / "fewshot.sqlite3-shm").unlink(missing_ok=True)
    return gone


def cut_redis(redis: WrappedRedis, trace: Path, pid: int, dice: random.Random) -> int:
    """Cuts the log behind what was synced, or within what was not, but never before the mark of the store.

    Where an fsync a second had not come to the mark yet, the service would refuse its store, which is another fault.
    """
    loose = sum(length for _, length in unsynced(trace, redis.log, pid))
    size = redis.log.stat().st_size
    mark = VALUE.search(redis.log.read_bytes())
    assert mark is not None
    synced = max(size - loose, mark.end() + int(mark[1]) + len(b"\r\n"))
    keep = dice.choice((synced, dice.randint(synced, size)))
    with redis.log.open("r+b") as file:
        file.truncate(keep)
    return size - keep


def cut_services(n: int, seed: int, folder: Path, *lines: str) -> tuple[School, int]:
    dice, gone, trace = random.Random(seed), 0, folder / "trace"
    with Service(folder, wrapper=[*tracer(trace), *variant(CLAIMS, *lines)]) as service:
        school = School(service.url, seed)
        school.deletes = not lines  # they sync what was there before
        for _ in range(n):
            assert service.process is not None
            pid = service.process.pid
            with school.at_work():
                time.sleep(dice.uniform(0.1, 0.5))
                school.acknowledges()
                service.kill()
            gone += cut_sqlite(folder / "data", trace, pid, dice)
            service.start()
            school.settle()
    return school, gone


def cut_redises(n: int, seed: int, folder: Path, *options: str) -> tuple[School, int]:
    folder.mkdir()
    dice, gone, trace = random.Random(seed), 0, folder / "trace"
    with (
        WrappedRedis(folder / "redis", tracer(trace), *options) as redis,
        Service(folder / "service", wrapper=variant(CLAIMS), redis_url=redis.url) as service,
    ):
        school = School(service.url, seed)
        for _ in range(n):
            pid = redis._process.pid
            with school.at_work():
                time.sleep(dice.uniform(0.1, 0.5))
                school.acknowledges()
                redis.kill()
            gone += cut_redis(redis, trace, pid, dice)
            redis.start()
            recovered(service.url)
            school.settle()
    return school, gone


@fault("G3", n=50, quick=2)
def power_loss_sqlite(n: int, seed: int, folder: Path) -> Outcome:
    """After a power cut the own store has all that was acknowledged: it was synced before.

    The control syncs its log only now and then (synchronous NORMAL).
    """
    school, gone = cut_services(n, seed, folder / "service")
    control, _ = cut_services(max(1, n // 20), seed, folder / "control", NORMAL)
    return told(school, control, unsynced_bytes_lost=gone)


@fault("G3", n=50, quick=2)
def power_loss_redis(n: int, seed: int, folder: Path) -> Outcome:
    """After a power cut Redis has all that was acknowledged: it was synced before.

    The control syncs once a second.
    """
    school, gone = cut_redises(n, seed, folder / "always")
    control, _ = cut_redises(max(2, n // 20), seed, folder / "everysec", "--appendfsync", "everysec")
    return told(school, control, unsynced_bytes_lost=gone)


# Damage to what is stored.

UNSEALED = """
from service.stores.seal import SEAL, Sealer
Sealer.open = lambda self, data, *place: data[len(SEAL) + 32:]
"""
Said = tuple[int, str, list[dict[str, Any]]]


class Damage:
    """A Redis with some tasks at their third version, whose log is damaged and put right again."""

    def __init__(self, redis: WrappedRedis, service: Service, dice: random.Random):
        self.redis, self.service, self.dice = redis, service, dice
        self.states: dict[str, list[Said]] = {}  # of each task, as acknowledged, the last one last
        for version in range(3):
            for k in range(6):
                self.before = redis.log.stat().st_size
                with service.client() as http:
                    assert http.put(f"/v1/tasks/d{k}", files=support(10 * k + version)).is_success
                    self.states.setdefault(f"d{k}", []).append(self._said(http, f"d{k}"))
        redis.kill()
        self.pristine = redis.log.read_bytes()
        self.values = [*VALUE.finditer(self.pristine)][1:]  # the first is the mark of the store

    def _said(self, http: httpx.Client, task: str) -> Any:
        answer = http.post(f"/v1/tasks/{task}/classify", files=PROBES)
        body: dict[str, Any] = answer.json()
        if answer.status_code == 200:
            return body["version"], body["head"], body["predictions"]
        return answer.status_code

    def cut(self) -> bytes:
        """The last change is not there whole."""
        return self.pristine[: self.dice.randrange(self.before, len(self.pristine))]

    def anywhere(self) -> bytes:
        return self._flipped([self.dice.randrange(len(self.pristine)) for _ in range(3)])

    def in_values(self) -> bytes:
        """In every fifth of them."""
        some = [value for value in self.values if self.dice.random() < 0.2]
        return self._flipped([value.end() + self.dice.randrange(int(value[1])) for value in some])

    def _flipped(self, places: list[int]) -> bytes:
        damaged = bytearray(self.pristine)
        for place in places:
            damaged[place] ^= 1 << self.dice.randrange(8)
        return bytes(damaged)

    def answers(self, log: bytes, service: Service) -> dict[str, Any] | None:
        """What each task says over such a log, or the status that refuses it; None when Redis does not start."""
        self.redis.log.write_bytes(log)
        try:
            self.redis.start()
        except AssertionError:
            return None
        else:
            with service.client() as http:
                give_up = time.monotonic() + 3  # a log without what marks the store as ours is refused for good
                while not http.get("/readyz").json()["store"] and time.monotonic() < give_up:
                    time.sleep(0.02)
                return {task: self._said(http, task) for task in self.states}
        finally:
            self.redis.kill()


@fault("G5", n=40, quick=3)
def aof_damage(n: int, seed: int, folder: Path) -> Outcome:
    """A log of Redis that is cut loses the change that it was cut in, and no flipped byte changes an answer.

    A damaged task is refused, or is what it was at an earlier version. The control does not look at seals.
    """
    wrong, outcomes, accepted = [], Counter[str](), 0
    with (
        WrappedRedis(folder / "redis", ()) as redis,
        Service(folder / "service", redis_url=redis.url, lru_heads=1) as service,
    ):
        damage = Damage(redis, service, random.Random(seed))
        *_, last = damage.states
        for k in range(n):
            kind = ("cut", "in_values", "anywhere")[k % 3]
            found = damage.answers(getattr(damage, kind)(), service)
            if found is None:
                outcomes["redis refused to start"] += 1
                if kind == "cut":
                    wrong.append("Redis does not start with a log that was cut")
                continue
            for task, said in found.items():
                states = damage.states[task]
                now = "as it was" if said == states[-1] else "as before" if said in states else str(said)
                outcomes[f"{kind}: {now}" if len(now) < 10 else f"{kind}: another answer"] += 1
                allowed = said in states or said in (404, 409, 503)
                if kind == "cut":
                    allowed = said in (states[-2:] if task == last else states[-1:])
                if not allowed:
                    wrong.append(f"{kind}: {task} said {str(said)[:99]}")
        with Service(folder / "control", wrapper=variant(UNSEALED), redis_url=redis.url, lru_heads=1) as blind:
            for _ in range(5):
                said = damage.answers(damage.in_values(), blind) or {}
                accepted += sum(one not in (*damage.states[task], 404, 409, 503) for task, one in said.items())
                if accepted:
                    break
    if not accepted:
        wrong.append("without seals every answer was right")
    control = {"answers changed": accepted}
    return Outcome(outcomes.total(), len(wrong), control, {"outcomes": outcomes}, tuple(wrong[:5]))


ALONE = """
from service.flights import Flights
Flights.once = lambda self, key, work: work()
"""
ASKERS = 10


def asked(urls: Sequence[str], tasks: int) -> tuple[list[float], list[list[Any]]]:
    """Everybody asks the same question about one task after the other, at the same time: seconds, and answers."""
    times: list[float] = []
    answers: list[list[Any]] = [[] for _ in range(tasks)]
    together = threading.Barrier(ASKERS, timeout=60)

    def work(url: str) -> None:
        with httpx.Client(base_url=url, timeout=30) as http:
            for task in range(tasks):
                together.wait()
                start = time.perf_counter()
                answer = http.post(f"/v1/tasks/w{task}/classify", content=PROBES[1][1], headers=RAW)
                times.append(time.perf_counter() - start)
                said = answer.json()
                answers[task].append([said.get(key) for key in ("version", "head", "predictions")])

    with ThreadPoolExecutor(ASKERS) as pool:
        list(pool.map(work, [urls[k % len(urls)] for k in range(ASKERS)]))
    return times, answers


def wipe(tasks: int, folder: Path, *lines: str, replicas: int, lru_heads: int) -> dict[str, Any]:
    """Replicas are asked about all tasks, lose every head, and are asked again; how often a head was made again."""
    folder.mkdir()
    with RedisServer(folder) as redis, ExitStack() as stack, closing(Redis.from_url(redis.url)) as inside:
        settings = {"wrapper": variant(*lines), "redis_url": redis.url, "lru_heads": lru_heads}
        services = [stack.enter_context(Service(folder / str(k), **settings)) for k in range(replicas)]
        urls = [service.url for service in services]
        with services[0].client() as http, ThreadPoolExecutor(4) as pool:
            taught = pool.map(lambda k: http.put(f"/v1/tasks/w{k}", files=support(k, shots=1)), range(tasks))
            assert all(answer.is_success for answer in taught)
        asked(urls, tasks)
        warm, before = asked(urls, tasks)
        if lru_heads > 1:  # else there is nothing in memory
            for service in services:
                service.kill()
                service.start()
        heads = list(inside.scan_iter("fs:*:h:*", count=1000))
        inside.delete(*heads)
        inside.config_resetstat()
        cold, after = asked(urls, tasks)
        made = inside.info("commandstats").get("cmdstat_set", {}).get("calls", 0)  # nothing else is written
    p99 = [round(sorted(times)[int(0.99 * len(times))], 4) for times in (warm, cold)]
    wrong = sum(one != right[0] for said, right in zip(after, before, strict=True) for one in said)
    return {"heads": len(heads), "made_again": made, "wrong": wrong, "warm_p99_s": p99[0], "cold_p99_s": p99[1]}


@fault("G12", n=10_000, quick=200)
def wiped_cache(n: int, seed: int, folder: Path) -> Outcome:
    """A wiped cache costs time: every answer is right, and a replica makes a head again once, however many wait.

    Ten askers on two replicas, a tenth as many tasks as questions. In the control each asker makes it for himself.
    """
    tasks = n // ASKERS
    found = wipe(tasks, folder / "service", replicas=2, lru_heads=4096)
    control = wipe(20, folder / "control", ALONE, replicas=1, lru_heads=1)
    wrong, missed = [], []
    if found["heads"] != tasks:
        wrong.append(f"{found['heads']} heads were wiped, not one for each task")
    if not 0 < found["made_again"] <= 2 * tasks:
        wrong.append(f"{found['made_again']} heads were made again for {tasks} tasks on two replicas")
    if control["made_again"] <= 20:
        wrong.append("without sharing, no more heads were made again than with it")
    if found["cold_p99_s"] > 5 * found["warm_p99_s"]:
        missed.append(f"p99 {found['cold_p99_s']} s is more than 5 times {found['warm_p99_s']} s")
    lost = found.pop("wrong")
    return Outcome(
        ASKERS * tasks, lost, {"tasks": 20, **control}, {"tasks": tasks, **found}, tuple(wrong), tuple(missed)
    )
