"""Who waits for a lane, who goes next, and who is not let in because it would take too long.

Tenants take turns: of what the lanes do next, each that waits gets an equal share, so one that asks for ten times what
the service can do has its own requests refused, and not those of others. Within a tenant requests take turns in the
same way, so that a large support set does not keep single questions waiting. A share is counted in images; a large
one, which takes as long to decode as many small ones, counts as many. Functions that want a lane take turns with
images, and those of them that end a request whose images were let in with others, so that none keeps the rest waiting.
While images wait, functions get no more than half of the lanes and of their time; among tenants they count as the time
that they take, which is known when it has passed. Knows nothing of threads: who uses this holds a lock.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.containers import Look, look
from models.errors import FewshotError, Overloaded
from models.images import ONE_PASS

LARGE = 100_000  # bytes of a file that small ones are not to wait for
ONE_MORE = 500_000  # bytes beyond that, which take as long to decode as a small image takes in all
PIXELS = 300_000  # that take as long to decode as a small image takes in all
MOST_PIXELS = 16_800_000  # that are counted, whatever a header claims; of a JPEG four times as many
PIXELS_SCALED = 2_000_000  # of a JPEG, which is made smaller while it is decoded
MOST_REMEMBERED = 1000  # tenants that do not wait and had more than others
MEMORY = 32  # calls of lanes, over which their speed is averaged
Payload = bytes | np.ndarray  # an encoded image, or uint8 pixels of the decoder's shape


def cost(payload: Payload) -> float:
    """How many small images' work one is, going by its bytes and by the pixels that its header tells."""
    if not isinstance(payload, bytes):
        return 1.0
    found = look(payload)
    if found is None:  # a JPEG hides its size behind more than any camera writes, or this is no picture
        found = Look(MOST_PIXELS if payload.startswith(b"\xff\xd8") else 0)
    most, unit = (ONE_PASS * MOST_PIXELS, PIXELS_SCALED) if found.one_pass else (MOST_PIXELS, PIXELS)
    by_pixels = min(found.pixels, most) * found.weight / unit
    return max(1.0, by_pixels) + max(0, len(payload) - LARGE) / ONE_MORE


@dataclass(slots=True, eq=False)
class Job:
    """One request: the images that no lane has taken yet and the answers so far; or a function."""

    payloads: Sequence[Payload]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    entered: float
    tenant: str
    gone: Callable[[], bool]  # whether the caller has left
    call: Callable[[], Any] | None = None
    ends: bool = False  # a function that ends what was let in
    charged: float = 0.0  # seconds that a function was taken to take, while it runs
    taken: int = 0
    left: int = 0
    items: list[np.ndarray | FewshotError | None] = field(default_factory=list)
    queued_s: float = 0.0
    decode_s: float = 0.0
    embed_s: float = 0.0
    costs: list[float] = field(init=False)  # of each image; they are asked for several times

    def __post_init__(self) -> None:
        self.costs = [cost(payload) for payload in self.payloads]

    @property
    def rest(self) -> int:
        return len(self.payloads) - self.taken

    @property
    def cost(self) -> float:
        """Of what no lane has taken yet; a function is one."""
        return 1.0 if self.call else sum(self.costs[self.taken :])


