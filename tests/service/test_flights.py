from __future__ import annotations

import asyncio

import pytest

from service.callers import has_left
from service.flights import Flights, both

pytestmark = pytest.mark.anyio


class Work:
    """Counts its beginnings; ends when it is let go, perhaps by failing."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun = 0
        self.ended = 0
        self.go = asyncio.Event()
        self.error = error

    async def __call__(self) -> int:
        self.begun += 1
        await self.go.wait()
        self.ended += 1
        if self.error:
            raise self.error
        return self.begun


async def test_twins_share_one_piece_of_work_and_a_later_one_begins_anew() -> None:
    flights, work = Flights(), Work()
    twins = [flights.once(("a",), work) for _ in range(5)]
    await asyncio.sleep(0)
    work.go.set()
    assert await asyncio.gather(*twins) == [1] * 5
    assert await flights.once(("a",), work) == 2


async def test_other_work_is_not_shared() -> None:
    flights, work = Flights(), Work()
    work.go.set()
    assert await asyncio.gather(flights.once(("a",), work), flights.once(("b",), work)) == [1, 2]


async def test_who_leaves_does_not_end_it_for_the_others() -> None:
    flights, work = Flights(), Work()
    first, second = (flights.once(("a",), work) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    work.go.set()
    assert await second == 1
    assert first.cancelled()


async def test_work_that_others_may_share_is_not_given_up_when_who_began_it_hangs_up() -> None:
    async def looks() -> bool:
        return has_left.get()()

    token = has_left.set(lambda: True)
    assert await Flights().once(("a",), looks) is False
    assert has_left.get()()  # of whoever asked for it, all else still is
    has_left.reset(token)


async def test_a_failure_is_told_to_all_who_wait_and_to_none_who_come_later() -> None:
    flights, work = Flights(), Work(ValueError("no"))
    work.go.set()
    found = await asyncio.gather(*(flights.once(("a",), work) for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in found] == ["no"] * 3
    work.error = None
    assert await flights.once(("a",), work) == 2


async def test_work_that_is_left_alone_ends_for_who_waits_and_begins_anew_for_who_comes() -> None:
    flights, old, new = Flights(), Work(), Work()
    waiting, other = flights.once(("t", "cats", "hd"), old), flights.once(("t", "dogs", "hd"), old)
    await asyncio.sleep(0)
    flights.leave_alone("t", "cats")
    later = flights.once(("t", "cats", "hd"), new)
    old.go.set()
    assert (await waiting, await other, old.ended) == (2, 2, 2)
    await asyncio.sleep(0)  # what landed was not what is under way
    assert flights.once(("t", "cats", "hd"), new) is not later
    new.go.set()
    assert await later == 1
    assert new.begun == 1


async def test_both_are_begun_before_either_ends() -> None:
    one, two = Work(), Work()
    waiting = asyncio.create_task(both(one(), two()))
    await asyncio.sleep(0.001)
    assert (one.begun, two.begun) == (1, 1)
    one.go.set()
    two.go.set()
    assert await waiting == (1, 1)


@pytest.mark.parametrize("which", [0, 1])
async def test_when_one_of_both_fails_the_other_is_ended(which: int) -> None:
    works = [Work(), Work()]
    works[which].error = ValueError("no")
    works[which].go.set()
    with pytest.raises(ValueError, match="no"):
        await both(works[0](), works[1]())
    other = works[1 - which]
    other.go.set()
    await asyncio.sleep(0.001)
    assert other.ended == 0


async def test_when_both_fail_the_first_failure_counts() -> None:
    works = [Work(ValueError(name)) for name in ("one", "two")]
    for work in works:
        work.go.set()
    with pytest.raises(ValueError, match="one"):
        await both(works[0](), works[1]())
