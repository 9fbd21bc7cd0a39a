"""What a caller may send in a minute."""

from __future__ import annotations

import asyncio

import pytest

from models.errors import OverQuota, TooLarge
from service import quota
from service.quota import Allowance, spending


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_images_are_counted_until_the_minute_that_began_with_the_first_is_over() -> None:
    clock = Clock()
    allowance = Allowance(10, clock=clock)
    assert allowance.left() == (10, 60)
    clock.now = 1000.0
    allowance.spend(4)
    clock.now = 1042.5
    assert allowance.left() == (6, 18)
    allowance.spend(6)
    with pytest.raises(OverQuota, match="quota of 10 a minute 0 are left") as caught:
        allowance.spend(1)
    assert caught.value.retry_after == 18
    clock.now = 1060.0
    allowance.spend(10)
    assert allowance.left() == (0, 60)


def test_a_request_is_taken_whole_or_not_at_all() -> None:
    allowance = Allowance(10, clock=Clock())
    allowance.spend(4)
    with pytest.raises(OverQuota, match="6 are left"):
        allowance.spend(7)
    allowance.spend(6)


def test_a_request_that_never_fits_is_told_so_and_takes_nothing() -> None:
    allowance = Allowance(10, clock=Clock())
    with pytest.raises(TooLarge, match="send fewer at once"):
        allowance.spend(11)
    assert allowance.left() == (10, 60)


def test_each_request_spends_its_own_allowance_and_one_without_any_spends_freely() -> None:
    mine, yours = Allowance(10), Allowance(10)

    async def request(allowance: Allowance | None, images: int) -> None:
        quota.current.set(allowance)
        await asyncio.sleep(0)
        with spending(images):
            pass

    async def all_at_once() -> None:
        await asyncio.gather(*(request(who, n) for who, n in ((mine, 1), (yours, 2), (None, 1000), (mine, 3))))

    asyncio.run(all_at_once())
    assert (mine.left()[0], yours.left()[0]) == (6, 8)


def test_what_is_given_back_goes_to_the_minute_that_it_was_taken_from() -> None:
    clock = Clock()
    allowance = Allowance(10, clock=clock)
    early = allowance.spend(4)
    late = allowance.spend(3)
    allowance.give_back(3, late)
    assert allowance.left()[0] == 6
    clock.now = 60.0
    allowance.spend(5)  # of the next minute
    allowance.give_back(4, early)
    assert allowance.left()[0] == 5
