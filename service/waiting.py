"""Who waits for a lane, who goes next, and who is not let in because it would take too long.

Tenants take turns: of what the lanes do next, each that waits gets an equal share in images, so one that asks for ten
times what the service can do has its own requests refused, and not those of others. Within a tenant requests take turns
in the same way, so that a large support set does not keep single questions waiting. Functions that want a lane go first
where they end a request whose images were let in; others take turns with images, so that neither keeps the other
waiting. Knows nothing of threads: who uses this holds a lock. Knows nothing of images either but how many they are.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.errors import FewshotError, Overloaded

MEMORY = 32  # calls of lanes, over which their speed is averaged
Payload = bytes | np.ndarray  # an encoded image, or uint8 pixels of the decoder's shape


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
    taken: int = 0
    left: int = 0
    items: list[np.ndarray | FewshotError | None] = field(default_factory=list)
    queued_s: float = 0.0
    decode_s: float = 0.0
    embed_s: float = 0.0

    @property
    def rest(self) -> int:
        return len(self.payloads) - self.taken


class Turns:
    """Jobs of several tenants, who take turns; those of one are in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: dict[str, deque[Job]] = {}  # none of them empty; whose turn it is comes first
        self.size: dict[str, int] = {}  # of what waits, by tenant: images, or functions, which count as one

    def __bool__(self) -> bool:
        return bool(self._jobs)

    @property
    def total(self) -> int:
        return sum(self.size.values())

    @property
    def tenants(self) -> int:
        return len(self._jobs)

    def jobs(self, tenant: str) -> int:
        return len(self._jobs.get(tenant, ()))

    def add(self, job: Job, size: int) -> None:
        self._jobs.setdefault(job.tenant, deque()).append(job)
        self.size[job.tenant] = self.size.get(job.tenant, 0) + size

    def first(self) -> deque[Job]:
        """The jobs of the tenant whose turn it is, for the caller to take from."""
        return next(iter(self._jobs.values()))

    def taken(self, size: int) -> None:
        """So much was taken of the tenant whose turn it was: the next one's comes."""
        tenant = next(iter(self._jobs))
        jobs = self._jobs.pop(tenant)
        self.size[tenant] -= size
        if jobs:
            self._jobs[tenant] = jobs
        else:
            del self.size[tenant]

    def before(self, tenant: str, own: int, size: int) -> int:
        """What is done before a job of this size, which has to wait for `own` of its tenant's: of others, no more."""
        return own + sum(min(waits, own + size) for name, waits in self.size.items() if name != tenant)

    def clear(self) -> None:
        self._jobs.clear()
        self.size.clear()


class Waiting:
    """All that waits for lanes. Its functions raise Overloaded at the door, and never later."""

    def __init__(self, *, lanes: int, max_batch: int, max_waiting: int, max_wait_s: float):
        self._lanes = lanes
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._images = Turns()
        self._ends: deque[Job] = deque()  # functions that end what was let in
        self._calls = Turns()  # and others
        self._images_next = False  # whose turn it is, where both wait
        self.underway = 0  # images that the lanes have taken and not done
        self._lane_s = 0.0  # work of the lanes of late, and the images that it was for: see spent
        self._lane_images = 0.0
        self._call_s = 0.0  # what a function took of late

    def __bool__(self) -> bool:
        return bool(self._images or self._ends or self._calls)

    @property
    def images(self) -> int:
        return self._images.total

    def join(self, job: Job) -> None:
        """Lets images in. Raises Overloaded."""
        images, waits = len(job.payloads), self._images
        mine = waits.size.get(job.tenant, 0)
        if waits:
            tenants = waits.tenants + (mine == 0)
            room = max(self._max_waiting - waits.total, self._max_waiting // tenants - mine)
            if images > room:
                raise Overloaded(f"{waits.total} images are waiting; the limit is {self._max_waiting} (MAX_WAITING).")
        # Requests take turns, so that each gets no more images done than this one before this one is through. What the
        # lanes take next is no queue, and a wait no longer than the own work is fair.
        ahead = waits.before(job.tenant, min(mine, waits.jobs(job.tenant) * images), images)
        if ahead > max(self._max_batch * self._lanes, images):
            # Places are free when a batch has just been taken, so none of what is on the lanes counts as done.
            functions = len(self._ends) + self._calls.total
            self._check((ahead + self.underway) * self._image_s + functions * self._call_s)
        waits.add(job, images)

    def join_function(self, job: Job, *, admitted: bool) -> None:
        """Lets a function in. Raises Overloaded, but for one that ends what was let in."""
        if admitted:
            self._ends.append(job)
            return
        ahead = self._calls.before(job.tenant, self._calls.size.get(job.tenant, 0), 1)
        if ahead >= self._lanes:
            batches = min(ahead, math.ceil(self.images / self._max_batch))  # each of which takes a turn
            self._check(batches * self._max_batch * self._image_s + (ahead + len(self._ends)) * self._call_s)
        self._calls.add(job, 1)

    def function(self) -> Job | None:
        """Takes the next function, where it is not the turn of images."""
        if self._ends:
            return self._ends.popleft()
        turn = bool(self._calls) and not (self._images_next and self._images)
        self._images_next = turn
        if not turn:
            return None
        job = self._calls.first().popleft()
        self._calls.taken(1)
        return job

    def take(self, limit: int, nobody_waits: Callable[[Job], bool]) -> list[tuple[Job, int]]:
        """Takes the next batch, of at most `limit` images: a share of every tenant, and of every request of one."""
        batch: list[tuple[Job, int]] = []
        while self._images and len(batch) < limit:
            slots = max(1, (limit - len(batch)) // self._images.tenants)
            for _ in range(min(self._images.tenants, limit - len(batch))):
                batch += self._of_one(slots, nobody_waits)
        self.underway += len(batch)
        return batch

    def _of_one(self, slots: int, nobody_waits: Callable[[Job], bool]) -> list[tuple[Job, int]]:
        """Images of the tenant whose turn it is, of its requests in turn."""
        jobs, gone = self._images.first(), 0
        taken: list[tuple[Job, int]] = []
        while jobs and len(taken) < slots:
            job = jobs.popleft()
            if nobody_waits(job):
                gone += job.rest
                continue
            share = min(job.rest, max(1, (slots - len(taken)) // (len(jobs) + 1)))
            taken.extend((job, index) for index in range(job.taken, job.taken + share))
            job.taken += share
            if job.rest:
                jobs.append(job)
        self._images.taken(len(taken) + gone)
        return taken

    def spent(self, seconds: float, images: int) -> None:
        """What a lane has done with images; from that of late follows how long those who come will wait."""
        self._lane_s += seconds - self._lane_s / MEMORY
        self._lane_images += images - self._lane_images / MEMORY

    def called(self, seconds: float) -> None:
        """The same of a function."""
        self._call_s += (seconds - self._call_s) / 8

    def clear(self) -> None:
        self._images.clear()
        self._calls.clear()
        self._ends.clear()

    @property
    def _image_s(self) -> float:
        return self._lane_s / (self._lane_images or 1)

    def _check(self, work: float) -> None:
        """Raises Overloaded where the lanes need too long for so many seconds of work."""
        wait = work / self._lanes
        if wait > self._max_wait_s:
            raise Overloaded(f"This would wait for {wait:.1f} s; the limit is {self._max_wait_s:g} s (MAX_WAIT_S).")
