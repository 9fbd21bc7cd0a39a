"""What is remembered in front of a store, and for how long it is trusted."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from models.errors import StoreUnavailable, VersionConflict
from models.head import Head
from service.stores import Expected, Pointer, lru
from service.stores.lru import Recent
from service.stores.memory import MemoryScope, MemoryStore
from tests.service.stores.values import commit, make_head, make_record, same

pytestmark = pytest.mark.anyio


class Faulty(MemoryStore):
    """Can be taken away, and made to hold its answers back; counts the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.asked: list[str] = []
        self.held: dict[str, asyncio.Event] = {}  # by question: its answer is there, and leaves when this is set

    def scope(self, tenant: str) -> FaultyScope:
        return FaultyScope(self, tenant)

    async def reached(self, question: str) -> None:
        self.asked.append(question)
        if self.away:
            raise StoreUnavailable("It is away.")

    async def answered(self, question: str) -> None:
        held = self.held.get(question)
        if held is not None:
            await held.wait()


class FaultyScope(MemoryScope):
    def __init__(self, store: Faulty, tenant: str):
        super().__init__(store, tenant)
        self._faulty = store

    async def pointer(self, task: str) -> Pointer | None:
        await self._faulty.reached("pointer")
        answer = await super().pointer(task)
        await self._faulty.answered("pointer")
        return answer

    async def head(self, head_id: str) -> Head | None:
        await self._faulty.reached("head")
        answer = await super().head(head_id)
        await self._faulty.answered("head")
        return answer

    async def keep_head(self, task: str, pointer: Pointer, head: Head) -> None:
        await self._faulty.reached("keep_head")
        await self._faulty.answered("keep_head")
        await super().keep_head(task, pointer, head)

    async def commit(self, *given: Any, **named: Any) -> Pointer:
        await self._faulty.reached("commit")
        await self._faulty.answered("before the commit")
        answer = await super().commit(*given, **named)
        await self._faulty.answered("commit")
        return answer

    async def delete(self, task: str, *, expect: Expected = None) -> bool:
        await self._faulty.reached("delete")
        answer = await super().delete(task, expect=expect)
        await self._faulty.answered("delete")
        return answer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def recent(*, most: int = 10, stale_ok_s: float = 60) -> tuple[Recent, Faulty, Clock]:
    beneath, clock = Faulty(), Clock()
    return Recent(beneath, most=most, stale_ok_s=stale_ok_s, clock=clock), beneath, clock


async def test_a_head_is_asked_for_once() -> None:
    store, beneath, _ = recent()
    await commit(beneath.scope("t"), "cats", 1)
    for _ in range(3):
        assert same(await store.scope("t").head("hd_1"), make_head(1))
    assert beneath.asked.count("head") == 1


async def test_a_head_that_is_nowhere_is_not_remembered_as_such() -> None:
    store, beneath, _ = recent()
    assert await store.scope("t").head("hd_1") is None
    await commit(beneath.scope("t"), "cats", 1)
    assert await store.scope("t").head("hd_1") is not None


async def test_memory_is_bounded_and_keeps_what_was_used_last() -> None:
    store, beneath, _ = recent(most=2)
    scope = store.scope("t")
    for seed in (1, 2):
        await commit(scope, f"task{seed}", seed)
    await scope.head("hd_1")
    await commit(scope, "task3", 3)
    assert list(store.heads) == [("t", "hd_1"), ("t", "hd_3")]
    assert len(store.known) == 2
    assert same(await scope.head("hd_2"), make_head(2))  # from beneath
    assert beneath.asked.count("head") == 1


async def test_memory_is_bounded_in_bytes_and_keeps_what_was_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru, "MOST_BYTES", 5 * lru.size(make_head()) // 2)
    store, _, _ = recent(most=100)
    scope = store.scope("t")
    for _ in range(3):  # what leaves memory gives its room back
        for seed in (1, 2):
            await commit(scope, f"task{seed}", seed)
            await commit(scope, f"task{seed}", seed)
        assert scope.head_in_memory("hd_1") is not None
        await commit(scope, "task3", 3)
        assert list(store.heads) == [("t", "hd_1"), ("t", "hd_3")]
        for seed in (1, 3):
            await scope.delete(f"task{seed}")
        assert not store.heads
    weighty = make_head(4, way=200)
    await scope.commit("large", make_record(4, way=200), "hd_4", weighty, expect=None)
    assert scope.head_in_memory("hd_4") is None
    assert same(await scope.head("hd_4"), weighty)
    assert lru.MOST_BYTES < lru.size(weighty) < 2 * weighty.affine.weight.nbytes + 200 * 150