class Turns:
    """Jobs of several tenants: whoever had least is next, of one tenant in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: dict[str, deque[Job]] = {}  # none of them empty
        self.waits: dict[str, float] = {}  # the cost of what waits, by tenant
        self._had: dict[str, float] = {}  # what each was given, while anybody waits; who comes had no less than others

    def __bool__(self) -> bool:
        return bool(self._jobs)

    @property
    def tenants(self) -> int:
        return len(self._jobs)

    @property
    def total(self) -> float:
        return sum(self.waits.values())

    def jobs(self, tenant: str) -> int:
        return len(self._jobs.get(tenant, ()))

    def add(self, job: Job) -> None:
        if job.tenant not in self._jobs:
            least = min((self._had[name] for name in self._jobs), default=0.0)
            self._had[job.tenant] = max(least, self._had.get(job.tenant, 0.0))
            self._jobs[job.tenant] = deque()
        self._jobs[job.tenant].append(job)
        self.waits[job.tenant] = self.waits.get(job.tenant, 0.0) + job.cost

    def next(self) -> tuple[str, deque[Job]]:
        """The tenant whose turn it is, and its jobs, for the caller to take from and then to say what was `taken`."""
        tenant = min(self._jobs, key=lambda name: self._had[name])
        return tenant, self._jobs[tenant]

    def taken(self, tenant: str, work: float, *, gone: float = 0.0, had: float | None = None) -> None:
        """So much work of a tenant is being done, and so much more is not wanted any longer; `had`: what it counts as
        in the turns, if not as much."""
        jobs, waits = self._jobs.pop(tenant), self.waits.pop(tenant) - work - gone
        self._had[tenant] += work if had is None else had
        if jobs:  # behind those that had as much
            self._jobs[tenant], self.waits[tenant] = jobs, waits
        elif not self._jobs:
            self._had.clear()
        elif len(self._had) > 2 * len(self._jobs) + MOST_REMEMBERED:
            least = min(self._had[name] for name in self._jobs)
            self._had = {name: had for name, had in self._had.items() if name in self._jobs or had > least}

    def correct(self, tenant: str, by: float, *, most: float) -> None:
        """What a tenant was given was so much more, or less, than it counted as; `most`: by how much it may have had
        more than who waits, for it is to wait no longer than that."""
        if tenant in self._had:
            others = [self._had[name] for name in self._jobs if name != tenant]
            self._had[tenant] = max(0.0, min(self._had[tenant] + by, min(others, default=math.inf) + most))

    def before(self, tenant: str, own: float, size: float) -> float:
        """What is done before a job of this size, which has to wait for `own` of its tenant's: of others, no more."""
        return own + sum(min(waits, own + size) for name, waits in self.waits.items() if name != tenant)

    def lead(self, tenant: str) -> float:
        """By how much a tenant had more than whoever waits and had least."""
        least = min((self._had[name] for name in self._jobs), default=0.0)
        return max(0.0, self._had.get(tenant, 0.0) - least)

    def clear(self) -> None:
        for kept in (self._jobs, self.waits, self._had):
            kept.clear()


