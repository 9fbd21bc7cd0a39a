"""Records that grow: written as what was added, read back as they were."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest

from service.stores import Record, SealBroken, Store
from service.stores.record import LEAST, Base, RecentRecords, applied, base_of, difference
from tests.service.stores.conftest import Beneath, Until
from tests.service.stores.values import make_head, same

BASE = Base(1, "5ea1")
AROUND = {"memory": 2, "sqlite": 1, "redis": 3}  # values of a task that are neither heads nor records


def grown(
    count: int, *, way: int = 4, images: bool = False, without: tuple[int, ...] = (), unlabelled: int = 3
) -> Record:
    """The examples 0 to count, in the order of their names, each always the same; those of `without` left out."""
    rows = sorted((row for row in range(count) if row not in without), key=lambda row: (row % way, f"{row * 7919:06d}"))
    every = [*rows, *range(-unlabelled, 0)]
    features = {row: np.random.default_rng(row + 1000).normal(size=16).astype(np.float16) for row in every}
    return Record(
        artifact="sha256:a",
        method="ridge",
        labels=tuple(f"label {k}" for k in range(way)),
        ids=tuple(f"ex_{row}" for row in every),
        classes=np.array([row % way for row in rows], np.int32),
        features=np.array([features[row] for row in rows]),
        unlabelled=np.array([features[row] for row in every[len(rows) :]], np.float16).reshape(unlabelled, 16),
        created=1_700_000_000.25,
        images=tuple(f"image {row}".encode() * (row % 5) for row in every) if images else (),
    )


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("unlabelled", [0, 3])
def test_a_difference_and_its_base_make_the_record(images: bool, unlabelled: int) -> None:
    before = grown(LEAST, images=images, unlabelled=unlabelled)
    record = grown(LEAST + 9, images=images, unlabelled=unlabelled)
    data = difference(BASE, before, record)
    assert data is not None
    assert base_of(data) == BASE
    assert same(applied(before, data), record)
    assert len(data) < len(record.to_bytes()) / 3


def test_another_method_of_the_same_examples_is_hardly_anything() -> None:
    before = grown(10 * LEAST)
    record = dataclasses.replace(before, method="prototype", expires=2e9)
    data = difference(BASE, before, record)
    assert data is not None
    assert same(applied(before, data), record)


@pytest.mark.parametrize(
    "other",
    [
        grown(LEAST + 40),
        grown(LEAST + 9, without=(3,)),
        dataclasses.replace(grown(LEAST + 9), artifact="sha256:b"),
        dataclasses.replace(grown(LEAST + 9), features=np.nextafter(grown(LEAST + 9).features, np.float16(9))),
        grown(LEAST + 9, images=True),
    ],
    ids=["much is new", "something was taken away", "another artifact", "other bits", "images from now on"],
)
def test_what_had_better_be_written_whole_is_no_difference(other: Record) -> None:
    assert difference(BASE, grown(LEAST), other) is None


def test_small_records_are_written_whole() -> None:
    assert difference(BASE, grown(LEAST - 10), grown(LEAST - 9)) is None


@pytest.mark.parametrize("damage", [lambda data: data[:60], lambda data: b"", lambda data: data[:-16]])
def test_a_difference_that_cannot_be_read_is_damage(damage: Callable[[bytes], bytes]) -> None:
    data = difference(BASE, grown(LEAST), grown(LEAST + 1))
    assert data is not None
    with pytest.raises(SealBroken):
        applied(grown(LEAST), damage(data))


def test_as_many_bases_stay_in_memory_as_it_is_for() -> None:
    bases = RecentRecords(most_bytes=50_000)
    names = [Base(version, str(version)) for version in range(6)]
    for name in names:
        bases.put(("t", f"task {name.version}"), name, grown(LEAST))  # some 14,000 bytes each
        bases.get(names[0])
    assert [bases.get(name) is not None for name in names] == [True, False, False, False, True, True]
    bases.put(("t", "small"), Base(9, "small"), grown(LEAST - 50))
    assert bases.get(Base(9, "small")) is None
    bases.forget(("t", "task 4"))
    assert [bases.get(name) is not None for name in names] == [True, False, False, False, False, True]


def test_a_whole_record_takes_room_for_its_bytes_as_well() -> None:
    bases, whole = RecentRecords(most_bytes=50_000), Base(1, "whole")
    bases.put(("t", "cats"), whole, grown(LEAST), sealed=bytes(30_000))
    bases.put(("t", "dogs"), Base(1, "other"), grown(LEAST))
    assert bases.get(whole) is None
    assert bases.get(Base(1, "other")) is not None


# In the stores.


async def put(store: Store, record: Record, seed: int) -> int:
    return (await store.scope("t").commit("cats", record, f"hd_{seed}", make_head(seed), expect=None)).version


def forgetful(store: Store) -> None:
    """As after a restart: what is needed has to be read."""
    recent = getattr(store, "recent")  # noqa: B009 - every store of bytes has one, and the protocol does not name it
    assert isinstance(recent, RecentRecords)
    recent._records.clear()


pytestmark = pytest.mark.anyio


async def test_of_a_task_that_grows_its_base_and_its_newest_version_stay_in_memory(bare: Store) -> None:
    for extra in range(6):
        await put(bare, grown(2 * LEAST + extra, unlabelled=0), extra)
    recent = getattr(bare, "recent")  # noqa: B009 - as above
    assert sorted(len(known.record.ids) for known in recent._records.values()) == [2 * LEAST, 2 * LEAST + 5]
    assert sum(known.size for known in recent._records.values()) == recent._bytes


@pytest.mark.slow
@pytest.mark.parametrize("images", [False, True])
async def test_every_version_of_a_task_that_grows_is_read_back_exactly(
    bare: Store, beneath: Beneath, images: bool
) -> None:
    scope = bare.scope("t")
    for extra in range(8):
        assert await put(bare, grown(2 * LEAST + extra, images=images), extra) == extra + 1
    whole, last = (len(beneath.get("record", "t", name="cats", version=version)) for version in (1, 8))
    assert last < whole / 2
    for restarted in (False, True):
        for version in range(1, 9):
            if restarted:
                forgetful(bare)
            found = await scope.record("cats", version=version)
            assert found is not None
            assert same(found[1], grown(2 * LEAST + version - 1, images=images))


@pytest.mark.slow
async def test_a_base_stays_as_long_as_a_version_needs_it_and_no_longer(bare: Store, beneath: Beneath) -> None:
    """Ten versions are kept: of one that grows twelve times, those and their base."""
    scope = bare.scope("t")
    for extra in range(13):
        await put(bare, grown(2 * LEAST + extra), extra)
    assert beneath.left() == AROUND[bare.name] + 10 + 11
    forgetful(bare)
    found = await scope.record("cats", version=4)
    assert found is not None
    assert same(found[1], grown(2 * LEAST + 3))
    assert await scope.record("cats", version=3) is None  # not kept
    for seed in range(20, 30):  # something was taken away each time, so each is whole
        await put(bare, grown(2 * LEAST, without=(seed,)), seed)
    assert beneath.left() == AROUND[bare.name] + 10 + 10
    forgetful(bare)
    assert same((await scope.record("cats") or (None, None))[1], grown(2 * LEAST, without=(29,)))
    assert await scope.delete("cats") is True
    assert beneath.left() == 0


async def test_after_a_restart_growth_goes_on_from_the_base_that_was_read(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await put(bare, grown(2 * LEAST), 1)
    await put(bare, grown(2 * LEAST + 1), 2)
    forgetful(bare)
    assert await scope.record("cats") is not None  # as every change does first
    await put(bare, grown(2 * LEAST + 2), 3)
    assert len(beneath.get("record", "t", name="cats")) < len(beneath.get("record", "t", name="cats", version=1)) / 2
    forgetful(bare)
    assert same((await scope.record("cats") or (None, None))[1], grown(2 * LEAST + 2))


async def test_a_task_made_anew_never_goes_on_from_the_one_that_was_deleted(bare: Store) -> None:
    """At the same version with the same examples, but with other features: nothing of the old one may come back."""
    scope = bare.scope("t")
    old = grown(2 * LEAST)
    new = dataclasses.replace(old, features=np.negative(old.features))
    await put(bare, old, 1)
    await scope.delete("cats")
    await put(bare, new, 1)
    bigger = grown(2 * LEAST + 1)
    await put(bare, bigger, 2)
    for _ in range(2):
        assert same((await scope.record("cats") or (None, None))[1], bigger)
        assert same((await scope.record("cats", version=1) or (None, None))[1], new)
        forgetful(bare)


async def test_a_record_in_memory_does_not_hide_that_its_bytes_are_damaged(bare: Store, beneath: Beneath) -> None:
    await put(bare, grown(2 * LEAST), 1)
    good = beneath.get("record", "t", name="cats")
    beneath.set("record", "t", name="cats", data=good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(SealBroken):
        await bare.scope("t").record("cats")


async def test_a_damaged_base_is_refused_and_so_is_another_one(bare: Store, beneath: Beneath) -> None:
    scope = bare.scope("t")
    await put(bare, grown(2 * LEAST), 1)
    await put(bare, grown(2 * LEAST + 1), 2)
    good = beneath.get("record", "t", name="cats", version=1)
    for bad in (good[:-1] + b"!", b"", beneath.get("record", "t", name="cats", version=2)):
        beneath.set("record", "t", name="cats", version=1, data=bad)
        forgetful(bare)
        with pytest.raises(SealBroken):
            await scope.record("cats")
    beneath.set("record", "t", name="cats", version=1, data=good)
    assert same((await scope.record("cats") or (None, None))[1], grown(2 * LEAST + 1))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["rotten", "another", "gone"])
async def test_nothing_is_built_on_a_base_that_is_damaged_or_gone(bare: Store, beneath: Beneath, damage: str) -> None:
    """Though it is in memory: what is acknowledged now is to be there after a restart."""
    scope = bare.scope("t")
    await put(bare, grown(2 * LEAST), 1)
    await put(bare, grown(2 * LEAST + 1), 2)
    good = beneath.get("record", "t", name="cats", version=1)
    other = beneath.get("record", "t", name="cats", version=2)
    bad = {"rotten": good[:-1] + bytes([good[-1] ^ 1]), "another": other, "gone": b""}[damage]
    beneath.set("record", "t", name="cats", version=1, data=bad)
    await put(bare, grown(2 * LEAST + 2), 3)
    await put(bare, grown(2 * LEAST + 3), 4)
    forgetful(bare)
    for version in (3, 4):
        found = await scope.record("cats", version=version)
        assert same((found or (None, None))[1], grown(2 * LEAST + version - 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["history", "pointer"])
async def test_what_a_damaged_history_forgot_is_found_in_the_record(bare: Store, beneath: Beneath, kind: str) -> None:
    """The version that is kept keeps its base."""
    scope = bare.scope("t")
    for extra in range(3):
        await put(bare, grown(2 * LEAST + extra), extra)
    beneath.set(kind, "t", name="cats", data=b"rotten")
    await put(bare, grown(2 * LEAST + 3), 3)
    forgetful(bare)
    for version in (3, 4):
        found = await scope.record("cats", version=version)
        assert same((found or (None, None))[1], grown(2 * LEAST + version - 1))


async def test_a_history_without_bases_learns_them(bare: Store, beneath: Beneath) -> None:
    """As it was written before there were any."""
    scope = bare.scope("t")
    await put(bare, grown(2 * LEAST), 0)
    sealed = scope._sealed  # type: ignore[attr-defined]
    history = sealed.open_history("cats", beneath.get("history", "t", name="cats"))
    beneath.set("history", "t", name="cats", data=sealed.seal_history("cats", history._replace(bases={})))
    await put(bare, grown(2 * LEAST + 1), 1)
    assert len(beneath.get("record", "t", name="cats")) < len(beneath.get("record", "t", name="cats", version=1)) / 2
    forgetful(bare)
    assert same((await scope.record("cats") or (None, None))[1], grown(2 * LEAST + 1))


async def test_of_a_deleted_task_nothing_stays_in_memory(bare: Store) -> None:
    await put(bare, grown(2 * LEAST), 0)
    await bare.scope("t").delete("cats")
    assert not bare.recent._records  # type: ignore[attr-defined]


async def test_a_base_ends_with_the_versions_that_need_it(bare: Store, beneath: Beneath, until: Until) -> None:
    scope, end = bare.scope("t"), time.time() + 0.5
    await put(bare, grown(2 * LEAST), 1)
    await put(bare, grown(2 * LEAST + 1), 2)
    await put(bare, dataclasses.replace(grown(2 * LEAST + 2), expires=end), 3)
    forgetful(bare)
    for version in (1, 2, 3):
        assert same(
            (await scope.record("cats", version=version) or (None, None))[1],
            dataclasses.replace(grown(2 * LEAST + version - 1), expires=end if version == 3 else None),
        )
    await until(bare, end)
    assert await scope.record("cats") is None
    await scope.commit("dogs", grown(5), "hd_9", make_head(9), expect=None)  # which sweeps, where time alone does not
    expected = AROUND[bare.name] + 2
    for _ in range(100):  # Redis takes its time
        if bare.name == "memory" or beneath.left() == expected:
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError(beneath.left())
