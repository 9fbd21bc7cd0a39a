"""Who goes next and who is let in: tenants, and within one its requests, take turns."""

from __future__ import annotations

import asyncio
import io
import struct
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from models.errors import Overloaded
from service.callers import stays
from service.waiting import LARGE, MOST_PIXELS, ONE_MORE, PIXELS, Job, Waiting, cost


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Place:
    """A queue in front of one lane of batches of 16, in which an image takes 10 ms and a function 20."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, max_waiting: int = 1024, max_wait_s: float = 0.4):
        self.loop = loop
        self.waits = Waiting(lanes=1, max_batch=16, max_waiting=max_waiting, max_wait_s=max_wait_s)
        for _ in range(100):
            self.waits.spent(0.16, 16)
            assert self.call("earlier")
            self.function(0.02)

    def job(self, tenant: str, images: int = 0, *, large: int = 0) -> Job:
        """`large`: of so many images is each the work."""
        files = [b" " * (LARGE + (large - 1) * ONE_MORE) if large else b""] * images
        return Job(files, self.loop.create_future(), self.loop, 0.0, tenant, stays, None if images else lambda: None)

    def come(self, tenant: str, images: int = 1, *, large: int = 0) -> Job | None:
        """The job, where it was let in."""
        job = self.job(tenant, images, large=large)
        try:
            self.waits.join(job)
        except Overloaded:
            return None
        return job

    def call(self, tenant: str) -> Job | None:
        job = self.job(tenant)
        try:
            self.waits.join_function(job, admitted=False)
        except Overloaded:
            return None
        return job

    def function(self, seconds: float = 0.0) -> str | None:
        """Takes one, where it is its turn, which takes so long, and tells whose it is."""
        job = self.waits.function()
        if job is not None:
            self.waits.called(job, seconds)
        return job and job.tenant

    def batch(self, limit: int = 16) -> list[str]:
        """Takes one, and tells whose its images are."""
        taken = self.waits.take(limit, lambda _: False)
        self.waits.underway -= sum(cost(job.payloads[index]) for job, index in taken)
        return [job.tenant for job, _ in taken]


def test_of_the_next_images_each_tenant_gets_an_equal_share(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop, max_wait_s=1)
    for _ in range(30):
        assert place.come("many")
    for tenant in ("few", "fewer"):
        assert place.come(tenant, 20)
    assert Counter(place.batch(15)) == {"many": 5, "few": 5, "fewer": 5}
    assert Counter(place.batch(16)) == {"many": 6, "few": 5, "fewer": 5}
    assert Counter(place.batch(16)) == {"few": 6, "fewer": 5, "many": 5}  # a place that is over is each one's in turn


def test_places_that_others_do_not_need_are_for_who_waits(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    for _ in range(40):
        assert place.come("many")
    assert place.come("one")
    assert Counter(place.batch()) == {"many": 15, "one": 1}
    assert Counter(place.batch()) == {"many": 16}


def test_where_tenants_are_more_than_places_all_have_their_turn(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    names = [f"tenant-{number}" for number in range(10)]
    for name in names:
        assert place.come(name, 3)
    assert sorted(place.batch(4) + place.batch(4) + place.batch(2)) == sorted(names)


def test_requests_of_one_tenant_take_turns_as_well(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    large, small = place.come("one", 60), place.come("one", 2)
    assert large
    assert small
    place.batch(8)
    assert small.rest == 0
    assert large.rest == 54


@pytest.mark.slow
def test_who_asks_for_ten_times_what_can_be_done_is_refused_and_another_is_not(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    refused = Counter[str]()
    served = Counter[str]()
    for _ in range(200):  # of 160 ms, in which sixteen images are done
        for number in range(160):
            refused["flood"] += place.come("flood") is None
            if number % 20 == 0:
                refused["calm"] += place.come("calm") is None
        served.update(place.batch())
    assert refused["calm"] == 0
    assert served["calm"] == pytest.approx(200 * 8, abs=16)
    assert refused["flood"] > 200 * 140
    assert sum(served.values()) == 200 * 16


def test_alone_a_tenant_has_all_of_it(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    assert (
        sum(place.come("alone") is not None for _ in range(100)) == 40
    )  # 0.4 s of 10 ms each, with the one that waits


@pytest.mark.slow
def test_of_two_who_flood_each_gets_a_half(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    served = Counter[str]()
    for _ in range(100):
        for _ in range(100):
            place.come("one")
        place.come("other", 40)
        served.update(place.batch())
    assert served["one"] == pytest.approx(served["other"], abs=16)


def test_a_full_house_has_room_for_who_has_less_than_a_share_of_it(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop, max_waiting=20, max_wait_s=1e9)
    assert sum(place.come("flood") is not None for _ in range(50)) == 20
    assert sum(place.come("calm") is not None for _ in range(50)) == 10
    assert sum(place.come("late") is not None for _ in range(50)) == 6
    assert place.come("flood") is None
    for number in range(30):  # but twice the house is the end
        place.come(f"tenant-{number}")
    assert place.waits.images == 40


def test_an_empty_house_takes_any_request(loop: asyncio.AbstractEventLoop) -> None:
    assert Place(loop, max_waiting=4).come("large", 50)


def test_functions_take_turns_by_tenant_as_well(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    assert sum(place.call("flood") is not None for _ in range(50)) == 21
    assert place.call("calm")
    assert place.call("calm")
    order = []
    while tenant := place.function(0.02):
        order.append(tenant)
    assert order[:4] == ["flood", "calm", "flood", "calm"]
    assert Counter(order) == {"flood": 21, "calm": 2}


def test_a_tenant_whose_functions_take_long_gets_no_more_time_than_another(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop, max_wait_s=1000)
    for _ in range(200):
        assert place.call("long")
        assert place.call("short")
    seconds = Counter[str]()
    for _ in range(100):
        job = place.waits.function()
        assert job
        takes = 1.0 if job.tenant == "long" else 0.02
        place.waits.called(job, takes)
        seconds[job.tenant] += takes
    assert seconds["long"] <= seconds["short"] + 1.0


@pytest.mark.parametrize("takes", [0.001, 0.16, 2.0])
def test_while_images_wait_functions_get_no_more_than_half_of_the_time(
    loop: asyncio.AbstractEventLoop, takes: float
) -> None:
    place = Place(loop, max_wait_s=1000)
    for _ in range(200):
        assert place.call("functions")
        assert place.come("images", 4)
    functions, batches = 0, 0
    for _ in range(40):
        if place.function(takes):
            functions += 1
        else:
            assert place.batch()
            place.waits.spent(0.16, 16)
            batches += 1
    assert functions * takes <= batches * 0.16 + takes
    assert functions >= (20 if takes <= 0.16 else 2)


def test_functions_owe_nothing_to_images_that_no_longer_wait(loop: asyncio.AbstractEventLoop) -> None:
    """A light stream of questions beside much learning leaves no debt for which all learning stops one day."""
    place = Place(loop, max_wait_s=1000)
    for _ in range(100):
        assert place.come("images")
        assert place.call("functions")
        assert place.function(0.3)
        assert place.batch()
        place.waits.spent(0.01, 1)
    assert place.call("functions")
    assert place.come("images", 500)
    turns = 0
    while place.function(0.3) is None:
        assert place.batch()
        place.waits.spent(0.16, 16)
        turns += 1
    assert turns <= 3


def test_who_took_long_waits_for_others_no_longer_than_anybody_may(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop, max_wait_s=40)
    for tenant in ("long", "short", "short"):
        assert place.call(tenant)
    assert place.function(100.0) == "long"
    assert place.call("long")
    waited = 0.0
    while place.function(0.02) != "long":
        waited += 0.02
        assert place.call("short")
    assert 10 < waited <= 40


def test_a_tenant_gets_no_credit_for_what_took_less_than_it_was_taken_for(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    for _ in range(4):  # in flight at once, and nobody waits
        assert place.call("quick")
    flying = [place.waits.function() for _ in range(4)]
    assert place.call("other")
    assert place.call("quick")
    for job in flying:
        assert job
        place.waits.called(job, 0.0)
    for _ in range(3):
        assert place.call("quick")
    assert "other" in [place.function(0.02) for _ in range(2)]


def test_images_behind_few_long_functions_are_let_in(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop, max_wait_s=10)
    for _ in range(20):
        job = place.job("learns")
        place.waits.join_function(job, admitted=True)
    for _ in range(20):
        assert place.function(3.0)
    for _ in range(20):
        place.waits.join_function(place.job("learns"), admitted=True)
    assert all(place.come("asks", 16) for _ in range(8))


@pytest.mark.parametrize(("lanes", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_while_images_wait_functions_run_on_no_more_than_half_of_the_lanes(
    loop: asyncio.AbstractEventLoop, lanes: int, most: int
) -> None:
    waits = Waiting(lanes=lanes, max_batch=16, max_waiting=1024, max_wait_s=100)
    place = Place(loop)
    for _ in range(lanes):
        waits.join_function(place.job("functions"), admitted=False)
    waits.join(place.job("images", 4))
    assert sum(waits.function() is not None for _ in range(lanes)) == most
    assert waits.take(16, lambda _: False)
    rest = sum(waits.function() is not None for _ in range(lanes))
    assert rest == lanes - most  # nobody else waits: they may have all lanes


@pytest.mark.slow
def test_a_large_file_counts_as_the_many_that_it_takes_as_long_as(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop, max_wait_s=100)
    served = Counter[str]()
    for _ in range(60):
        for _ in range(4):
            place.come("large", large=10)
        place.come("small", 16)
        taken = place.batch()
        assert len(taken) <= 16
        served.update(taken)
    assert served["small"] == pytest.approx(10 * served["large"], rel=0.1)


def test_of_large_files_a_batch_takes_no_more_than_work_for_as_many_images(loop: asyncio.AbstractEventLoop) -> None:
    for large, images in ((8, 2), (100, 1), (1, 16)):
        place = Place(loop, max_wait_s=100)
        assert place.come("one", 20, large=large)
        assert place.batch() == ["one"] * images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "least"),
    [("PNG", 12), ("WEBP", 12), ("JPEG", 2)],  # a JPEG is made smaller while it is decoded
)
def test_a_small_file_of_many_pixels_counts_as_many(kind: str, least: float) -> None:
    out = io.BytesIO()
    Image.new("RGB", (2000, 2000), "white").save(out, kind)
    assert len(out.getvalue()) < LARGE
    assert least <= cost(out.getvalue()) < 20


@pytest.mark.parametrize("width", [2**14, 2**20, 2**31 - 1])
@pytest.mark.parametrize(
    "header",
    [
        lambda width: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, width) + b"\x08\x02\0\0\0",
        lambda width: b"RIFF....WEBPVP8X" + bytes(8) + b"\xff" * 6,
    ],
    ids=["png", "webp"],
)
def test_a_header_may_claim_what_it_likes(header: Callable[[int], bytes], width: int) -> None:
    assert cost(header(width)) == MOST_PIXELS / PIXELS


def test_what_takes_longer_a_pixel_counts_as_more() -> None:
    """Many scans, more bits than are looked at, seven passes; and a size that is hidden is the largest there is."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2000, 2000, 3), dtype=np.uint8))
    files: dict[str, bytes] = {}
    for name, more in (("usual", {}), ("progressive", {"progressive": True})):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=1, **more)
        files[name] = out.getvalue()
    assert cost(files["progressive"]) > 4 * cost(files["usual"])
    padded = files["usual"][:2] + b"\xff\xfe\x00\x02" * 60 + files["usual"][2:]
    assert cost(padded) > 20 * cost(files["usual"])
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 2000, 2000)
    plain, deep, laced = (cost(head + end) for end in (b"\x08\x02\0\0\0", b"\x10\x06\0\0\0", b"\x10\x06\0\0\1"))
    assert plain < 0.5 * deep < 0.3 * laced