class Waiting:
    """All that waits for lanes. Its functions raise Overloaded at the door, and never later."""

    def __init__(self, *, lanes: int, max_batch: int, max_waiting: int, max_wait_s: float):
        self._lanes = lanes
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self.images = 0  # that no lane has taken
        self._of: dict[str, int] = {}  # the same by tenant
        self._turns = Turns()
        self._ends = Turns()  # functions that end what was let in
        self._calls = Turns()  # and others
        self._ended = False  # the function before this one ended what was let in
        self._running = 0  # functions
        self._more_s = 0.0  # by which the lanes of late were longer at functions than at images, while those waited
        self.underway = 0.0  # work that the lanes have taken and not done
        self._lane_s = 0.0  # what it took the lanes of late, and how much work it was: see spent
        self._lane_work = 0.0
        self._call_s = 0.0  # what a function took of late

    def __bool__(self) -> bool:
        return bool(self._turns or self._ends or self._calls)

    def join(self, job: Job) -> None:
        """Lets images in. Raises Overloaded."""
        turns, images, work = self._turns, len(job.payloads), job.cost
        if images > self._room(job.tenant):
            raise Overloaded(f"{self.images} images are waiting; the limit is {self._max_waiting} (MAX_WAITING).")
        # Requests take turns, so that each gets no more done than this one before this one is through. What the lanes
        # take next is no queue, and a wait no longer than the own work is fair.
        jobs, mine = turns.jobs(job.tenant), turns.waits.get(job.tenant, 0.0)
        ahead = turns.before(job.tenant, min(mine, jobs * work), work)
        if self._images_before(job.tenant, jobs, images) > max(self._max_batch * self._lanes, images):
            # Places are free when a batch has just been taken, so none of what is on the lanes counts as done. Between
            # two batches there is one function, and all of them take no longer than the images, but for those that
            # have begun.
            images_s = (ahead + self.underway) * self._unit_s
            functions = min(self._ends.total + self._calls.total, math.ceil(ahead / self._max_batch) + 1)
            self._check(images_s + min(functions * self._call_s, images_s + max(1, self._lanes // 2) * self._call_s))
        if not turns:
            self._more_s = 0.0  # nobody is owed anything
        turns.add(job)
        self.images += images
        self._of[job.tenant] = self._of.get(job.tenant, 0) + images

    def _images_before(self, tenant: str, jobs: int, images: int) -> int:
        """The same as Turns.before, in images and not in work."""
        own = min(self._of.get(tenant, 0), jobs * images)
        return own + sum(min(count, own + images) for name, count in self._of.items() if name != tenant)

    def _room(self, tenant: str) -> float:
        """Images that a tenant may bring: what is left, or of a full house, up to twice as many, its own share."""
        if not self.images:
            return math.inf
        mine = self._of.get(tenant, 0)
        share = self._max_waiting // (len(self._of) + (tenant not in self._of)) - mine
        return max(self._max_waiting - self.images, min(share, 2 * self._max_waiting - self.images))

    def join_function(self, job: Job, *, admitted: bool) -> None:
        """Lets a function in. Raises Overloaded, but for one that ends what was let in."""
        job.ends = admitted
        if admitted:
            self._ends.add(job)
            return
        ahead = self._calls.before(job.tenant, self._calls.waits.get(job.tenant, 0.0), 1)
        if ahead >= self._lanes:
            # Before each there is a batch, or as many as take as long.
            images_s = min(self._turns.total * self._unit_s, ahead * max(self._max_batch * self._unit_s, self._call_s))
            others_s = min(self._calls.total * self._call_s, self._calls.lead(job.tenant))  # who had less comes first
            self._check(images_s + (ahead + self._ends.total) * self._call_s + others_s)
        self._calls.add(job)

    def function(self) -> Job | None:
        """Takes the next function, where it is not the turn of images; every other one ends what was let in."""
        chosen = self._calls if self._calls and (self._ended or not self._ends) else self._ends
        if not chosen or (self._turns and (self._more_s > 0 or self._running >= max(1, self._lanes // 2))):
            return None
        self._ended = chosen is self._ends
        self._running += 1
        tenant, jobs = chosen.next()
        job = jobs.popleft()
        job.charged = self._call_s
        chosen.taken(tenant, 1, had=job.charged)
        return job

    def take(self, limit: int, nobody_waits: Callable[[Job], bool]) -> list[tuple[Job, int]]:
        """Takes the next batch, of at most so many images, and of no more work than a full one of small images is: a
        share of every tenant, and of every request of one."""
        batch: list[tuple[Job, int]] = []
        work = 0.0
        while self._turns and len(batch) < limit and work < self._max_batch:
            budget = max(1.0, min(limit - len(batch), self._max_batch - work) / self._turns.tenants)
            work += self._of_one(batch, room=limit - len(batch), budget=budget, left=nobody_waits)
        self.underway += work
        return batch

    def _of_one(self, batch: list[tuple[Job, int]], *, room: int, budget: float, left: Callable[[Job], bool]) -> float:
        """Adds images of the tenant whose turn it is, of its requests in turn, to a batch; how much work they are."""
        tenant, jobs = self._turns.next()
        work, gone, images = 0.0, 0.0, 0
        room += len(batch)
        while jobs and len(batch) < room and work < budget:
            job = jobs.popleft()
            if left(job):
                gone += job.cost
                images += job.rest
                continue
            share, used = (budget - work) / (len(jobs) + 1), 0.0
            while job.rest and len(batch) < room and (not used or used + job.costs[job.taken] <= share):
                batch.append((job, job.taken))
                used += job.costs[job.taken]
                job.taken += 1
                images += 1
            work += used
            if job.rest:
                jobs.append(job)
        self.images -= images
        self._of[tenant] -= images
        if not jobs:
            del self._of[tenant]
        self._turns.taken(tenant, work, gone=gone)
        return work

    def spent(self, seconds: float, work: float) -> None:
        """What a lane has done; from that of late follows how long those who come will wait."""
        self._lane_s += seconds - self._lane_s / MEMORY
        self._lane_work += work - self._lane_work / MEMORY
        self._more_s = max(0.0, self._more_s - seconds)

    def called(self, job: Job, seconds: float | None) -> None:
        """The same of a function; None: nobody waited for it any more."""
        self._running -= 1
        turns, by = self._ends if job.ends else self._calls, (seconds or 0.0) - job.charged
        turns.correct(job.tenant, by, most=self._max_wait_s / 2)
        if seconds is not None:
            self._call_s += (seconds - self._call_s) / 8
            self._more_s += seconds

    def clear(self) -> None:
        for turns in (self._turns, self._ends, self._calls):
            turns.clear()
        self.images = 0
        self._of.clear()

    @property
    def _unit_s(self) -> float:
        return self._lane_s / (self._lane_work or 1)

    def _check(self, seconds: float) -> None:
        """Raises Overloaded where the lanes need too long for so many seconds of work."""
        wait = seconds / self._lanes
        if wait > self._max_wait_s:
            raise Overloaded(f"This would wait for {wait:.1f} s; the limit is {self._max_wait_s:g} s (MAX_WAIT_S).")
