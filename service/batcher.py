"""Micro-batching: images of all requests share one queue, and lanes turn them into features.

A lane is a thread that takes what waits, up to `max_batch` images, decodes them, calls the extractor once and hands
the features back. There is no timer: an idle service adds no delay and a busy one fills its batches. Who goes next, and
who is refused at the door, is settled in waiting.py; small files of a batch are answered before large ones are decoded.
On a CPU there are as many lanes as cores; on a GPU the extractor itself takes one call at a time, and the other lanes
decode meanwhile. An image may also come as pixels of the extractor's own input size: it queues with the others and is
only not decoded.

What hurts elsewhere is settled here: one bad image fails alone; a failed batch tells each of its callers and the lane
goes on; a caller who left is skipped when a batch is formed; a lane that dies tells everyone who waits, and `alive`
turns false, as it does while the extractor fails at every batch. Knows nothing of tasks, heads or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from models.errors import ExtractorFailed, FewshotError, Overloaded, UndecodableExample
from models.extractor import Decoder, Extractor
from service.callers import CallerLeft, has_left, tenant
from service.metrics import Metrics
from service.waiting import LARGE, Job, Payload, Waiting

log = logging.getLogger(__name__)
T = TypeVar("T")
FAILURES = 8  # batches in a row at which the extractor failed, after which it counts as broken


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Features, or the error, of each image of a request, and where its time went (seconds)."""

    items: list[np.ndarray | FewshotError]
    queued_s: float
    decode_s: float  # summed over images
    embed_s: float  # summed over this request's share of each batch

    def stages(self) -> dict[str, float]:
        """The same in milliseconds, by name."""
        return {"queue": self.queued_s * 1e3, "decode": self.decode_s * 1e3, "embed": self.embed_s * 1e3}