async def test_names_that_are_no_tasks_take_no_room() -> None:
    store, beneath, _ = recent(most=3)
    scope = store.scope("t")
    for seed in (1, 2):
        await commit(scope, f"task{seed}", seed)
    for number in range(10):
        assert await scope.pointer(f"nobody{number}") is None
    beneath.away = True
    assert await scope.pointer("task1") == Pointer(1, "hd_1", stale=True)


async def test_the_store_is_asked_for_each_pointer() -> None:
    store, beneath, _ = recent()
    await commit(store.scope("t"), "cats", 1)
    await commit(beneath.scope("t"), "cats", 2)  # another replica
    assert await store.scope("t").pointer("cats") == Pointer(2, "hd_2")


async def test_while_the_store_is_away_a_known_task_is_answered_and_marked_stale() -> None:
    store, beneath, clock = recent(stale_ok_s=60)
    scope = store.scope("t")
    await commit(beneath.scope("t"), "cats", 1)
    await scope.pointer("cats")
    await commit(scope, "learned here", 2)
    beneath.away = True
    clock.now += 59
    assert await scope.pointer("cats") == Pointer(1, "hd_1", stale=True)
    assert await scope.pointer("learned here") == Pointer(1, "hd_2", stale=True)
    clock.now += 1
    with pytest.raises(StoreUnavailable):
        await scope.pointer("cats")
    beneath.away = False
    assert await scope.pointer("cats") == Pointer(1, "hd_1")
    beneath.away = True
    assert await scope.pointer("cats") == Pointer(1, "hd_1", stale=True)


async def test_while_the_store_is_away_the_rest_fails() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(store.scope("other"), "cats", 1)
    beneath.away = True
    with pytest.raises(StoreUnavailable):
        await scope.pointer("cats")  # known for another tenant only
    with pytest.raises(StoreUnavailable):
        await commit(scope, "cats", 1)
    with pytest.raises(StoreUnavailable):
        await scope.head("hd_1")


async def test_without_trust_nothing_stale_is_answered() -> None:
    store, beneath, _ = recent(stale_ok_s=0)
    await commit(store.scope("t"), "cats", 1)
    beneath.away = True
    with pytest.raises(StoreUnavailable):
        await store.scope("t").pointer("cats")


async def test_a_change_that_fails_leaves_the_task_known() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    with pytest.raises(VersionConflict):
        await commit(scope, "cats", 2, expect=7)
    beneath.away = True
    with pytest.raises(StoreUnavailable):
        await commit(scope, "cats", 2)
    with pytest.raises(StoreUnavailable):
        await scope.delete("cats")
    assert await scope.pointer("cats") == Pointer(1, "hd_1", stale=True)
    assert await scope.head("hd_1") is not None


async def test_a_deleted_task_is_forgotten_with_its_head() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    await scope.delete("cats")
    assert not store.heads
    beneath.away = True
    with pytest.raises(StoreUnavailable):
        await scope.pointer("cats")


async def test_a_task_deleted_elsewhere_is_forgotten_when_that_is_seen() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    await beneath.scope("t").delete("cats")
    assert await scope.pointer("cats") is None
    beneath.away = True
    with pytest.raises(StoreUnavailable):
        await scope.pointer("cats")


async def test_an_answer_overtaken_by_a_delete_is_not_remembered() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    beneath.held["pointer"] = asyncio.Event()
    reading = asyncio.create_task(scope.pointer("cats"))
    await asyncio.sleep(0)  # the answer is on its way
    await scope.delete("cats")
    beneath.held["pointer"].set()
    assert await reading == Pointer(1, "hd_1")  # as it was when it was asked
    beneath.away = True
    with pytest.raises(StoreUnavailable):
        await scope.pointer("cats")


async def test_a_caller_who_leaves_does_not_hide_what_was_done() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    for question, change in (("commit", lambda: commit(scope, "cats", 2)), ("delete", lambda: scope.delete("cats"))):
        beneath.held[question] = asyncio.Event()
        leaving = asyncio.create_task(change())
        await asyncio.sleep(0.001)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        beneath.held[question].set()
        await asyncio.sleep(0.001)
        beneath.away = True
        if question == "commit":
            assert await scope.pointer("cats") == Pointer(2, "hd_2", stale=True)
        else:
            with pytest.raises(StoreUnavailable):
                await scope.pointer("cats")
        beneath.away = False
        await store.close()


async def test_of_changes_that_overlap_none_is_taken_for_the_last() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    beneath.held["commit"] = asyncio.Event()
    changes = [asyncio.create_task(commit(scope, "cats", seed)) for seed in (1, 2)]
    await asyncio.sleep(0.001)
    beneath.held["commit"].set()
    await asyncio.gather(*changes)
    beneath.away = True
    with pytest.raises(StoreUnavailable):
        await scope.pointer("cats")
    beneath.away = False
    assert await scope.pointer("cats") == Pointer(2, "hd_2")


