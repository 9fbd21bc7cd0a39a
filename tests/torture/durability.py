"""What was acknowledged is there: after kill -9 of the service and of Redis, at random moments under load.

Each client owns its tasks and changes them one after the other, so it knows what every one of them has to be: what was
acknowledged, or, where an answer is missing, that or the whole change. What it knows is kept in this process, which
nobody kills. Disks that fail are in disk.py.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.fakes import picture
from tests.redis_server import RedisServer
from tests.torture.line import Outcome, fault
from tests.torture.world import Service, support, tool

Images = list[tuple[str, bytes]]
PROBES: Images = [("query", picture(colour, seed=1)) for colour in ("red", "purple")]

# Variants of the service, by a few lines of Python that are run before it.
CLAIMS = """
import service.web.idempotency as it
it.CLAIM_S = 1  # else a retry after a kill has to wait a minute
import service.stores.record as record
record.LEAST, record.MOST_NEW = 2, 9  # these tasks are small, and are to be written as differences all the same
"""
EARLY = """
import asyncio
from service.stores import Pointer
from service.stores.lru import RecentScope
commit, later = RecentScope.commit, set()
async def early(self, task, record, head_id, head, *, expect, **named):  # acknowledges first, and commits then
    at = await self._beneath.pointer(task)
    async def then():
        await asyncio.sleep(0.25)  # longer than a busy machine needs for a kill
        await commit(self, task, record, head_id, head, expect=None, **named)
    later.add(asyncio.create_task(then()))
    return Pointer((at.version if at else 0) + 1, head_id)