class Batcher:
    """Owns the lanes. Create and use it on one event loop; `close` before the loop ends."""

    def __init__(
        self,
        extractor: Extractor,
        decoder: Decoder,
        *,
        lanes: int,
        max_batch: int,
        max_waiting: int,
        max_wait_s: float = math.inf,
        metrics: Metrics | None = None,
    ):
        self._extractor = extractor
        self._decoder = decoder
        self._max_batch = max_batch
        self._waits = Waiting(lanes=lanes, max_batch=max_batch, max_waiting=max_waiting, max_wait_s=max_wait_s)
        self._failures = 0
        self._metrics = metrics or Metrics()
        self._idle = 0
        self._closing = False
        self._dead = False
        self._changed = threading.Condition()
        self._active: set[Job] = set()  # everyone who would have to be told
        self._lanes = [threading.Thread(target=self._lane, name=f"lane-{n}", daemon=True) for n in range(lanes)]
        for lane in self._lanes:
            lane.start()

    @property
    def alive(self) -> bool:
        return not self._dead and not self._closing and self._failures < FAILURES

    @property
    def waiting(self) -> int:
        """Images that no lane has taken yet."""
        return self._waits.images

    async def embed(self, payloads: Sequence[Payload]) -> Embedded:
        """Features of images, encoded or as pixels, in order. Raises Overloaded at once when there is no room."""
        job = self._job(payloads)
        with self._changed:
            self._open()
            self._waits.join(job)
            self._active.add(job)
            # Wake no more lanes than there are batches, else each gets a sliver.
            self._changed.notify(min(len(payloads), len(self._lanes)))
        await self._wait(job)
        return Embedded(job.items, job.queued_s, job.decode_s, job.embed_s)  # type: ignore[arg-type]

    async def run(self, call: Callable[[], T], *, admitted: bool = False) -> T:
        """Runs a function on a lane, in turns with images: adaptation.

        `admitted`: it ends a request whose images were let in, and is not refused. Raises Overloaded at once when
        another would have to wait too long.
        """
        job = self._job(())
        job.call = call
        with self._changed:
            self._open()
            self._waits.join_function(job, admitted=admitted)
            self._active.add(job)
            self._changed.notify()
        result: T = await self._wait(job)
        return result

    async def close(self) -> None:
        """Takes no more, finishes what waits, ends the lanes."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for lane in self._lanes:
            await asyncio.to_thread(lane.join)

    def _job(self, payloads: Sequence[Payload]) -> Job:
        loop = asyncio.get_running_loop()
        job = Job(payloads, loop.create_future(), loop, time.perf_counter(), tenant.get(), has_left.get())
        job.left = len(payloads)
        job.items = [None] * len(payloads)
        return job

    def _open(self) -> None:
        if self._dead:
            raise ExtractorFailed("The extractor has stopped; this process needs a restart.")
        if self._closing:
            raise Overloaded("The service is shutting down.", retry_after=2)

    async def _wait(self, job: Job) -> Any:
        try:
            return await job.future
        finally:
            with self._changed:
                self._active.discard(job)

    # What follows runs on the lanes.

    def _lane(self) -> None:
        batch: list[tuple[Job, int]] = []
        try:
            while True:
                with self._changed:
                    self._waits.underway -= _work(batch)
                    self._idle += 1
                    while not self._waits:
                        if self._closing:
                            return
                        self._changed.wait()
                    job = self._waits.function()
                    batch = [] if job else self._take()
                    self._idle -= 1
                if job and job.call:
                    self._do_call(job, job.call)
                for part in _by_size(batch):
                    self._do_batch(part)
        except BaseException:
            log.exception("A lane ended; refusing further work.")
            self._die()
            raise

    def _take(self) -> list[tuple[Job, int]]:
        """The next batch; leaves some for other idle lanes."""
        limit = min(self._max_batch, max(1, -(-self.waiting // max(1, self._idle))))
        batch = self._waits.take(limit, self._skipped)
        for job, index in batch:
            if index == 0:
                job.queued_s = time.perf_counter() - job.entered
        return batch

    def _skipped(self, job: Job) -> bool:
        if not self._nobody_waits(job):
            return False
        self._metrics.abandoned.inc(job.rest)
        return True

    def _nobody_waits(self, job: Job) -> bool:
        if job.gone():
            self._tell([(job, CallerLeft())])
            return True
        return job.future.cancelled()

    def _do_call(self, job: Job, call: Callable[[], Any]) -> None:
        if self._nobody_waits(job):
            with self._changed:
                self._waits.called(job, None)
            return
        start = time.perf_counter()
        try:
            result = call()
        except Exception as error:  # belongs to the caller, not to the lane
            result = error
        with self._changed:
            self._waits.called(job, time.perf_counter() - start)
        self._tell([(job, result)])

    def _pixels(self, payload: Payload) -> np.ndarray:
        if not isinstance(payload, np.ndarray):
            return self._decoder(payload)
        if payload.shape != self._decoder.shape or payload.dtype != np.uint8:  # one such would cost the whole batch
            shape = " x ".join(map(str, self._decoder.shape))
            raise UndecodableExample(f"The pixels are not uint8 of {shape}, as the extractor takes them.")
        return payload

    def _do_batch(self, batch: list[tuple[Job, int]]) -> None:
        arrays: list[np.ndarray] = []
        places: list[tuple[Job, int]] = []
        begin = time.perf_counter()
        finished: dict[Job, int] = {}
        work = float(len(batch))  # of what is no picture, whatever its header claims, no more than of a small one
        for job, index in batch:
            start = time.perf_counter()
            finished[job] = finished.get(job, 0) + 1
            try:
                arrays.append(self._pixels(job.payloads[index]))
                places.append((job, index))
                work += job.costs[index] - 1
            except FewshotError as error:
                error.index = index
                # Its traceback would hold this frame, and with it the request, until the garbage collector comes by.
                job.items[index] = error.with_traceback(None)
                error.__context__ = None
            except Exception:  # a decoder's bug is this image's misfortune, not the lane's end
                log.exception("The decoder failed in a way of its own.")
                job.items[index] = UndecodableExample("The image cannot be decoded.", index=index)
            job.decode_s += time.perf_counter() - start
        if arrays:
            start = time.perf_counter()
            features, fine = np.empty(0), np.zeros(len(arrays), bool)
            try:
                features = self._extractor(np.stack(arrays))
                fine = np.asarray(np.isfinite(features).all(axis=1))
                # Numbers that are none count neither way: some backbone may give them for some image, and who sends
                # that one is not to end the service.
                self._failures = 0 if fine.any() else self._failures
            except Exception:  # the one place where any failure of a runtime is survived
                log.exception("The extractor failed on a batch of %d.", len(arrays))
                self._failures += 1
            share = (time.perf_counter() - start) / len(arrays)
            self._metrics.batch_size.observe(len(arrays))
            for row, (job, index) in enumerate(places):
                job.embed_s += share
                if fine[row]:
                    job.items[index] = features[row]
                else:
                    job.items[index] = ExtractorFailed("The extractor failed on this image.", index=index)
        done = []
        with self._changed:  # two lanes may hold parts of one request
            self._waits.spent(time.perf_counter() - begin, work)
            for job, count in finished.items():
                job.left -= count
                if job.left == 0:
                    done.append((job, None))
        self._tell(done)

    def _tell(self, answers: list[tuple[Job, Any]]) -> None:
        """Hands results to their callers with one wake-up of each event loop."""
        for loop in {job.loop for job, _ in answers}:
            mine = [(job.future, answer) for job, answer in answers if job.loop is loop]
            try:
                loop.call_soon_threadsafe(_settle, mine)
            except RuntimeError:  # the loop has ended, and with it everyone who waited there
                log.warning("%d answers came after their event loop had ended.", len(mine))

    def _die(self) -> None:
        with self._changed:
            self._dead = True
            orphans = [(job, ExtractorFailed("The extractor has stopped.")) for job in self._active]
            self._waits.clear()
        self._tell(orphans)


def _work(batch: list[tuple[Job, int]]) -> float:
    return sum(job.costs[index] for job, index in batch)


def _by_size(batch: list[tuple[Job, int]]) -> list[list[tuple[Job, int]]]:
    """The images of a batch that are small files, then those that are not, which may take a hundred times as long."""
    parts: tuple[list[tuple[Job, int]], list[tuple[Job, int]]] = ([], [])
    for job, index in batch:
        payload = job.payloads[index]
        parts[isinstance(payload, bytes) and len(payload) > LARGE].append((job, index))
    return [part for part in parts if part]


def _settle(answers: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in answers:
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
