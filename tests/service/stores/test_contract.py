"""What every store promises, asked of each of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from models.errors import VersionConflict
from service.stores import Pointer, Record, Scope, SealBroken, Store
from tests.service.stores.conftest import STORES, Beneath, Until
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


@pytest.mark.slow
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


async def test_a_task_is_deleted_only_where_it_is_expected(store: Store) -> None:
    scope = store.scope("t")
    assert await scope.delete("cats", expect=Pointer(1, "hd_1")) is False
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2)
    for wrong in (0, 1, 3, Pointer(2, "hd_1"), Pointer(1, "hd_2")):
        with pytest.raises(VersionConflict):
            await scope.delete("cats", expect=wrong)
    assert await scope.pointer("cats") == Pointer(2, "hd_2")
    assert same((await scope.record("cats", version=1) or (None, None))[1], make_record(1))
    assert await scope.delete("cats", expect=Pointer(2, "hd_2")) is True
    assert await scope.pointer("cats") is None


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


@pytest.mark.slow
async def test_a_tenant_is_full_when_it_has_so_many_tasks_that_have_not_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.stores.redis.WEED_S", 0.0)
    scope, other = store.scope("t"), store.scope("u")
    assert await scope.full(1) is False
    await commit(scope, "a")
    await commit(scope, "b")
    await commit(scope, "b", 1)
    assert await scope.full(2) is True
    assert await scope.full(3) is False
    assert await other.full(1) is False
    await commit(scope, "short", expires=time.time() + 0.2)
    assert await scope.full(3) is True
    await scope.delete("a")
    assert await scope.full(3) is False
    assert await scope.full(2) is True
    await asyncio.sleep(0.3)
    assert await scope.full(2) is False


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
    await commit(scope, "cats", 7)
    await scope.keep_head("cats", Pointer(1, "hd_7"), make_head(7, way=3))
    assert same(await scope.head("hd_7"), make_head(7, way=3))


@pytest.mark.parametrize("meanwhile", ["moved", "deleted", "made anew"])
async def test_a_head_is_put_back_only_while_its_task_is_there(bare: Store, meanwhile: str) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    if meanwhile == "moved":
        await commit(scope, "cats", 2)
    else:
        await scope.delete("cats")
    if meanwhile == "made anew":
        await commit(scope, "cats", 3)
    before = await scope.head("hd_1")
    await scope.keep_head("cats", Pointer(1, "hd_1"), make_head(1, way=3))
    assert same(await scope.head("hd_1"), before) if before else await scope.head("hd_1") is None


async def test_heads_go_with_the_versions_that_are_not_kept(bare: Store) -> None:
    scope = bare.scope("t")
    for seed in range(13):
        await commit(scope, "cats", seed)
    heads = [await scope.head(f"hd_{seed}") for seed in range(13)]
    assert [head is None for head in heads] == [seed < 3 for seed in range(13)]
    await scope.delete("cats")
    assert not any([await scope.head(f"hd_{seed}") for seed in range(13)])


async def test_a_head_ends_with_its_task(bare: Store, until: Until) -> None:
    scope = bare.scope("t")
    end = time.time() + 1
    for seed, task in ((1, "goes"), (2, "goes too")):
        await commit(scope, task, seed, expires=end)
    await scope.keep_head("goes too", Pointer(1, "hd_2"), make_head(2))
    assert await scope.head("hd_1") is not None
    assert await scope.head("hd_2") is not None
    await until(bare, end)
    assert await scope.head("hd_1") is None
    assert await scope.head("hd_2") is None


async def test_a_change_that_expects_a_head_does_not_meet_another_task_at_its_version(store: Store) -> None:
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    await scope.delete("cats")
    await commit(scope, "cats", 2)
    with pytest.raises(VersionConflict):
        await commit(scope, "cats", 3, expect=Pointer(1, "hd_1"))
    assert await scope.pointer("cats") == Pointer(1, "hd_2")
    assert await commit(scope, "cats", 3, expect=Pointer(1, "hd_2")) == 2


async def test_a_task_that_expired_is_gone_everywhere(store: Store, until: Until) -> None:
    scope = store.scope("t")
    await commit(scope, "stays")
    end = time.time() + 1
    record = make_record(1, expires=end)
    await scope.commit("goes", record, "hd_1", make_head(1), expect=None)
    found = await scope.record("goes")
    assert found is not None
    assert same(found[1], record)
    assert await scope.pointer("goes") == Pointer(1, "hd_1")  # a store may remember what it read
    assert [name for name, _ in await scope.tasks(limit=10)] == ["goes", "stays"]
    await until(store, end)
    assert await scope.pointer("goes") is None
    assert await scope.record("goes") is None
    assert [name for name, _ in await scope.tasks(limit=1)] == ["stays"]  # the page is filled in spite of it
    assert await scope.delete("goes") is False
    assert await commit(scope, "goes", 2) == 1
    assert [name for name, _ in await scope.tasks(limit=10)] == ["goes", "stays"]


async def test_a_task_made_lasting_outlives_its_first_end(store: Store, until: Until) -> None:
    scope = store.scope("t")
    end = time.time() + 1
    await commit(scope, "cats", 1, expires=end)
    assert await commit(scope, "cats", 2) == 2
    await until(store, end)
    assert await scope.pointer("cats") == Pointer(2, "hd_2")
    assert await scope.record("cats") is not None
    assert same(await read(scope, "cats", 1), make_record(1, expires=end))  # and takes its versions along


# Versions.


async def read(scope: Scope, task: str, version: int) -> Record | None:
    """The record of a version, after a look at where it says it was."""
    found = await scope.record(task, version=version)
    if found is None:
        return None
    assert found[0].version == version
    assert found[0] in await scope.versions(task)
    return found[1]


async def test_earlier_versions_are_kept_with_their_heads_newest_first(store: Store) -> None:
    scope = store.scope("t")
    for seed in (5, 6, 7):
        await commit(scope, "cats", seed)
    await commit(scope, "dogs", 8)
    assert await scope.versions("cats") == [Pointer(3, "hd_7"), Pointer(2, "hd_6"), Pointer(1, "hd_5")]
    for version, seed in ((1, 5), (2, 6), (3, 7)):
        found = await scope.record("cats", version=version)
        assert found is not None
        assert found[0] == Pointer(version, f"hd_{seed}")
        assert same(found[1], make_record(seed))
    assert await scope.pointer("cats") == Pointer(3, "hd_7")
    assert await scope.versions("dogs") == [Pointer(1, "hd_8")]


async def test_a_version_that_says_the_same_takes_the_place_of_the_newest(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    for seed in (5, 6):
        await commit(scope, "cats", seed)
    values = beneath.left()
    for seed in range(7, 37):
        await commit(scope, "cats", seed, instead=True)
    assert beneath.left() == values
    at = await scope.pointer("cats")
    assert at == Pointer(32, "hd_36")
    assert await scope.versions("cats") == [at, Pointer(1, "hd_5")]
    assert same(await read(scope, "cats", 1), make_record(5))
    assert await scope.record("cats", version=at.version - 1) is None
    assert await scope.head("hd_35") is None
    await commit(scope, "dogs", 1, instead=True)
    assert await scope.versions("dogs") == [Pointer(1, "hd_1")]


async def test_versions_that_are_not_kept_are_none(store: Store) -> None:
    scope = store.scope("t")
    assert await scope.versions("cats") == []
    assert await scope.record("cats", version=1) is None
    await commit(scope, "cats", 1)
    for version in (-1, 0, 2):
        assert await scope.record("cats", version=version) is None
    assert await store.scope("other").versions("cats") == []
    assert await store.scope("other").record("cats", version=1) is None


async def test_a_record_comes_back_with_its_images(store: Store) -> None:
    scope = store.scope("t")
    record = make_record(1, images=True)
    await scope.commit("cats", record, "hd_1", make_head(1), expect=None)
    await commit(scope, "cats", 2)
    assert same(await read(scope, "cats", 1), record)
    assert len(record.images) == len(record.ids)
    found = await scope.record("cats")
    assert found is not None
    assert found[1].images == ()


async def test_ten_versions_are_kept_unless_told_otherwise(store: Store) -> None:
    scope = store.scope("t")
    for seed in range(12):
        await commit(scope, "cats", seed)
    assert await scope.versions("cats") == [Pointer(seed + 1, f"hd_{seed}") for seed in range(11, 1, -1)]
    assert same(await read(scope, "cats", 3), make_record(2))
    assert await scope.record("cats", version=2) is None


async def test_going_back_step_by_step_pushes_out_no_version_that_lies_before(bare: Store) -> None:
    bare.versions_kept = 4  # type: ignore[attr-defined]
    scope = bare.scope("t")
    for seed in (1, 2, 3, 4, 3, 2, 1):
        await commit(scope, "cats", seed)
    kept = await scope.versions("cats")
    assert [(known.version, known.head) for known in kept] == [(7, "hd_1"), (6, "hd_2"), (5, "hd_3"), (4, "hd_4")]
    for known, seed in zip(kept, (1, 2, 3, 4), strict=True):
        assert same(await read(scope, "cats", known.version), make_record(seed))
    await commit(scope, "cats", 5)
    assert [known.version for known in await scope.versions("cats")] == [8, 7, 6, 5]


@pytest.mark.parametrize("most", [1, 3])
async def test_what_is_older_than_the_kept_versions_is_deleted(bare: Store, beneath: Beneath, most: int) -> None:
    bare.versions_kept = most  # type: ignore[attr-defined]
    scope = bare.scope("t")
    for _ in range(5):
        await commit(scope, "cats", 0)
    assert [known.version for known in await scope.versions("cats")] == [5, 4, 3][:most]
    for version in (1, 2, *((3, 4) if most == 1 else ())):
        assert await scope.record("cats", version=version) is None
    count = beneath.left()
    await commit(scope, "cats", 0)
    assert beneath.left() == count  # as much as was written has gone
    bare.versions_kept = 1  # type: ignore[attr-defined]
    await commit(scope, "cats", 0)  # and with fewer to be kept, all that are too many
    assert beneath.left() == count - most + 1
    assert await scope.versions("cats") == [Pointer(7, "hd_0")]


async def test_no_version_outlives_a_task_that_was_given_an_end(bare: Store, beneath: Beneath, until: Until) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2)
    end = time.time() + 1
    await commit(scope, "cats", 3, expires=end)
    assert same(await read(scope, "cats", 1), make_record(1))
    await until(bare, end)
    assert await scope.versions("cats") == []
    for version in (1, 2, 3):
        assert await scope.record("cats", version=version) is None
    await commit(scope, "dogs", 3)  # what had an end is cleared away by now
    assert await commit(scope, "cats", 9) == 1
    assert await scope.versions("cats") == [Pointer(1, "hd_9")]
    assert await scope.record("cats", version=2) is None
    with pytest.raises((StopIteration, ValueError, TypeError)):
        beneath.get("record", "t", name="cats", version=2)


async def test_versions_of_a_task_whose_end_moves_move_with_it(store: Store, until: Until) -> None:
    scope = store.scope("t")
    end = time.time() + 1
    await commit(scope, "cats", 1, expires=end)
    await commit(scope, "cats", 2, expires=end + 100)
    await until(store, end)
    assert await scope.versions("cats") == [Pointer(2, "hd_2"), Pointer(1, "hd_1")]
    assert same(await read(scope, "cats", 1), make_record(1, expires=end))


async def test_a_deleted_task_takes_all_its_versions_heads_and_memories_along(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    for seed in (1, 2, 3):
        await commit(scope, "cats", seed)
    for key in ("a", "b"):
        await scope.remember("cats", key, b"value", ttl_s=60)
    assert await scope.delete("cats") is True
    assert beneath.left() == 0
    assert await scope.versions("cats") == []
    assert await scope.record("cats", version=1) is None
    assert await scope.recall("cats", "a") is None
    await commit(scope, "cats", 4)
    assert await scope.versions("cats") == [Pointer(1, "hd_4")]
    assert await scope.recall("cats", "a") is None


async def test_writers_who_meet_leave_a_history_without_gaps(store: Store) -> None:
    scope = store.scope("t")

    async def writer(seed: int) -> None:
        while True:
            with suppress(VersionConflict):
                await commit(scope, "cats", seed)
                return

    await asyncio.gather(*(writer(seed) for seed in range(6)))
    versions = await scope.versions("cats")
    assert [known.version for known in versions] == [6, 5, 4, 3, 2, 1]
    assert {known.head for known in versions} == {f"hd_{seed}" for seed in range(6)}
    for known in versions:
        assert same(await read(scope, "cats", known.version), make_record(int(known.head.removeprefix("hd_"))))


async def test_a_refused_commit_leaves_the_history(store: Store) -> None:
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    with pytest.raises(VersionConflict):
        await commit(scope, "cats", 2, expect=7)
    assert await scope.versions("cats") == [Pointer(1, "hd_1")]


# What is remembered beside a task.


async def test_what_is_remembered_is_recalled_until_it_is_forgotten(store: Store) -> None:
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    assert await scope.recall("cats", "key") is None
    assert await scope.remember("cats", "key", b"\0value\xff", ttl_s=60) is True
    assert await scope.recall("cats", "key") == b"\0value\xff"
    await commit(scope, "cats", 2)
    assert await scope.recall("cats", "key") == b"\0value\xff"
    assert await scope.remember("cats", "key", b"", ttl_s=60) is True
    assert await scope.recall("cats", "key") == b""
    await scope.forget_remembered("cats", "key")
    await scope.forget_remembered("cats", "key")
    assert await scope.recall("cats", "key") is None


async def test_memories_of_tenants_tasks_and_keys_are_apart(store: Store) -> None:
    scope = store.scope("t")
    places = [("cats", "key"), ("cats", "Key"), ("cats", "key:é ✓"), ("cats-key", ""), ("dogs", "key")]
    for number, (task, key) in enumerate(places):
        await scope.remember(task, key, b"%d" % number, ttl_s=60)
    await store.scope("other").remember("cats", "key", b"other", ttl_s=60)
    await scope.forget_remembered("dogs", "key")
    assert [await scope.recall(*place) for place in places] == [b"0", b"1", b"2", b"3", None]
    await scope.delete("cats")
    assert [await scope.recall(*place) for place in places] == [None, None, None, b"3", None]
    assert await store.scope("other").recall("cats", "key") == b"other"


async def test_a_claim_is_given_once_until_it_is_forgotten_or_has_expired(store: Store, until: Until) -> None:
    scope = store.scope("t")
    assert await scope.remember("cats", "key", b"first", ttl_s=60, new=True) is True
    assert await scope.remember("cats", "key", b"second", ttl_s=60, new=True) is False
    assert await scope.recall("cats", "key") == b"first"
    assert await scope.remember("cats", "other", b"first", ttl_s=60, new=True) is True
    await scope.forget_remembered("cats", "key")
    assert await scope.remember("cats", "key", b"third", ttl_s=0.2, new=True) is True
    await until(store, time.time() + 0.2)
    assert await scope.recall("cats", "key") is None
    assert await scope.remember("cats", "key", b"fourth", ttl_s=60, new=True) is True
    assert await scope.recall("cats", "key") == b"fourth"


async def test_of_many_who_claim_at_once_one_succeeds(store: Store) -> None:
    scope = store.scope("t")
    claims = (scope.remember("cats", "key", b"%d" % k, ttl_s=60, new=True) for k in range(20))
    answers = await asyncio.gather(*claims)
    assert answers.count(True) == 1
    assert await scope.recall("cats", "key") == b"%d" % answers.index(True)


async def test_what_is_remembered_at_once_is_all_remembered(store: Store) -> None:
    scope = store.scope("t")
    await asyncio.gather(*(scope.remember("cats", f"{k}", b"%d" % k, ttl_s=60, new=True) for k in range(60)))
    assert [await scope.recall("cats", f"{k}") for k in range(60)] == [b"%d" % k for k in range(60)]


async def test_a_memory_needs_no_task_and_makes_none(store: Store) -> None:
    scope = store.scope("t")
    await scope.remember("cats", "key", b"value", ttl_s=60)
    assert await scope.pointer("cats") is None
    assert await scope.versions("cats") == []
    assert await scope.tasks(limit=10) == []
    assert await commit(scope, "cats", 1, expect=0) == 1
    assert await scope.recall("cats", "key") == b"value"
    await scope.remember("dogs", "key", b"value", ttl_s=60)
    assert await scope.delete("dogs") is False  # there is no such task, and from now on no memory of it
    assert await scope.recall("dogs", "key") is None


async def test_what_is_remembered_of_a_task_that_ended_is_not_of_the_next_one(store: Store, until: Until) -> None:
    scope, end = store.scope("t"), time.time() + 0.3
    await commit(scope, "cats", 1, expires=end)
    for key in ("key", "other"):
        await scope.remember("cats", key, b"value", ttl_s=86400)
    await scope.remember("dogs", "key", b"value", ttl_s=86400)
    await until(store, end)
    assert await scope.remember("cats", "claim", b"at work", ttl_s=60, new=True) is True  # of who makes the task
    assert await commit(scope, "cats", 2) == 1
    assert await scope.recall("cats", "key") is None
    assert await scope.recall("cats", "claim") == b"at work"
    assert await scope.remember("cats", "claim", b"answer", ttl_s=86400) is True
    assert await scope.remember("cats", "other", b"again", ttl_s=60, new=True) is True
    assert await commit(scope, "cats", 3) == 2
    assert await scope.recall("cats", "claim") == b"answer"
    assert await scope.recall("dogs", "key") == b"value"


async def test_a_refused_commit_forgets_nothing(store: Store) -> None:
    scope = store.scope("t")
    await scope.remember("cats", "key", b"value", ttl_s=86400)
    with pytest.raises(VersionConflict):
        await commit(scope, "cats", 1, expect=7)
    assert await scope.recall("cats", "key") == b"value"
    await commit(scope, "cats", 1)
    assert await scope.recall("cats", "key") is None


async def test_of_too_many_memories_the_oldest_go_first(
    bare: Store, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(f"service.stores.{bare.name}.MOST_REMEMBERED", 3)
    scope = bare.scope("t")
    await scope.remember("dogs", "a", b"", ttl_s=60)
    await scope.remember("cats", "x", b"", ttl_s=0.001)
    await until(bare, time.time() + 0.001)
    for key in ("a", "b", "c"):  # what has expired takes nobody's place
        await scope.remember("cats", key, b"", ttl_s=60)
    assert await scope.recall("cats", "a") is not None
    await scope.remember("cats", "a", b"again", ttl_s=60)  # now b is the oldest
    await scope.remember("cats", "d", b"", ttl_s=60)
    assert [await scope.recall("cats", key) is not None for key in "abcd"] == [True, False, True, True]
    await scope.remember("cats", "e", b"", ttl_s=60)
    assert [await scope.recall("cats", key) is not None for key in "abcde"] == [True, False, False, True, True]
    assert await scope.recall("dogs", "a") is not None


async def test_of_too_many_bytes_of_memories_the_oldest_go_first(bare: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = 36  # which is kept with each
    monkeypatch.setattr(f"service.stores.{bare.name}.MOST_REMEMBERED_BYTES", 3 * (100 + seal))
    scope = bare.scope("t")
    await scope.remember("dogs", "a", bytes(100), ttl_s=60)
    for key in "abc":
        assert await scope.remember("cats", key, bytes(100), ttl_s=60) is True
    assert [await scope.recall("cats", key) is not None for key in "abc"] == [True, True, True]
    await scope.remember("cats", "a", bytes(99), ttl_s=60)  # now b is the oldest
    await scope.remember("cats", "d", b"", ttl_s=60)
    assert [await scope.recall("cats", key) is not None for key in "abcd"] == [True, False, True, True]
    await scope.forget_remembered("cats", "c")  # which takes no room from here on
    await scope.remember("cats", "e", bytes(100), ttl_s=60)
    assert [await scope.recall("cats", key) is not None for key in "abcde"] == [True, False, False, True, True]
    await scope.remember("cats", "f", bytes(3 * (100 + seal) - seal), ttl_s=60)  # as large as all may be
    assert [await scope.recall("cats", key) is not None for key in "adef"] == [False, False, False, True]
    assert await scope.recall("dogs", "a") is not None


async def test_a_memory_larger_than_all_may_be_is_not_kept_and_leaves_what_is_there(
    bare: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"service.stores.{bare.name}.MOST_REMEMBERED_BYTES", 200)
    scope = bare.scope("t")
    for key in ("key", "other"):
        await scope.remember("cats", key, b"claim", ttl_s=60, new=True)
    assert await scope.remember("cats", "key", bytes(200), ttl_s=60) is False
    assert await scope.remember("cats", "new", bytes(200), ttl_s=60, new=True) is False
    assert [await scope.recall("cats", key) for key in ("key", "other", "new")] == [b"claim", b"claim", None]


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
    await scope.keep_head("cats", Pointer(1, "hd_1"), make_head(1))
    assert same(await scope.head("hd_1"), make_head(1))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: flipped(data, 45),
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
}


@pytest.mark.slow
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


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_earlier_record_is_refused_and_the_others_are_read(
    bare: Store, beneath: Beneath, damage: str
) -> None:
    scope = bare.scope("t")
    for seed in (1, 2, 3):
        await commit(scope, "cats", seed)
    data = beneath.get("record", "t", name="cats", version=2)
    beneath.set("record", "t", name="cats", version=2, data=DAMAGE[damage](data))
    with pytest.raises(SealBroken):
        await scope.record("cats", version=2)
    assert same(await read(scope, "cats", 1), make_record(1))
    assert same(await read(scope, "cats", 3), make_record(3))


async def test_records_of_two_versions_cannot_change_places(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2)
    one, two = (beneath.get("record", "t", name="cats", version=version) for version in (1, 2))
    beneath.set("record", "t", name="cats", version=1, data=two)
    beneath.set("record", "t", name="cats", version=2, data=one)
    for version in (1, 2):
        with pytest.raises(SealBroken):
            await scope.record("cats", version=version)


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_history_is_refused_and_begun_anew(bare: Store, beneath: Beneath, damage: str) -> None:
    scope = bare.scope("t")
    for seed in (1, 2, 3):
        await commit(scope, "cats", seed)
    beneath.set("history", "t", name="cats", data=DAMAGE[damage](beneath.get("history", "t", name="cats")))
    with pytest.raises(SealBroken):
        await scope.versions("cats")
    with pytest.raises(SealBroken):
        await scope.record("cats", version=2)
    found = await scope.record("cats")  # where the task is, the pointer says
    assert found is not None
    assert found[0] == Pointer(3, "hd_3")
    assert await commit(scope, "cats", 4) == 4
    assert await scope.versions("cats") == [Pointer(4, "hd_4"), Pointer(3, "hd_3")]
    assert same(await read(scope, "cats", 3), make_record(3))
    assert await scope.record("cats", version=1) is None
    assert await scope.delete("cats") is True
    for head in ("hd_1", "hd_2"):  # which ones they were was lost with the history; they end by their TTL
        assert await scope.head(head) is not None
    assert beneath.left() == 2


async def test_a_task_with_pointer_and_history_damaged_is_deleted_whole(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 1)
    for kind in ("pointer", "history"):
        beneath.set(kind, "t", name="cats", data=b"rotten")
    assert await scope.delete("cats") is True
    assert beneath.left() == 1  # the head, which ends by its TTL


async def test_a_damaged_pointer_loses_no_version(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2)
    beneath.set("pointer", "t", name="cats", data=b"rotten")
    with pytest.raises(SealBroken):
        await scope.versions("cats")
    assert await commit(scope, "cats", 3) == 3
    assert await scope.versions("cats") == [Pointer(3, "hd_3"), Pointer(2, "hd_2"), Pointer(1, "hd_1")]


async def test_the_history_of_another_time_or_task_is_not_believed(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await commit(scope, "cats", 1)
    await commit(scope, "cats", 2)
    earlier = beneath.get("history", "t", name="cats")
    await commit(scope, "cats", 3)
    beneath.set("history", "t", name="cats", data=earlier)
    assert await scope.versions("cats") == [Pointer(3, "hd_3")]
    await commit(scope, "dogs", 1)
    beneath.set("history", "t", name="dogs", data=earlier)
    with pytest.raises(SealBroken):
        await scope.versions("dogs")


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_memory_counts_as_forgotten(bare: Store, beneath: Beneath, damage: str) -> None:
    scope = bare.scope("t")
    await scope.remember("cats", "key", b"a value of some length", ttl_s=60)
    beneath.set("remembered", "t", name="cats", data=DAMAGE[damage](beneath.get("remembered", "t", name="cats")))
    assert await scope.recall("cats", "key") is None
    assert await scope.remember("cats", "key", b"again", ttl_s=60, new=True) is True
    assert await scope.recall("cats", "key") == b"again"


async def test_the_memory_of_another_place_counts_as_forgotten(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await scope.remember("cats", "key", b"value", ttl_s=60)
    for tenant, task, key in (("t", "dogs", "key"), ("t", "birds", "other key"), ("other", "cats", "key")):
        await bare.scope(tenant).remember(task, key, b"value", ttl_s=60)
        beneath.set("remembered", tenant, name=task, data=beneath.get("remembered", "t", name="cats"))
        assert await bare.scope(tenant).recall(task, key) is None