RecentScope.commit = early
"""


def variant(*lines: str) -> list[str]:
    """What a Service is started by instead."""
    run = "import runpy; runpy.run_module('service', run_name='__main__')"
    return [sys.executable, "-uc", "\n".join((*lines, run))]


@dataclass(frozen=True)
class Change:
    kind: str  # put, add or delete
    sent: Images
    examples: Images  # what the task is made of once it is done
    key: str = ""

    def ask(self, http: httpx.Client, name: str) -> httpx.Response:
        if self.kind == "delete":
            return http.delete(f"/v1/tasks/{name}")
        if self.kind == "put":
            return http.put(f"/v1/tasks/{name}", files=self.sent)
        headers = {"Idempotency-Key": self.key}
        if int(self.key[1:]) % 2:  # learned behind the answer
            headers["Prefer"] = "return=minimal"
        return http.post(f"/v1/tasks/{name}/examples", files=self.sent, headers=headers)


@dataclass
class Task:
    """What its client knows of a task."""

    name: str
    version: int = 0  # the last one acknowledged; 0: there is none
    examples: Images = field(default_factory=list)
    doubt: Change | None = None  # sent, and not acknowledged
    answered: tuple[Change, int] | None = None  # an acknowledged change with an Idempotency-Key, and its version


def body(answer: httpx.Response) -> dict[str, Any]:
    """What it says. Raises ValueError, which tells the answer, when that is no JSON."""
    try:
        said: dict[str, Any] = answer.json()
    except ValueError:
        what = f"{answer.request.method} {answer.request.url.path}"
        raise ValueError(f"{what} was answered {answer.status_code} {answer.headers} {answer.text[:99]!r}") from None
    return said


class School:
    """Clients who teach, take back and ask until they are told to stop, and then look whether all of it is there.

    The first task of each teacher is never deleted: those are asked about.
    """

    def __init__(self, url: str, seed: int, *, teachers: int = 3, tasks: int = 3):
        self.url = url
        self.classes = [[Task(f"t{k}-{j}") for j in range(tasks)] for k in range(teachers)]
        self.acknowledged = self.lost = 0
        self.deletes = True
        self.wrong: list[str] = []
        self.refused: Counter[str] = Counter()  # changes
        self.asked: Counter[str] = Counter()  # classifies, by status
        self._dice = random.Random(seed)
        self._numbers = itertools.count(1000 * seed)
        self._answers: dict[str, list[dict[str, float]]] = {}  # of each head to the probes
        self._seen: dict[str, int] = {}  # the newest version that somebody was answered with
        self._lock = threading.Lock()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Everybody works while the block runs."""
        stop = threading.Event()
        works = [lambda http, dice, tasks=tasks: self._teach(http, dice, tasks) for tasks in self.classes] + [self._ask]
        threads = [
            threading.Thread(target=self._until, args=(stop, work, random.Random(self._dice.random())))
            for work in works
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _until(self, stop: threading.Event, work: Any, dice: random.Random) -> None:
        with httpx.Client(base_url=self.url, timeout=20) as http:
            while not stop.is_set():
                try:
                    work(http, dice)
                except httpx.HTTPError:  # the service is gone
                    stop.wait(0.01)
                except Exception as error:  # whatever it is, a thread would take it along
                    self.wrong.append(f"a client met {error!r}")
                    return

    def _teach(self, http: httpx.Client, dice: random.Random, tasks: list[Task]) -> None:
        free = [task for task in tasks if task.doubt is None]
        if not free:  # all that is left to do is to see what came of it
            time.sleep(0.01)
            return
        task = dice.choice(free)
        sent, luck = support(next(self._numbers), shots=1), dice.random()
        if task.version == 0 or luck < 0.5 or len(task.examples) > 10:
            task.doubt = Change("put", sent, sent)
        elif luck < 0.8 or task is tasks[0] or not self.deletes:
            task.doubt = Change("add", sent, task.examples + sent, key=f"k{next(self._numbers)}")
        else:
            task.doubt = Change("delete", [], [])
        answer = task.doubt.ask(http, task.name)
        if answer.is_success:
            self._acknowledge(task, answer)
        else:
            with self._lock:
                self.refused[f"{answer.status_code} {body(answer)['code']}"] += 1

    def _acknowledge(self, task: Task, answer: httpx.Response) -> None:
        assert task.doubt is not None
        change, task.doubt = task.doubt, None
        version = 0 if change.kind == "delete" else task.version + 1
        told = body(answer)["version"] if version else 0
        with self._lock:
            self.acknowledged += 1
            if told != version:
                self.wrong.append(f"{change.kind} made version {told} of {task.name}, not {version}")
        task.version, task.examples = told, change.examples
        if change.kind == "add":
            task.answered = change, told
        elif change.kind == "delete":  # which forgets the answers as well
            task.answered = None

    def _ask(self, http: httpx.Client, dice: random.Random) -> None:
        known = [tasks[0] for tasks in self.classes if tasks[0].version]
        if not known:
            time.sleep(0.01)
            return
        task = dice.choice(known)
        version, doubt = task.version, task.doubt
        least = max(self._seen.get(task.name, 0), task.version)
        answer = http.post(f"/v1/tasks/{task.name}/classify", files=PROBES)
        self.asked[str(answer.status_code)] += 1
        if answer.status_code == 200:
            said = body(answer)
            self._same(said, least, task.name)
            self._seen[task.name] = max(least, said["version"])
        elif (version, None, None) == (task.version, doubt, task.doubt):  # nobody is changing it
            self.wrong.append(f"{task.name} at version {version} was answered {answer.text[:99]}")

    def _same(self, said: dict[str, Any], least: int, name: str) -> None:
        """Versions do not go back, and a head answers what it always answered."""
        if said["version"] < least:
            self.wrong.append(f"{name} was at version {least} and is at {said['version']}")
        answers = [one["probabilities"] for one in said["predictions"]]
        if self._answers.setdefault(said["head"], answers) != answers:
            self.wrong.append(f"{said['head']} of {name} answers otherwise than before")

    def acknowledges(self, limit_s: float = 60) -> None:
        """Returns right after an acknowledgement."""
        before, give_up = self.acknowledged, time.monotonic() + limit_s
        while self.acknowledged == before:
            assert time.monotonic() < give_up, f"nothing is acknowledged: {self.refused} {self.wrong}"
            time.sleep(0.001)

    def settle(self) -> None:
        """Looks at every task; what is in doubt is asked for again until it is done."""
        with httpx.Client(base_url=self.url, timeout=20) as http:
            for tasks in self.classes:
                for k, task in enumerate(tasks):
                    if not self._found(http, task):  # nobody knows any more what it has to be
                        tasks[k] = Task(f"t{next(self._numbers)}")
                    elif task.doubt is not None:
                        self._again(http, task)
                    elif task.answered is not None:
                        self._replayed(http, task)

    def _found(self, http: httpx.Client, task: Task) -> bool:
        """Whether it is wholly what was acknowledged, or wholly what was in doubt."""
        answer = http.post(f"/v1/tasks/{task.name}/classify", files=PROBES)
        said: dict[str, Any] = answer.json()
        version = said["version"] if answer.status_code == 200 else 0
        expected = {task.version: task.examples}
        if task.doubt is not None:
            expected.setdefault(0 if task.doubt.kind == "delete" else task.version + 1, task.doubt.examples)
        if answer.status_code not in (200, 404) or version not in expected:
            self.lost += max(1, task.version - version)
            sent = task.doubt.kind if task.doubt else "nothing"
            where = f"{version} (status {answer.status_code})"
            self.wrong.append(f"{task.name} is at {where}; acknowledged was {task.version}, and {sent} was sent")
            return False
        if version:
            self._same(said, self._seen.get(task.name, 0), task.name)
            # The same support set in one call passes no store: so it tells what has to be there.
            made = http.post("/v1/classify", files=[*expected[version], *PROBES]).json()
            if [made[key] for key in ("head", "predictions")] != [said[key] for key in ("head", "predictions")]:
                self.lost += 1
                self.wrong.append(f"{task.name} is at version {version}, but is not what was sent")
                return False
        return True

    def _again(self, http: httpx.Client, task: Task) -> None:
        """A retry, and one too many, move the version by exactly one from what was acknowledged."""
        assert task.doubt is not None
        change, version = task.doubt, task.version + 1
        for first in (True, False):
            answer = self._patiently(http, task.name, change)
            if change.kind == "delete":
                if answer.status_code not in (204, 404):
                    self.wrong.append(f"a retried delete was answered {answer.status_code}")
            elif not answer.is_success or answer.json()["version"] != version:
                self.wrong.append(f"a retried {change.kind} was answered {answer.text[:99]}, not version {version}")
                return
            if first:
                self.acknowledged += 1
        task.doubt, task.examples = None, change.examples
        task.version = 0 if change.kind == "delete" else version
        task.answered = (change, version) if change.kind == "add" else task.answered if task.version else None

    def _replayed(self, http: httpx.Client, task: Task) -> None:
        """What was answered is answered again, and not done again: the next look at the task would find it."""
        assert task.answered is not None
        change, version = task.answered
        answer = self._patiently(http, task.name, change)
        if answer.headers.get("idempotent-replayed") != "true" or answer.json()["version"] != version:
            self.wrong.append(f"the answer about version {version} of {task.name} is forgotten: {answer.text[:99]}")

    def _patiently(self, http: httpx.Client, name: str, change: Change) -> httpx.Response:
        give_up = time.monotonic() + 10
        while True:
            answer = change.ask(http, name)
            if answer.status_code not in (409, 503) or time.monotonic() > give_up:  # 409: its claim has not ended
                return answer
            time.sleep(0.05)


def told(school: School, control: School, *, missed: Sequence[str] = (), **figures: object) -> Outcome:
    blind = () if control.lost else ("the control lost nothing",)
    return Outcome(
        school.acknowledged,
        school.lost,
        {"acknowledged": control.acknowledged, "lost": control.lost},
        {"refused": school.refused, "classified": school.asked, **figures},
        (*school.wrong[:5], *blind),
        tuple(missed),
    )


def calm(school: School) -> None:
    """What was refused was refused as it should be."""
    if set(school.refused) - {"503 store_unavailable"} or set(school.asked) - {"200", "503"}:
        school.wrong.append(f"classifies were answered {school.asked}, changes {school.refused}")


def rounded(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"p50": round(ordered[len(ordered) // 2], 3), "max": round(ordered[-1], 3)}


def kill_services(
    n: int, seed: int, folder: Path, *lines: str, tasks: int = 3, **settings: object
) -> tuple[School, list[float]]:
    """Under load, n kill -9 of a service and n restarts; and the seconds that each of those took.

    Every other time right after an acknowledgement, which is when one that came too early is found out.
    """
    dice, starts = random.Random(seed), []
    with Service(folder, wrapper=variant(CLAIMS, *lines), **settings) as service:
        school = School(service.url, seed, tasks=tasks)
        for k in range(n):
            with school.at_work():
                time.sleep(dice.uniform(0.1, 1.2))
                if k % 2 == 0:
                    school.acknowledges()
                service.kill()
            starts.append(service.start())
            school.settle()
    return school, starts


def late(starts: Sequence[float]) -> list[str]:
    return [f"ready after {start:.1f} s, not 10" for start in starts if start > 10]


@fault("G1", n=200, quick=2)
def kill_service_sqlite(n: int, seed: int, folder: Path) -> Outcome:
    """A service with its own store that is killed at any moment has lost nothing that it acknowledged.

    The control acknowledges before it commits.
    """
    school, starts = kill_services(n, seed, folder / "service")
    control, _ = kill_services(max(1, n // 20), seed, folder / "control", EARLY, tasks=20)
    return told(school, control, missed=late(starts), ready_s=rounded(starts))


@fault("G1", n=200, quick=2)
def kill_service_redis(n: int, seed: int, folder: Path) -> Outcome:
    """A service over Redis that is killed at any moment has lost nothing that it acknowledged.

    The control acknowledges before it commits.
    """
    with RedisServer(folder) as redis:
        school, starts = kill_services(n, seed, folder / "service", redis_url=redis.url)
        control, _ = kill_services(
            max(1, n // 20), seed + 1, folder / "control", EARLY, tasks=20, redis_url=f"{redis.url[:-1]}1"
        )
    return told(school, control, missed=late(starts), ready_s=rounded(starts))


@contextmanager
def traced(pid: int, *options: str) -> Iterator[None]:
    """strace looks at a process while the block runs, and has begun to when it starts."""
    strace = subprocess.Popen(
        [tool("strace"), "-f", "-o", "/dev/null", *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True
    )
    assert strace.stderr is not None
    try:
        assert "attached" in strace.stderr.readline()
        yield
    finally:
        with suppress(ProcessLookupError):
            strace.terminate()
        strace.communicate()


def slow_disk(redis: RedisServer) -> Any:
    calls = "fdatasync,fsync"
    return traced(redis._process.pid, "-e", f"trace={calls}", "-e", f"inject={calls}:delay_enter=3000000")


def recovered(url: str, limit_s: float = 60) -> float:
    """Seconds until a change is accepted."""
    start, number = time.monotonic(), time.time_ns()
    with httpx.Client(base_url=url, timeout=20) as http:
        while (answer := http.put("/v1/tasks/recovered", files=support(number % 10**6))).is_error:
            assert time.monotonic() < start + limit_s, answer.text
            time.sleep(0.01)
    return time.monotonic() - start


def kill_redis_under(
    n: int, seed: int, folder: Path, *options: str, slow: Sequence[bool], slow_s: float = 0, restart: bool = False
) -> tuple[School, list[float]]:
    """Under load, n kill -9 of Redis, where `slow` with a disk that takes its time; and the seconds to recover."""
    folder.mkdir()
    dice, times = random.Random(seed), []
    with RedisServer(folder, *options) as redis, Service(folder, wrapper=variant(CLAIMS), redis_url=redis.url) as one:
        school = School(one.url, seed)
        for k in range(n):
            with school.at_work():
                time.sleep(dice.uniform(0.1, 0.7))
                with slow_disk(redis) if slow[k % len(slow)] else nullcontext():
                    time.sleep(slow_s or dice.uniform(0, 0.5))
                    if slow_s:
                        school.acknowledges()
                    redis.kill()
                time.sleep(dice.uniform(0, 0.3))
                redis.start()
                if restart:
                    one.kill()
                    one.start()
                times.append(recovered(one.url))
            school.settle()
    return school, times


@fault("G2", n=200, quick=2)
def kill_redis(n: int, seed: int, folder: Path) -> Outcome:
    """Redis killed at any moment, on a slow disk or not, costs nothing acknowledged, and is used when it is back.

    Every other time its disk is slow: each fsync is delayed by 3 s. The controls: the same with an fsync a second, and
    without a log at all, where the service has to be restarted, for it finds its store empty and refuses it.
    """
    school, times = kill_redis_under(n, seed, folder / "always", slow=(False, True))
    everysec = folder / "everysec", "--appendfsync", "everysec"
    control, _ = kill_redis_under(max(1, n // 20), seed, *everysec, slow=(True,), slow_s=2)
    bare, _ = kill_redis_under(1, seed, folder / "none", "--appendonly", "no", slow=(False,), restart=True)
    if not bare.lost:
        school.wrong.append("without a log nothing was lost")
    calm(school)
    missed = [f"recovered after {t:.3f} s, not 1" for t in times if t > 1]
    return told(school, control, missed=missed, recovered_s=rounded(times), lost_without_a_log=bare.lost)