def test_of_few_large_files_none_is_refused_that_used_not_to_be(loop: asyncio.AbstractEventLoop) -> None:
    """As many images as the lanes take next are no queue, whatever they weigh; a lone tenant's photographs, say."""
    place = Place(loop)
    assert all(place.come("one", large=6) for _ in range(17))  # a lane of batches of sixteen


def test_an_idle_lane_takes_as_many_large_files_as_make_a_batch(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop, max_wait_s=100)
    assert place.come("one", 8, large=2)
    assert place.batch(4) == ["one"] * 4  # which leaves four for another lane


def test_one_after_the_other_large_files_do_not_get_more_than_a_share(loop: asyncio.AbstractEventLoop) -> None:
    """Who has just had much does not begin anew by coming again."""
    place = Place(loop, max_wait_s=100)
    served = Counter[str]()
    large = None
    for _ in range(200):
        if large is None or not large.rest:
            large = place.come("large", large=40)
        place.come("small", 16)
        served.update(place.batch())
    assert 40 * served["large"] <= served["small"] + 40


def test_functions_of_others_do_not_keep_images_out(loop: asyncio.AbstractEventLoop) -> None:
    alone, beside = Place(loop), Place(loop)
    while beside.call("flood"):
        pass
    let_in = [sum(place.come("calm") is not None for _ in range(60)) for place in (alone, beside)]
    assert let_in[1] >= 0.8 * let_in[0]


def test_what_ends_a_request_goes_by_tenant_too(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    for tenant in ("flood",) * 5 + ("calm",):
        place.waits.join_function(place.job(tenant), admitted=True)
    assert [place.function(0.02) for _ in range(6)][:2] == ["flood", "calm"]


def test_nothing_is_counted_that_is_not_there(loop: asyncio.AbstractEventLoop) -> None:
    place = Place(loop)
    gone = place.come("left", 7)
    assert place.come("stays", 3)
    taken = place.waits.take(16, lambda job: job is gone)
    assert [job.tenant for job, _ in taken] == ["stays"] * 3
    assert place.waits.images == 0
    assert not place.waits