@pytest.mark.parametrize("held", ["before the commit", "commit"])
async def test_who_looks_while_a_change_is_made_does_not_hide_it(held: str) -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    beneath.held[held] = asyncio.Event()
    changing = asyncio.create_task(commit(scope, "cats", 2))
    await asyncio.sleep(0.001)
    found = await scope.pointer("cats")
    assert found == (Pointer(2, "hd_2") if held == "commit" else Pointer(1, "hd_1"))
    beneath.held[held].set()
    await changing
    beneath.away = True
    assert await scope.pointer("cats") == Pointer(2, "hd_2", stale=True)
    assert await scope.head("hd_2") is not None


async def test_a_look_at_a_task_that_was_made_anew_meanwhile_is_not_overruled() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    for seed in (1, 2, 3):
        await commit(scope, "cats", seed)
    beneath.held["commit"] = asyncio.Event()
    changing = asyncio.create_task(commit(scope, "cats", 4))
    await asyncio.sleep(0.001)
    await beneath.scope("t").delete("cats")  # another replica
    beneath.held.pop("commit").set()
    await commit(beneath.scope("t"), "cats", 5)
    assert await scope.pointer("cats") == Pointer(1, "hd_5")
    await changing
    beneath.away = True
    with pytest.raises(StoreUnavailable):
        await scope.pointer("cats")


async def test_who_was_shown_a_version_is_shown_no_earlier_one_while_the_store_is_away() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    await commit(beneath.scope("t"), "cats", 2)  # another replica
    found = await scope.record("cats")
    assert found is not None
    assert found[0] == Pointer(2, "hd_2")
    beneath.away = True
    assert await scope.pointer("cats") == Pointer(2, "hd_2", stale=True)


async def test_a_write_that_fails_after_its_caller_left_is_nobodys_concern(caplog: pytest.LogCaptureFixture) -> None:
    store, beneath, _ = recent()
    beneath.held["before the commit"] = asyncio.Event()
    leaving = asyncio.create_task(commit(store.scope("t"), "cats", 1, expect=7))
    await asyncio.sleep(0.001)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    beneath.held["before the commit"].set()
    await store.close()
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_cancelled_reader_leaves_what_was_known() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    beneath.held["pointer"] = asyncio.Event()
    reading = asyncio.create_task(scope.pointer("cats"))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    beneath.held.clear()
    beneath.away = True
    assert await scope.pointer("cats") == Pointer(1, "hd_1", stale=True)


async def test_a_head_that_the_store_does_not_take_is_kept_in_memory() -> None:
    store, beneath, _ = recent()
    beneath.away = True
    await store.scope("t").keep_head("cats", Pointer(1, "hd_1"), make_head(1))
    assert same(await store.scope("t").head("hd_1"), make_head(1))


async def test_a_head_that_is_made_again_while_the_store_is_asked_is_found() -> None:
    store, beneath, _ = recent()
    beneath.held["head"] = asyncio.Event()
    asking = asyncio.create_task(store.scope("t").head("hd_1"))
    await asyncio.sleep(0.001)
    await store.scope("t").keep_head("cats", Pointer(1, "hd_1"), make_head(1))
    beneath.held["head"].set()
    assert same(await asking, make_head(1))


async def test_nobody_waits_until_a_head_is_in_the_store_but_the_end_does() -> None:
    store, beneath, _ = recent()
    await commit(beneath.scope("t"), "cats", 1)
    beneath.held["keep_head"] = asyncio.Event()
    await store.scope("t").keep_head("cats", Pointer(1, "hd_1"), make_head(1))
    assert same(await store.scope("t").head("hd_1"), make_head(1))
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    beneath.held["keep_head"].set()
    await closing
    assert same(await beneath.scope("t").head("hd_1"), make_head(1))


async def test_records_come_from_the_store() -> None:
    store, _, _ = recent()
    await commit(store.scope("t"), "cats", 1)
    found = await store.scope("t").record("cats")
    assert found is not None
    assert same(found[1], make_record(1))


async def test_versions_and_memories_come_from_the_store() -> None:
    store, beneath, _ = recent()
    scope = store.scope("t")
    await commit(scope, "cats", 1)
    await commit(beneath.scope("t"), "cats", 2)  # another replica
    assert await scope.versions("cats") == [Pointer(2, "hd_2"), Pointer(1, "hd_1")]
    found = await scope.record("cats", version=1)
    assert found is not None
    assert same(found[1], make_record(1))
    await beneath.scope("t").remember("cats", "key", b"value", ttl_s=60)
    assert await scope.remember("cats", "key", b"other", ttl_s=60, new=True) is False
    assert await scope.recall("cats", "key") == b"value"
    await beneath.scope("t").forget_remembered("cats", "key")
    assert await scope.recall("cats", "key") is None
