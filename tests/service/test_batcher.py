"""The batcher, for what hurts: failures, leavers, full queues, large requests, ends."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from models.errors import ExtractorFailed, Overloaded, UndecodableExample
from models.images import ImageDecoder
from service.batcher import FAILURES, Batcher, Embedded
from service.callers import CallerLeft, has_left
from service.waiting import LARGE
from tests.fakes import Failing, Gated, MeanColour, picture

DECODER = ImageDecoder(16, 16, 3)
RED, BLUE = picture("red"), picture("blue")


class Slow(Gated):
    """Takes 20 ms an image."""

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        time.sleep(0.02 * len(batch))
        return super().__call__(batch)


def run(
    work: Callable[[Batcher], Awaitable[None]],
    extractor: MeanColour,
    *,
    lanes: int = 1,
    max_batch: int = 4,
    max_waiting: int = 64,
    max_wait_s: float = math.inf,
) -> None:
    async def main() -> None:
        batcher = Batcher(
            extractor, DECODER, lanes=lanes, max_batch=max_batch, max_waiting=max_waiting, max_wait_s=max_wait_s
        )
        try:
            async with asyncio.timeout(10):
                await work(batcher)
        finally:
            if isinstance(extractor, Gated):
                extractor.gate.set()
            await batcher.close()

    asyncio.run(main())


def features(embedded: Embedded) -> np.ndarray:
    assert all(isinstance(item, np.ndarray) for item in embedded.items)
    return np.stack(embedded.items)  # type: ignore[arg-type]


def test_features_come_back_in_the_order_of_the_images() -> None:
    async def work(batcher: Batcher) -> None:
        found = features(await batcher.embed([RED, BLUE, RED]))
        assert found[0].argmax() == 0
        assert found[1].argmax() == 2
        np.testing.assert_array_equal(found[0], found[2])

    run(work, MeanColour())


def test_requests_that_wait_together_share_a_batch() -> None:
    extractor = Gated()

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.embed([RED]))
        await asyncio.to_thread(extractor.begun.wait, 5)
        rest = [asyncio.create_task(batcher.embed([image])) for image in (RED, BLUE, RED)]
        await asyncio.sleep(0)
        extractor.gate.set()
        await asyncio.gather(first, *rest)
        assert extractor.batches == [1, 3]

    run(work, extractor)


def test_a_request_larger_than_a_batch_is_split() -> None:
    extractor = MeanColour()

    async def work(batcher: Batcher) -> None:
        found = features(await batcher.embed([RED] * 10))
        assert found.shape == (10, 3)
        assert max(extractor.batches) <= 4
        assert sum(extractor.batches) == 10

    run(work, extractor)


def test_a_large_request_does_not_keep_a_single_question_waiting() -> None:
    extractor = Gated()

    async def work(batcher: Batcher) -> None:
        done: list[str] = []

        async def ask(name: str, images: list[bytes]) -> None:
            await batcher.embed(images)
            done.append(name)

        large = asyncio.create_task(ask("large", [RED] * 20))
        await asyncio.to_thread(extractor.begun.wait, 5)
        small = asyncio.create_task(ask("small", [BLUE]))
        await asyncio.sleep(0)
        extractor.gate.set()
        await asyncio.gather(large, small)
        assert done == ["small", "large"]

    run(work, extractor)


def test_small_files_of_a_batch_are_answered_before_a_large_one_is_decoded() -> None:
    extractor, heavy = Gated(), picture("red", size=(320, 240))
    assert len(heavy) > LARGE

    async def work(batcher: Batcher) -> None:
        done: list[str] = []

        async def ask(name: str, images: list[bytes]) -> None:
            found = await batcher.embed(images)
            assert [row.argmax() for row in features(found)] == [0 if image is not BLUE else 2 for image in images]
            done.append(name)

        first = asyncio.create_task(ask("first", [RED]))
        await asyncio.to_thread(extractor.begun.wait, 5)
        rest = [("large", [heavy]), ("mixed", [BLUE, heavy, RED]), ("small", [BLUE])]
        waiting = [asyncio.create_task(ask(name, images)) for name, images in rest]
        await asyncio.sleep(0)
        extractor.gate.set()
        await asyncio.gather(first, *waiting)
        assert done[:2] == ["first", "small"]
        assert extractor.batches[0] == 1
        assert sum(extractor.batches) == 6

    run(work, extractor, max_batch=8)


def test_one_bad_image_fails_alone_and_its_neighbours_do_not_notice() -> None:
    async def work(batcher: Batcher) -> None:
        alone = features(await batcher.embed([RED, BLUE]))
        mixed = (await batcher.embed([RED, b"not an image", BLUE])).items
        assert isinstance(mixed[1], UndecodableExample)
        assert mixed[1].index == 1
        np.testing.assert_array_equal(mixed[0], alone[0])
        np.testing.assert_array_equal(mixed[2], alone[1])

    run(work, MeanColour())


@pytest.mark.slow
def test_a_request_with_a_bad_image_is_let_go_of_with_its_answer() -> None:
    """Not when the garbage collector comes by: meanwhile its images would be in memory and counted nowhere."""

    gone: list[str] = []

    async def work(batcher: Batcher) -> None:
        for bad in (b"nothing", b"%PDF-1.7"):
            image = DECODER(RED)
            weakref.finalize(image, gone.append, "image")
            found = await batcher.embed([image, bad])
            assert isinstance(found.items[1], UndecodableExample)
            del image, found
            await asyncio.sleep(0.05)

    gc.collect()
    gc.disable()
    try:
        run(work, MeanColour())
        assert gone == ["image"] * 2
    finally:
        gc.enable()


def test_pixels_share_a_batch_with_encoded_images_and_are_not_decoded() -> None:
    extractor = Gated()

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.embed([RED]))
        await asyncio.to_thread(extractor.begun.wait, 5)
        mixed = asyncio.create_task(batcher.embed([DECODER(RED), BLUE]))
        await asyncio.sleep(0)
        extractor.gate.set()
        found = features(await mixed)
        np.testing.assert_array_equal(found[0], features(await first)[0])
        assert found[1].argmax() == 2
        assert extractor.batches == [1, 2]

    run(work, extractor)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((16, 16), np.uint8), np.zeros((16, 17, 3), np.uint8), np.zeros((16, 16, 3), np.float32)],
    ids=["flat", "wide", "float"],
)
def test_pixels_that_do_not_fit_fail_alone(pixels: np.ndarray) -> None:
    async def work(batcher: Batcher) -> None:
        items = (await batcher.embed([RED, pixels, DECODER(BLUE)])).items
        assert isinstance(items[1], UndecodableExample)
        assert items[1].index == 1
        assert "16 x 16 x 3" in items[1].detail
        assert isinstance(items[0], np.ndarray)
        assert isinstance(items[2], np.ndarray)

    run(work, MeanColour())


def test_a_bug_of_the_decoder_costs_its_image_and_not_the_lane() -> None:
    class Buggy(ImageDecoder):
        def __call__(self, payload: bytes) -> np.ndarray:
            if payload == BLUE:
                raise IndexError("secret: 0xdeadbeef")
            return super().__call__(payload)

    async def main() -> None:
        batcher = Batcher(MeanColour(), Buggy(16, 16, 3), lanes=1, max_batch=4, max_waiting=64)
        try:
            items = (await batcher.embed([RED, BLUE])).items
            assert isinstance(items[0], np.ndarray)
            assert isinstance(items[1], UndecodableExample)
            assert "secret" not in items[1].detail
            assert batcher.alive
            features(await batcher.embed([RED]))
        finally:
            await batcher.close()

    asyncio.run(main())


def test_a_failing_batch_answers_each_caller_and_the_lane_goes_on() -> None:
    extractor = Failing()

    async def work(batcher: Batcher) -> None:
        answers = await asyncio.gather(*(batcher.embed([RED]) for _ in range(3)))
        assert all(isinstance(answer.items[0], ExtractorFailed) for answer in answers)
        assert "0x" not in str(answers[0].items[0])
        extractor.broken = False
        assert batcher.alive
        features(await batcher.embed([RED]))

    run(work, extractor)


def test_features_that_are_not_finite_are_a_failure_of_that_image() -> None:
    class Poisoned(MeanColour):
        def __call__(self, batch: np.ndarray) -> np.ndarray:
            found = super().__call__(batch)
            found[0] = np.nan
            return found

    async def work(batcher: Batcher) -> None:
        items = (await batcher.embed([RED, BLUE])).items
        assert isinstance(items[0], ExtractorFailed)
        assert isinstance(items[1], np.ndarray)

    run(work, Poisoned())


def test_a_full_queue_refuses_at_the_door_and_serves_those_inside() -> None:
    extractor = Gated()

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.embed([RED]))
        await asyncio.to_thread(extractor.begun.wait, 5)
        inside = asyncio.create_task(batcher.embed([RED] * 4))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="MAX_WAITING"):
            await batcher.embed([RED])
        extractor.gate.set()
        await asyncio.gather(first, inside)

    run(work, extractor, max_waiting=4)


@pytest.mark.slow
def test_who_would_wait_too_long_is_refused_at_the_door() -> None:
    extractor = Slow()

    async def work(batcher: Batcher) -> None:
        extractor.gate.set()
        await batcher.embed([RED] * 20)  # by now it is known how long an image takes
        extractor.gate.clear()
        extractor.begun.clear()
        inside = [asyncio.create_task(batcher.embed([RED] * 4))]
        await asyncio.to_thread(extractor.begun.wait, 5)
        refused = 0
        for _ in range(30):
            inside.append(asyncio.create_task(batcher.embed([RED])))
            await asyncio.sleep(0)
            if inside[-1].done():
                with pytest.raises(Overloaded, match="MAX_WAIT_S"):
                    inside.pop().result()
                refused += 1
        # With the four that are being worked on 0.2 s of 20 ms each, or fewer where the computer is slow.
        assert 4 < batcher.waiting <= 6
        assert refused == 30 - batcher.waiting
        # A large request has waited for no more than its own work takes, however long that is; a second is refused.
        inside.append(asyncio.create_task(batcher.embed([RED] * 20)))
        await asyncio.sleep(0)
        assert not inside[-1].done()
        with pytest.raises(Overloaded, match="MAX_WAIT_S"):
            await batcher.embed([RED] * 20)
        extractor.gate.set()
        await asyncio.gather(*inside)

    run(work, extractor, max_wait_s=0.2)


@pytest.mark.slow
def test_headers_that_lie_do_not_open_the_door() -> None:
    """What is refused at its header takes no time: counted as the work that it claims, all work would seem quick."""
    extractor = Slow()
    liar = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (4000).to_bytes(4, "big") * 2

    async def work(batcher: Batcher) -> None:
        extractor.gate.set()
        await batcher.embed([RED] * 40)  # by now it is known how long an image takes
        for _ in range(40):
            await batcher.embed([liar, RED])
        extractor.gate.clear()
        extractor.begun.clear()
        inside = [asyncio.create_task(batcher.embed([RED] * 4))]
        await asyncio.to_thread(extractor.begun.wait, 5)
        inside += [asyncio.create_task(batcher.embed([RED])) for _ in range(60)]
        await asyncio.sleep(0)
        refused = [task for task in inside if task.done()]
        assert len(refused) > 30
        for task in refused:
            with pytest.raises(Overloaded, match="MAX_WAIT_S"):
                task.result()
        extractor.gate.set()
        await asyncio.gather(*(task for task in inside if task not in refused))

    run(work, extractor, max_wait_s=0.2)


def test_one_large_request_leaves_the_door_open_for_small_ones() -> None:
    extractor = Gated()

    async def work(batcher: Batcher) -> None:
        extractor.gate.set()
        await batcher.embed([RED] * 4)
        extractor.gate.clear()
        inside = [asyncio.create_task(batcher.embed([RED] * 50))]
        await asyncio.sleep(0)
        inside.append(asyncio.create_task(batcher.embed([BLUE])))  # has to wait for one batch, not for fifty images
        await asyncio.sleep(0)
        assert not inside[-1].done()
        extractor.gate.set()
        await asyncio.gather(*inside)

    run(work, extractor, max_wait_s=1e-9)


def test_a_caller_who_left_costs_nothing() -> None:
    extractor = Gated()

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.embed([RED]))
        await asyncio.to_thread(extractor.begun.wait, 5)
        leaver = asyncio.create_task(batcher.embed([BLUE] * 3))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        extractor.gate.set()
        await first
        await batcher.embed([RED])
        assert extractor.batches == [1, 1]
        assert batcher.waiting == 0

    run(work, extractor)


def test_a_caller_who_hung_up_costs_nothing_whether_or_not_anybody_cancels() -> None:
    extractor, gone = Gated(), threading.Event()

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.embed([RED]))
        await asyncio.to_thread(extractor.begun.wait, 5)
        ran: list[bool] = []
        token = has_left.set(gone.is_set)
        leavers = [
            asyncio.create_task(batcher.embed([BLUE] * 3)),
            asyncio.create_task(batcher.run(lambda: ran.append(True))),
        ]
        has_left.reset(token)
        stays = asyncio.create_task(batcher.embed([RED]))
        await asyncio.sleep(0)
        gone.set()
        extractor.gate.set()
        await asyncio.gather(first, stays)
        assert [type(found) for found in await asyncio.gather(*leavers, return_exceptions=True)] == [CallerLeft] * 2
        assert extractor.batches == [1, 1]
        assert not ran
        assert batcher.waiting == 0

    run(work, extractor)


def test_images_functions_and_those_that_end_a_request_take_turns() -> None:
    done: list[str] = []

    class Noting(Gated):
        def __call__(self, batch: np.ndarray) -> np.ndarray:
            found = super().__call__(batch)
            done.append("images")
            return found

    extractor = Noting()

    async def work(batcher: Batcher) -> None:
        waiting = [asyncio.create_task(batcher.embed([RED]))]
        await asyncio.to_thread(extractor.begun.wait, 5)
        for _ in range(4):
            waiting.append(asyncio.create_task(batcher.embed([BLUE] * 4)))
            waiting += [asyncio.create_task(batcher.run(lambda: done.append("function"))) for _ in range(3)]
            waiting.append(asyncio.create_task(batcher.run(lambda: done.append("end"), admitted=True)))
        await asyncio.sleep(0)
        extractor.gate.set()
        await asyncio.gather(*waiting)
        turns = ["end", "images", "function", "images"] * 2
        assert done == ["images", *turns, *["end", "function"] * 2, *["function"] * 8]

    run(work, extractor)


@pytest.mark.slow
def test_functions_that_would_wait_too_long_are_refused_unless_they_end_what_was_let_in() -> None:
    extractor = Gated()

    async def work(batcher: Batcher) -> None:
        extractor.gate.set()
        for _ in range(30):
            await batcher.run(lambda: time.sleep(0.02))  # by now it is known how long one takes
        extractor.gate.clear()
        extractor.begun.clear()
        inside: list[asyncio.Task[object]] = [asyncio.create_task(batcher.embed([RED]))]
        await asyncio.to_thread(extractor.begun.wait, 5)
        refused = 0
        for _ in range(30):
            inside.append(asyncio.create_task(batcher.run(lambda: time.sleep(0.02))))
            await asyncio.sleep(0)
            if inside[-1].done():
                with pytest.raises(Overloaded, match="MAX_WAIT_S"):
                    await inside.pop()
                refused += 1
        assert 18 <= refused <= 26  # 0.2 s of 20 ms each, or fewer where the computer is slow
        inside.append(asyncio.create_task(batcher.run(lambda: None, admitted=True)))
        await asyncio.sleep(0)
        assert not inside[-1].done()
        extractor.gate.set()
        await asyncio.gather(*inside)

    run(work, extractor, max_wait_s=0.2)


@pytest.mark.slow
def test_a_function_waits_for_the_images_whose_turn_comes_before_it_and_no_others() -> None:
    extractor = Slow()

    async def work(batcher: Batcher) -> None:
        extractor.gate.set()
        await batcher.embed([RED] * 20)  # by now it is known how long an image takes
        for _ in range(30):
            await batcher.run(lambda: time.sleep(0.01))  # and a function, which makes no image dearer
        extractor.gate.clear()
        extractor.begun.clear()
        inside: list[asyncio.Task[object]] = [asyncio.create_task(batcher.embed([RED] * 4))]
        await asyncio.to_thread(extractor.begun.wait, 5)
        inside.append(asyncio.create_task(batcher.embed([RED])))
        for _ in range(8):  # one batch of four and eight of 10 ms each are less than 0.25 s
            inside.append(asyncio.create_task(batcher.run(lambda: None)))
            await asyncio.sleep(0)
            assert not inside[-1].done()
        inside.append(asyncio.create_task(batcher.embed([RED] * 12)))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="MAX_WAIT_S"):  # now four batches are before it
            await batcher.run(lambda: None)
        extractor.gate.set()
        await asyncio.gather(*inside)

    run(work, extractor, max_wait_s=0.25)


def test_an_extractor_that_fails_at_every_batch_counts_as_broken_until_it_works_again() -> None:
    extractor = Failing()

    async def work(batcher: Batcher) -> None:
        for number in range(FAILURES):
            assert batcher.alive, number
            await batcher.embed([RED])
        assert not batcher.alive
        extractor.broken = False
        await batcher.embed([RED])
        assert batcher.alive

    run(work, extractor)


def test_images_that_a_backbone_gives_no_numbers_for_do_not_make_it_count_as_broken() -> None:
    class Nothing(MeanColour):
        def __call__(self, batch: np.ndarray) -> np.ndarray:
            return np.full((len(batch), 3), np.nan, np.float32)

    async def work(batcher: Batcher) -> None:
        for _ in range(2 * FAILURES):
            (item,) = (await batcher.embed([RED])).items
            assert isinstance(item, ExtractorFailed)
        assert batcher.alive

    run(work, Nothing())


def test_a_lane_that_dies_tells_everyone_and_refuses_what_comes() -> None:
    class Deadly(Gated):
        def __call__(self, batch: np.ndarray) -> np.ndarray:
            super().__call__(batch)
            raise SystemExit

    extractor = Deadly()
    # The thread's own end is what is tested, so its traceback is no news.
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:

        async def work(batcher: Batcher) -> None:
            waiting = [asyncio.create_task(batcher.embed([RED])) for _ in range(3)]
            await asyncio.to_thread(extractor.begun.wait, 5)
            extractor.gate.set()
            for answer in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(answer, ExtractorFailed)
            assert not batcher.alive
            with pytest.raises(ExtractorFailed, match="restart"):
                await batcher.embed([RED])

        run(work, extractor)
    finally:
        threading.excepthook = hook


def test_closing_finishes_what_waits_and_takes_no_more() -> None:
    extractor = Gated()

    async def work(batcher: Batcher) -> None:
        waiting = [asyncio.create_task(batcher.embed([RED])) for _ in range(3)]
        await asyncio.to_thread(extractor.begun.wait, 5)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="shutting down"):
            await batcher.embed([RED])
        extractor.gate.set()
        await closing
        for embedded in await asyncio.gather(*waiting):
            features(embedded)

    run(work, extractor)


def test_a_function_runs_on_a_lane_and_its_error_is_the_callers() -> None:
    async def work(batcher: Batcher) -> None:
        assert (await batcher.run(lambda: threading.current_thread().name)).startswith("lane-")
        with pytest.raises(ZeroDivisionError):
            await batcher.run(lambda: 1 // 0)
        assert batcher.alive

    run(work, MeanColour())


def test_two_lanes_work_at_once_and_lose_nothing() -> None:
    async def work(batcher: Batcher) -> None:
        answers = await asyncio.gather(*(batcher.embed([RED, BLUE] * (1 + k % 5)) for k in range(40)))
        for k, answer in enumerate(answers):
            found = features(answer)
            assert len(found) == 2 * (1 + k % 5)
            assert (found.argmax(axis=1) == [0, 2] * (1 + k % 5)).all()

    run(work, MeanColour(), lanes=2, max_waiting=1000)
