"""What every store promises, asked of each of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest

from models.errors import VersionConflict
from service.stores import Pointer, SealBroken, Store
from tests.service.stores.conftest import STORES, Beneath
from tests.service.stores.values import commit, make_head, make_record, same

pytestmark = pytest.mark.anyio


async def test_what_is_committed_is_read_back_exactly(store: Store) -> None:
    scope = store.scope("t")
    record, head = make_record(1), make_head(1)
    pointer = await scope.commit("cats", record, "hd_1", head, expect=None)
    assert pointer == Pointer(1, "hd_1") == await scope.pointer("cats")
    found = await scope.record("cats")
    assert found is not None
    assert found[0] == pointer
    assert same(found[1], record)
    assert same(await scope.head("hd_1"), head)


async def test_what_is_not_there_is_none(store: Store) -> None:
    scope = store.scope("t")
    assert await scope.pointer("cats") is None
    assert await scope.record("cats") is None
    assert await scope.head("hd_1") is None
    assert await scope.delete("cats") is False
    assert await scope.tasks(limit=10) == []


async def test_versions_count_and_the_newest_record_is_read(store: Store) -> None:
    scope = store.scope("t")
    assert [await commit(scope, "cats", seed) for seed in (1, 2, 3)] == [1, 2, 3]
    found = await scope.record("cats")
    assert found is not None
    assert found[0] == Pointer(3, "hd_3")
    assert same(found[1], make_record(3))


async def test_a_commit_that_expects_another_version_changes_nothing(store: Store) -> None:
    scope = store.scope("t")
    with pytest.raises(VersionConflict):
        await commit(scope, "cats", 1, expect=1)
    assert await scope.pointer("cats") is None
    assert await commit(scope, "cats", 1, expect=0) == 1
    assert await commit(scope, "cats", 2, expect=1) == 2
    for wrong in (0, 1, 3):
        with pytest.raises(VersionConflict):
            await commit(scope, "cats", 3, expect=wrong)
    assert await scope.pointer("cats") == Pointer(2, "hd_2")
    assert await scope.head("hd_3") is None


async def test_twenty_increments_at_once_lose_none(store: Store) -> None:
    scope = store.scope("t")
    await commit(scope, "sum", 0)
    conflicts = 0

    async def increment() -> None:
        nonlocal conflicts
        while True:
            found = await scope.record("sum")
            assert found is not None
            count = int(found[0].head.removeprefix("hd_"))
            await asyncio.sleep(0)  # let the others read the same
            try:
                await commit(scope, "sum", count + 1, expect=found[0].version)
                return
            except VersionConflict:
                conflicts += 1
                await asyncio.sleep(random.uniform(0, 0.01))

    await asyncio.gather(*(increment() for _ in range(20)))
    assert await scope.pointer("sum") == Pointer(21, "hd_20")
    assert conflicts > 0  # they did meet


async def test_commits_at_once_without_an_expectation_all_count(store: Store) -> None:
    scope = store.scope("t")
    versions = await asyncio.gather(*(commit(scope, "cats", seed) for seed in range(4)))
    assert sorted(versions) == [1, 2, 3, 4]


async def test_a_deleted_task_stays_gone_and_starts_again_at_one(store: Store) -> None:
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2)
    assert await scope.delete("cats") is True
    assert await scope.delete("cats") is False
    assert await scope.pointer("cats") is None
    assert await scope.record("cats") is None
    assert await scope.head("hd_2") is None
    assert await scope.tasks(limit=10) == []
    with pytest.raises(VersionConflict):  # a change to what it was does not bring it back
        await commit(scope, "cats", 3, expect=2)
    assert await scope.pointer("cats") is None
    assert await commit(scope, "cats", 4) == 1


async def test_listing_goes_by_name_in_pages(store: Store) -> None:
    scope = store.scope("t")
    for name in ("b", "a-1", "C", "d_2", "a"):
        await commit(scope, name)
    assert await scope.tasks(limit=0) == []
    first = await scope.tasks(limit=2)
    second = await scope.tasks(limit=2, after="a")
    third = await scope.tasks(limit=2, after="b")
    assert [name for name, _ in first + second + third] == ["C", "a", "a-1", "b", "d_2"]
    assert first[0][1] == Pointer(1, "hd_0")
    assert await scope.tasks(limit=2, after="d_2") == []
    assert len(await scope.tasks(limit=5)) == 5


async def test_tenants_do_not_see_each_other(store: Store) -> None:
    one, other = store.scope("one"), store.scope("other")
    await commit(one, "cats", 1)
    assert await other.pointer("cats") is None
    assert await other.record("cats") is None
    assert await other.head("hd_1") is None
    assert await other.tasks(limit=10) == []
    assert await other.delete("cats") is False
    assert await commit(other, "cats", 2) == 1
    assert await other.delete("cats") is True
    assert await one.pointer("cats") == Pointer(1, "hd_1")


async def test_a_head_can_be_put_back(store: Store) -> None:
    scope = store.scope("t")
    await scope.keep_head("hd_7", make_head(7))
    assert same(await scope.head("hd_7"), make_head(7))


async def test_a_task_that_expired_is_gone_everywhere(store: Store) -> None:
    scope = store.scope("t")
    await commit(scope, "stays")
    record = make_record(1, expires=time.time() + 0.3)
    await scope.commit("goes", record, "hd_1", make_head(1), expect=None)
    found = await scope.record("goes")
    assert found is not None
    assert same(found[1], record)
    assert [name for name, _ in await scope.tasks(limit=10)] == ["goes", "stays"]
    while time.time() <= record.expires:  # type: ignore[operator]
        await asyncio.sleep(0.05)
    assert await scope.pointer("goes") is None
    assert await scope.record("goes") is None
    assert [name for name, _ in await scope.tasks(limit=1)] == ["stays"]  # the page is filled in spite of it
    assert await scope.delete("goes") is False
    assert await commit(scope, "goes", 2) == 1
    assert [name for name, _ in await scope.tasks(limit=10)] == ["goes", "stays"]


async def test_a_task_made_lasting_outlives_its_first_end(store: Store) -> None:
    scope = store.scope("t")
    await scope.commit("cats", make_record(1, expires=time.time() + 0.2), "hd_1", make_head(1), expect=None)
    assert await commit(scope, "cats", 2) == 2
    await asyncio.sleep(0.3)
    assert await scope.pointer("cats") == Pointer(2, "hd_2")
    assert await scope.record("cats") is not None


@pytest.mark.parametrize("name", [*STORES, "recent-sqlite"])
async def test_a_scope_may_be_made_before_the_store_is_opened(make: Callable[[str], Store], name: str) -> None:
    store = make(name)
    scope = store.scope("t")
    await store.open()
    assert await commit(scope, "cats") == 1
    await store.close()


async def test_an_open_store_answers_a_ping(store: Store) -> None:
    assert await store.ping() is True


# Damage: a value is served as it was written, in its place, or not at all.


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize("where", [0, 10, 40, -1])
async def test_a_damaged_head_counts_as_gone(bare: Store, beneath: Beneath, where: int) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    good = beneath.get("head", "t", name="hd_1")
    beneath.set("head", "t", name="hd_1", data=flipped(good, where % len(good)))
    assert await scope.head("hd_1") is None
    await scope.keep_head("hd_1", make_head(1))
    assert same(await scope.head("hd_1"), make_head(1))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: flipped(data, 45),
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["pointer", "record"])
async def test_a_damaged_task_is_refused_and_the_others_go_on(
    bare: Store, beneath: Beneath, kind: str, damage: str
) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2)
    await commit(scope, "dogs", 3)
    beneath.set(kind, "t", name="cats", data=DAMAGE[damage](beneath.get(kind, "t", name="cats")))
    with pytest.raises(SealBroken):
        await scope.record("cats")
    if kind == "pointer":
        with pytest.raises(SealBroken):
            await scope.pointer("cats")
        assert [name for name, _ in await scope.tasks(limit=1)] == ["dogs"]
    assert await scope.record("dogs") is not None


async def test_a_damaged_pointer_loses_neither_count_nor_record(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2)
    beneath.set("pointer", "t", name="cats", data=b"rotten")
    with pytest.raises(VersionConflict):
        await commit(scope, "cats", 3, expect=0)
    assert await commit(scope, "cats", 3) == 3  # learned again: repaired
    assert await scope.pointer("cats") == Pointer(3, "hd_3")
    beneath.set("pointer", "t", name="cats", data=b"rotten")
    assert await scope.delete("cats") is True
    assert await scope.pointer("cats") is None
    assert await commit(scope, "cats", 4) == 1


async def test_a_value_in_another_place_is_refused(bare: Store, beneath: Beneath) -> None:
    one, other = bare.scope("one"), bare.scope("other")
    await commit(one, "cats", 1)
    await commit(one, "dogs", 2)
    await commit(other, "cats", 1)
    for kind in ("pointer", "record"):
        beneath.set(kind, "one", name="dogs", data=beneath.get(kind, "one", name="cats"))
    beneath.set("head", "one", name="hd_2", data=beneath.get("head", "one", name="hd_1"))
    with pytest.raises(SealBroken):
        await one.pointer("dogs")
    with pytest.raises(SealBroken):
        await one.record("dogs")
    assert await one.head("hd_2") is None
    # The very same pointer and head, but another tenant's.
    for kind, name in (("pointer", "cats"), ("record", "cats"), ("head", "hd_1")):
        beneath.set(kind, "other", name=name, data=beneath.get(kind, "one", name=name))
    with pytest.raises(SealBroken):
        await other.pointer("cats")
    assert await other.head("hd_1") is None


async def test_the_record_of_an_earlier_version_is_refused(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    earlier = beneath.get("record", "t", name="cats")
    await commit(scope, "cats", 2)
    beneath.set("record", "t", name="cats", data=earlier)
    with pytest.raises(SealBroken):
        await scope.record("cats")
