"""The use cases, without HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import (
    ClassNotFound,
    ExampleNotFound,
    ExtractorFailed,
    InvalidSupport,
    Overloaded,
    StoreUnavailable,
    TaskNotFound,
    TaskStale,
    TooLarge,
    UndecodableExample,
    UnknownMethod,
    VersionConflict,
    VersionNotFound,
)
from models.head import Head
from models.images import ImageDecoder
from service import quota
from service.answering import Answer
from service.batcher import Batcher
from service.engine import Engine
from service.quota import Allowance
from service.stores import Expected, Pointer, Record, Scope
from service.stores.lru import Recent
from service.stores.memory import MemoryScope, MemoryStore
from service.support import Example, Limits, example_id, record_id, task_name
from service.tasks import CHANGES, Adapted
from tests.fakes import Failing, Gated, MeanColour, picture, tiny_artifact

SUPPORT = [Example(label, picture(label, seed=seed)) for label in ("red", "blue") for seed in range(3)]
GREEN = [Example("green", picture("lime", seed=seed)) for seed in range(2)]
EXTRA = [picture("orange", seed=7), picture("navy", seed=7)]
RED, BLUE = picture("red", seed=9), picture("blue", seed=9)
INDIGO, BLACK = picture("indigo", seed=9), picture("black", seed=9)
Work = Callable[[Engine, Scope, MemoryStore], Awaitable[None]]


def run(
    folder: Path,
    work: Work,
    *,
    extractor: MeanColour | None = None,
    limits: Limits | None = None,
    rejects: bool = False,
) -> None:
    async def main() -> None:
        artifact = tiny_artifact(folder, rejects=rejects)
        batcher = Batcher(extractor or MeanColour(), ImageDecoder(16, 16, 3), lanes=2, max_batch=8, max_waiting=500)
        store = MemoryStore()
        try:
            async with asyncio.timeout(10):
                await work(Engine(artifact, batcher, limits=limits), store.scope("a"), store)
        finally:
            await batcher.close()

    asyncio.run(main())


def probabilities(row: object) -> np.ndarray:
    assert isinstance(row, Answer)
    return row.probabilities


def labels_of(rows: Sequence[object]) -> list[int]:
    return [int(probabilities(row).argmax()) for row in rows]


def without_heads(store: MemoryStore) -> None:
    for key in [key for key in store.values if key[1] == "head"]:
        del store.values[key]


def content(record: Record) -> tuple[object, ...]:
    """All that a head is made from, to the last bit."""
    arrays = (record.classes, record.features, record.unlabelled)
    return (
        record.artifact,
        record.method,
        record.labels,
        record.ids,
        record.images,
        *((array.dtype, array.shape, array.tobytes()) for array in arrays),
    )


async def everything(engine: Engine, scope: Scope, task: str) -> tuple[object, ...]:
    """What a task is: its head's name and bytes, its record and its report."""
    told = await engine.describe(scope, task)
    pointer, head = await engine.head(scope, task)
    assert pointer == told.pointer
    cached = await scope.head(pointer.head)
    assert cached is not None
    assert cached.to_bytes() == head.to_bytes()
    return pointer.head, head.to_bytes(), content(told.record), told.report, told.rejects


def test_a_task_learned_from_three_examples_knows_new_ones(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        adapted = await engine.adapt(scope, "colours", SUPPORT)
        assert adapted.created
        assert adapted.record.labels == ("blue", "red")
        found = await engine.classify(scope, "colours", [RED, BLUE])
        assert labels_of(found.rows) == [1, 0]
        assert found.pointer is not None
        assert found.head_id == found.pointer.head == adapted.pointer.head

    run(tmp_path, work)


def test_the_order_of_the_examples_does_not_matter(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        first = await engine.adapt(scope, None, SUPPORT)
        second = await engine.adapt(scope, None, SUPPORT[::-1])
        assert second.known
        assert (second.task, second.pointer) == (first.task, first.pointer)

    run(tmp_path, work)


def test_a_known_support_set_is_not_extracted_again(tmp_path: Path) -> None:
    extractor = MeanColour()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, None, SUPPORT)
        before = sum(extractor.batches)
        assert (await engine.adapt(scope, None, SUPPORT)).known
        assert sum(extractor.batches) == before

    run(tmp_path, work, extractor=extractor)


def test_an_end_is_set_and_taken_back_though_the_support_set_is_known(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        assert (await engine.adapt(scope, "t", SUPPORT)).record.expires is None
        assert (await engine.adapt(scope, "t", SUPPORT, ttl_s=60)).record.expires is not None
        assert (await engine.describe(scope, "t")).record.expires is not None
        assert (await engine.adapt(scope, "t", SUPPORT)).record.expires is None
        assert (await engine.describe(scope, "t")).record.expires is None

    run(tmp_path, work)


def test_twins_that_come_at_once_share_one_adaptation(tmp_path: Path) -> None:
    extractor = Gated()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        twins = [asyncio.create_task(engine.adapt(scope, "t", SUPPORT)) for _ in range(20)]
        await asyncio.to_thread(extractor.begun.wait, 5)
        extractor.gate.set()
        answers = await asyncio.gather(*twins)
        assert {answer.pointer.version for answer in answers} == {1}
        assert sum(extractor.batches) == len(SUPPORT)

    run(tmp_path, work, extractor=extractor)


def test_a_twin_whom_the_store_answers_late_shares_the_adaptation_too(tmp_path: Path) -> None:
    """What it is told of the store was so before the first twin was done, and reaches it after that."""
    extractor = Gated()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        class Late(MemoryScope):
            async def pointer(self, task: str) -> Pointer | None:
                found = await super().pointer(task)
                await asyncio.wait((first,))
                return found

        first = asyncio.create_task(engine.adapt(scope, "t", SUPPORT))
        await asyncio.to_thread(extractor.begun.wait, 5)
        second = asyncio.create_task(engine.adapt(Late(store, "a"), "t", SUPPORT))
        await asyncio.sleep(0)
        extractor.gate.set()
        assert [adapted.pointer.version for adapted in (await first, await second)] == [1, 1]

    run(tmp_path, work, extractor=extractor, limits=Limits(max_tasks=0))


def test_a_twin_who_leaves_takes_nothing_from_the_other(tmp_path: Path) -> None:
    extractor = Gated()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        leaver = asyncio.create_task(engine.adapt(scope, "t", SUPPORT))
        stayer = asyncio.create_task(engine.adapt(scope, "t", SUPPORT))
        await asyncio.to_thread(extractor.begun.wait, 5)
        leaver.cancel()
        extractor.gate.set()
        assert (await stayer).pointer.version == 1

    run(tmp_path, work, extractor=extractor)


def test_an_evicted_head_is_made_again_bit_for_bit(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        for method in ("prototype", "ridge"):
            adapted = await engine.adapt(scope, method, SUPPORT, method=method)
            before = await scope.head(adapted.pointer.head)
            without_heads(store)
            await engine.classify(scope, method, [RED])
            after = await scope.head(adapted.pointer.head)
            assert before is not None
            assert after is not None
            assert after.to_bytes() == before.to_bytes()
            # What comes back from bytes is what went in, whatever the order of its memory.
            np.testing.assert_array_equal(Head.from_bytes(before.to_bytes()).affine.weight, before.affine.weight)

    run(tmp_path, work)


def test_a_head_that_many_wait_for_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        without_heads(store)
        made = []
        original = engine._learning.head
        monkeypatch.setattr(engine._learning, "head", lambda record: made.append(1) or original(record))
        await asyncio.gather(*(engine.classify(scope, "t", [RED]) for _ in range(20)))
        assert len(made) == 1

    run(tmp_path, work)


def test_a_head_is_made_again_while_the_images_are_looked_at(tmp_path: Path) -> None:
    extractor = Gated()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        extractor.gate.set()
        adapted = await engine.adapt(scope, "t", SUPPORT)
        without_heads(store)
        extractor.gate.clear()
        asked = asyncio.create_task(engine.classify(scope, "t", [RED]))
        while await scope.head(adapted.pointer.head) is None:
            await asyncio.sleep(0.001)
        assert not asked.done()
        extractor.gate.set()
        assert labels_of((await asked).rows) == [1]

    run(tmp_path, work, extractor=extractor)


def test_a_brief_change_is_kept_at_once_and_learned_behind_the_answer(tmp_path: Path) -> None:
    """Whatever kind of change it is, the task is then what it would be after one that was told in full."""

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        changes: list[Callable[[str, bool], Awaitable[Adapted]]] = [
            lambda task, brief: engine.add(scope, task, GREEN, brief=brief),
            lambda task, brief: engine.learn_with(scope, task, "ridge", brief=brief),
            lambda task, brief: engine.remove_class(scope, task, "green", brief=brief),
            lambda task, brief: engine.rollback(scope, task, 2, brief=brief),
            lambda task, brief: engine.remove_example(scope, task, example_id("green", GREEN[0].payload), brief=brief),
        ]
        for task in ("brief", "told"):
            await engine.adapt(scope, task, SUPPORT)
        for change in changes[:4]:
            short, long = await change("brief", True), await change("told", False)
            assert (short.report, long.report is None) == (None, False)
            assert short.pointer == long.pointer
            assert content(short.record)[:-2] == content(long.record)[:-2]
            answer = await engine.classify(scope, "brief", [RED, BLUE])  # right after it: it waits for the head
            assert answer.pointer == short.pointer
            assert await everything(engine, scope, "brief") == await everything(engine, scope, "told")

    run(tmp_path, work)


def test_who_asks_while_the_store_goes_away_is_answered_by_what_was_learned_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        monkeypatch.setattr("service.tasks.LULL_S", 0.05)
        await engine.adapt(scope, "t", SUPPORT)
        recent = Recent(store, most=10, stale_ok_s=60).scope("a")
        changed = await engine.learn_with(recent, "t", "ridge", brief=True)

        async def away(self: Scope, head: str) -> None:
            while engine._tasks._to_learn:
                await asyncio.sleep(0.01)
            raise StoreUnavailable("It is away.")

        gone = AsyncMock(side_effect=StoreUnavailable("It is away."))
        with patch.multiple(type(scope), head=away, record=gone):
            answer = await engine.classify(recent, "t", [RED, BLUE])
        assert (answer.pointer, labels_of(answer.rows)) == (changed.pointer, [1, 0])

    run(tmp_path, work)


@pytest.mark.parametrize("asked", [True, False])
def test_a_task_changed_briefly_is_known_though_the_store_goes_away_at_once(tmp_path: Path, asked: bool) -> None:
    """It is learned from what was stored, which is in hand: when it is asked about, or after a moment without that."""

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        recent = Recent(store, most=10, stale_ok_s=60).scope("a")
        await engine.classify(recent, "t", [RED])
        changed = await engine.learn_with(recent, "t", "ridge", brief=True)
        away = AsyncMock(side_effect=StoreUnavailable("It is away."))
        with patch.multiple(type(scope), pointer=away, record=away, head=away, keep_head=away):
            if asked:
                await engine.classify(recent, "t", [RED, BLUE])
            while recent.head_in_memory(changed.pointer.head) is None:
                await asyncio.sleep(0.001)
            answer = await engine.classify(recent, "t", [RED, BLUE])
        assert (answer.pointer, labels_of(answer.rows)) == (dataclasses.replace(changed.pointer, stale=True), [1, 0])

    run(tmp_path, work)


def test_what_cannot_be_learned_after_a_brief_change_is_said_in_the_log_and_to_who_asks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        whole = engine._learning.head
        monkeypatch.setattr(engine._learning, "head", AsyncMock(side_effect=ExtractorFailed("It has no solution.")))
        await engine.learn_with(scope, "t", "ridge", brief=True)
        with pytest.raises(ExtractorFailed):
            await engine.classify(scope, "t", [RED])
        while "kept, but was not learned: It has no solution." not in caplog.text:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(engine._learning, "head", whole)
        assert labels_of((await engine.classify(scope, "t", [RED])).rows) == [1]  # nothing stays in the way
        again = await engine.learn_with(scope, "t", "prototype", brief=True)
        while await scope.head(again.pointer.head) is None:
            await asyncio.sleep(0.001)

    run(tmp_path, work)


def one_more(seed: int) -> list[Example]:
    return [Example("red", picture("red", seed=seed))]


def noting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples had what is learned from now on, beside those of SUPPORT."""
    learned, original = list[int](), engine._learning.head

    async def noted(record: Record) -> Head:
        learned.append(len(record.ids) - len(SUPPORT))
        return await original(record)

    monkeypatch.setattr(engine._learning, "head", noted)
    return learned


def test_a_task_that_grows_image_after_image_is_learned_when_it_rests_or_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        monkeypatch.setattr("service.tasks.LULL_S", 0.3)
        scope = Recent(store, most=10, stale_ok_s=60).scope("a")
        await engine.adapt(scope, "t", SUPPORT)
        learned = noting(engine, monkeypatch)
        for count in range(1, 9):
            await engine.add(scope, "t", one_more(100 + count), brief=True)
        assert learned == []
        assert (await engine.classify(scope, "t", [RED])).pointer.version == 9
        assert learned == [8]
        last = await engine.add(scope, "t", one_more(200), brief=True)
        while scope.head_in_memory(last.pointer.head) is None:
            await asyncio.sleep(0.01)
        assert learned == [8, 9]  # what was asked about is not learned again

    run(tmp_path, work)


def test_a_task_that_never_rests_is_learned_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        monkeypatch.setattr("service.tasks.LULL_S", 0.2)
        monkeypatch.setattr("service.tasks.MOST_LULLS", 2)
        await engine.adapt(scope, "t", SUPPORT)
        learned, count = noting(engine, monkeypatch), 0
        while not learned:
            count += 1
            assert count < 100  # half a second, of which none is a lull
            await engine.add(scope, "t", one_more(100 + count), brief=True)
            await asyncio.sleep(0.01)

    run(tmp_path, work)


@pytest.mark.parametrize("how", ["forgotten", "taught anew", "changed elsewhere"])
def test_what_was_overtaken_before_it_was_learned_behind_an_answer_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        monkeypatch.setattr("service.tasks.LULL_S", 0.5)
        scope = Recent(store, most=10, stale_ok_s=60).scope("a")
        await engine.adapt(scope, "t", SUPPORT)
        learned = noting(engine, monkeypatch)
        changed = await engine.add(scope, "t", GREEN, brief=True)
        with pytest.raises(VersionConflict):
            await engine.forget(scope, "t", expect=1)
        assert list(engine._tasks._to_learn.values()) != [None]  # it is where it was
        if how == "forgotten":
            await engine.forget(scope, "t")
        elif how == "taught anew":
            await engine.adapt(scope, "t", SUPPORT)
        else:
            record = dataclasses.replace(changed.record, method="prototype")
            await store.scope("a").commit("t", record, record_id(record), None, expect=None)
        if how != "changed elsewhere":
            assert list(engine._tasks._to_learn.values()) == [None]  # nothing of it stays in memory
        while engine._tasks._to_learn:
            await asyncio.sleep(0.01)
        assert learned == []
        assert scope.head_in_memory(changed.pointer.head) is None

    run(tmp_path, work)


def test_of_many_brief_changes_in_a_row_only_a_few_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        learned, original = [], engine._learning.head

        async def slowly(record: Record) -> Head:
            learned.append(record)
            await asyncio.sleep(0.05)
            return await original(record)

        monkeypatch.setattr(engine._learning, "head", slowly)
        for seed in range(20):
            await engine.add(scope, "t", [Example("red", picture("red", seed=100 + seed))], brief=True)
        last = await engine.describe(scope, "t")
        while await scope.head(last.pointer.head) is None:
            await asyncio.sleep(0.001)
        assert (last.pointer.version, len(last.record.ids)) == (21, len(SUPPORT) + 20)
        assert len(learned) < 10
        assert learned[-1].ids == last.record.ids

    run(tmp_path, work)


@pytest.mark.slow
def test_brief_changes_of_many_tasks_are_learned_one_at_a_time_and_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is behind an answer has no client who waits for it, so nothing else would bound it."""

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        monkeypatch.setattr("service.tasks.MOST_BEHIND", 5)
        for number in range(9):
            await engine.adapt(scope, f"t{number}", SUPPORT)
        at_once, learned, original = [0], [], engine._learning.head

        async def slowly(record: Record) -> Head:
            at_once.append(at_once[-1] + 1)
            await asyncio.sleep(0.02)
            at_once.append(at_once[-1] - 1)
            learned.append(record)
            return await original(record)

        monkeypatch.setattr(engine._learning, "head", slowly)
        for number in range(9):
            await engine.learn_with(scope, f"t{number}", "ridge", brief=True)
        while len(learned) < 5:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        assert (len(learned), max(at_once)) == (5, 1)
        monkeypatch.setattr(engine._learning, "head", original)
        assert labels_of((await engine.classify(scope, "t8", [RED])).rows) == [1]

    run(tmp_path, work)


def test_a_brief_change_of_nothing_moves_nothing(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        before = await engine.adapt(scope, "t", SUPPORT)
        again = await engine.add(scope, "t", SUPPORT, brief=True)
        assert (again.pointer, again.known, again.report) == (before.pointer, True, None)
        assert [item.code for item in again.rejected] == ["duplicate_example"] * len(SUPPORT)

    run(tmp_path, work)


def test_a_head_that_cannot_be_made_again_is_told_at_once(tmp_path: Path) -> None:
    extractor = Gated()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        extractor.gate.set()
        await engine.adapt(scope, "t", SUPPORT)
        without_heads(store)
        extractor.gate.clear()
        away = AsyncMock(side_effect=StoreUnavailable("It is away."))
        with patch.object(type(scope), "record", away), pytest.raises(StoreUnavailable):
            await engine.classify(scope, "t", [RED])  # while the gate is shut
        extractor.gate.set()

    run(tmp_path, work, extractor=extractor)


class Meanwhile:
    """A scope in which something happens right before a function's first call; all else is as it is."""

    def __init__(self, scope: Scope, function: str, what: Callable[[], Awaitable[object]]):
        self._scope, self._function, self._what, self._done = scope, function, what, False

    def __getattr__(self, name: str) -> object:
        found = getattr(self._scope, name)
        if name != self._function or self._done:
            return found

        async def later(*given: object, **named: object) -> object:
            if not self._done:
                self._done = True
                await self._what()
            return await found(*given, **named)

        return later


@pytest.mark.parametrize("change", ["rollback", "add", "learn with"])
def test_a_task_that_is_deleted_while_it_is_changed_stays_deleted(tmp_path: Path, change: str) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        await engine.adapt(scope, "t", [*SUPPORT, *GREEN])
        late: Scope = Meanwhile(scope, "commit", lambda: engine.forget(scope, "t"))  # type: ignore[assignment]
        changes: dict[str, Callable[[], Awaitable[Adapted]]] = {
            "rollback": lambda: engine.rollback(late, "t", 1),
            "add": lambda: engine.add(late, "t", [Example("red", RED)]),
            "learn with": lambda: engine.learn_with(late, "t", "ridge"),
        }
        with pytest.raises(TaskNotFound):
            await changes[change]()
        assert await scope.pointer("t") is None

    run(tmp_path, work)


def test_a_change_of_a_task_that_is_deleted_and_made_anew_is_made_to_the_new_one(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)

        async def anew() -> None:
            await engine.forget(scope, "t")
            await engine.adapt(scope, "t", [*SUPPORT, *GREEN])

        late: Scope = Meanwhile(scope, "commit", anew)  # type: ignore[assignment]
        found = await engine.learn_with(late, "t", "ridge")
        assert found.record.labels == ("blue", "green", "red")
        assert found.pointer.version == 2

    run(tmp_path, work)


@pytest.mark.parametrize("change", ["deleted", "perhaps deleted", "replaced", "perhaps replaced", "added to"])
def test_a_task_learned_again_after_it_was_changed_is_what_is_told_although_the_first_answer_is_late(
    tmp_path: Path, change: str
) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        done, go = asyncio.Event(), asyncio.Event()

        class Stalled:
            """A store does what it is asked at once, and tells of it when it may."""

            def __getattr__(self, name: str) -> object:
                return getattr(scope, name)

            async def commit(self, *given: Any, **named: Any) -> Pointer:
                pointer = await scope.commit(*given, **named)
                if done.is_set():
                    raise StoreUnavailable("Nobody knows.")
                done.set()
                await go.wait()
                return pointer

            async def delete(self, task: str, *, expect: Expected = None) -> bool:
                await scope.delete(task, expect=expect)
                raise StoreUnavailable("Nobody knows.")

        stalled: Scope = Stalled()  # type: ignore[assignment]
        first = asyncio.create_task(engine.adapt(stalled, "t", SUPPORT))
        await done.wait()
        if change == "deleted":
            await engine.forget(scope, "t")
        elif change == "perhaps deleted":
            with pytest.raises(StoreUnavailable):
                await engine.forget(stalled, "t")
        elif change == "replaced":
            await engine.adapt(scope, "t", [*SUPPORT, *GREEN])
        elif change == "perhaps replaced":
            with pytest.raises(StoreUnavailable):
                await engine.adapt(stalled, "t", [*SUPPORT, *GREEN])
        else:
            await engine.add(scope, "t", GREEN)
        again = await engine.adapt(scope, "t", SUPPORT)
        assert again.record.labels == ("blue", "red")
        assert await scope.pointer("t") == again.pointer
        go.set()
        assert (await first).pointer.version == 1

    run(tmp_path, work)


def test_an_etag_of_a_task_does_not_fit_another_one_at_the_same_version(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        old = await engine.adapt(scope, "t", SUPPORT)
        await engine.forget(scope, "t")
        new = await engine.adapt(scope, "t", [*SUPPORT, *GREEN])
        assert old.pointer.version == new.pointer.version
        with pytest.raises(VersionConflict):
            await engine.learn_with(scope, "t", "ridge", expect=old.pointer)
        with pytest.raises(VersionConflict):
            await engine.adapt(scope, "t", SUPPORT, expect=old.pointer)
        assert (await engine.learn_with(scope, "t", "ridge", expect=new.pointer)).pointer.version == 2

    run(tmp_path, work)


def test_an_explanation_names_examples_of_the_task_that_answers(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)

        async def anew() -> None:
            await engine.forget(scope, "t")
            await engine.adapt(scope, "t", GREEN + [Example("blue", picture("blue", seed=seed)) for seed in range(3)])

        late: Scope = Meanwhile(scope, "record", anew)  # type: ignore[assignment]
        found = await engine.classify(late, "t", [BLUE], explain=True)
        (row,) = found.rows
        assert isinstance(row, Answer)
        assert found.head.labels == ("blue", "green")
        assert {near.label for near in row.nearest} <= {"blue", "green"}

    run(tmp_path, work)


def test_what_is_refused_before_its_images_are_looked_at_costs_nothing(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        allowance = Allowance(10)
        token = quota.current.set(allowance)
        await engine.adapt(scope, "t", SUPPORT)  # 6
        other = Engine(tiny_artifact(tmp_path, name="other"), engine.batcher)
        without_heads(store)
        with pytest.raises(TaskStale):
            await other.classify(scope, "t", [RED])
        full = AsyncMock(side_effect=Overloaded("No room."))
        with patch.object(engine.batcher, "embed", full):
            for refused in (
                engine.classify(scope, "t", [RED, BLUE]),
                engine.embed([RED, BLUE]),
                engine.add(scope, "t", GREEN),
                engine.adapt(scope, "u", SUPPORT[2:4]),
                engine.classify_once(SUPPORT[2:4], [RED]),
            ):
                with pytest.raises(Overloaded):
                    await refused
        assert allowance.left()[0] == 4
        quota.current.reset(token)

    run(tmp_path, work)


def test_of_twins_each_has_kept_what_it_asked_for(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        found = await asyncio.gather(*(engine.adapt(scope, "t", SUPPORT, retain=keeps) for keeps in (True, False)))
        assert [len(adapted.record.images) for adapted in found] == [len(SUPPORT), 0]

    run(tmp_path, work)


def test_twins_in_another_order_are_told_of_their_own_places(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        bad = Example("red", b"none")
        orders = [[*SUPPORT, bad], [bad, *SUPPORT]]
        found = await asyncio.gather(*(engine.adapt(scope, "t", order) for order in orders))
        assert [[item.index for item in adapted.rejected] for adapted in found] == [[len(SUPPORT)], [0]]

    run(tmp_path, work)


def test_a_task_that_moves_while_its_head_is_made_again_answers_as_the_version_it_names(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        old = await engine.adapt(scope, "t", SUPPORT)
        first = await scope.pointer("t")
        new = await engine.adapt(scope, "t", SUPPORT, method="ridge")
        assert first == old.pointer

        class Late:
            """Tells where the task was; all else is as it is now."""

            def __getattr__(self, name: str) -> object:
                return getattr(scope, name)

            async def pointer(self, task: str) -> object:
                return first

        without_heads(store)
        found = await engine.classify(Late(), "t", [RED])  # type: ignore[arg-type]
        assert found.head.method == "ridge"
        assert (found.pointer, found.head_id) == (new.pointer, new.pointer.head)

    run(tmp_path, work)


def test_a_task_of_another_artifact_is_stale_never_wrong(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        other = Engine(tiny_artifact(tmp_path, name="other"), engine.batcher)
        with pytest.raises(TaskStale):
            await other.classify(scope, "t", [RED])
        without_heads(store)
        with pytest.raises(TaskStale):
            await other.classify(scope, "t", [RED])
        # The remedy: send the examples again.
        await other.adapt(scope, "t", SUPPORT)
        assert labels_of((await other.classify(scope, "t", [RED])).rows) == [1]

    run(tmp_path, work)


def test_a_damaged_record_is_stale_and_adapting_again_repairs_it(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        for key, (data, expires) in list(store.values.items()):
            store.values[key] = data[:-1] + bytes([data[-1] ^ 1]), expires
        with pytest.raises(TaskStale):
            await engine.classify(scope, "t", [RED])
        await engine.adapt(scope, "t", SUPPORT)
        assert labels_of((await engine.classify(scope, "t", [RED])).rows) == [1]

    run(tmp_path, work)


def test_a_bad_image_is_left_out_and_named(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        adapted = await engine.adapt(scope, "t", [*SUPPORT, Example("red", b"GIF89a")])
        assert [(r.index, r.code) for r in adapted.rejected] == [(6, "undecodable_example")]
        assert "GIF" in adapted.rejected[0].detail
        clean = await engine.adapt(scope, "u", SUPPORT)
        assert clean.pointer.head == adapted.pointer.head

    run(tmp_path, work)


def test_a_class_left_with_no_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        with pytest.raises(InvalidSupport, match="'green'") as caught:
            await engine.adapt(scope, "t", [*SUPPORT, Example("green", b"")])
        assert caught.value.index == 6
        assert not store.values

    run(tmp_path, work)


def test_the_same_image_twice_counts_once(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        adapted = await engine.adapt(scope, "t", [*SUPPORT, SUPPORT[0]])
        assert [r.code for r in adapted.rejected] == ["duplicate_example"]
        assert len(adapted.record.classes) == 6

    run(tmp_path, work)


@pytest.mark.parametrize(
    ("examples", "error", "words"),
    [
        ([], InvalidSupport, "empty"),
        (SUPPORT[:3], InvalidSupport, "two classes"),
        ([Example("", RED), Example("b", BLUE)], InvalidSupport, "label is empty"),
        ([Example("x" * 300, RED), Example("b", BLUE)], InvalidSupport, "MAX_LABEL"),
        ([Example("a\nb", RED), Example("b", BLUE)], InvalidSupport, "control"),
        ([Example(str(k), RED) for k in range(9)], TooLarge, "MAX_EXAMPLES"),
        ([Example(str(k), RED) for k in range(5)], TooLarge, "MAX_WAY"),
    ],
)
def test_a_support_set_that_cannot_be_learned_is_refused_before_any_work(
    tmp_path: Path, examples: list[Example], error: type[Exception], words: str
) -> None:
    extractor = MeanColour()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        with pytest.raises(error, match=words):
            await engine.adapt(scope, "t", examples)
        assert not store.values
        assert not extractor.batches

    run(tmp_path, work, extractor=extractor, limits=Limits(max_examples=8, max_way=4, max_label=256))


def test_labels_that_look_the_same_are_the_same(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        twins = [Example("caf\u00e9", RED), Example("cafe\u0301", picture("red", seed=5)), Example("tea", BLUE)]
        adapted = await engine.adapt(scope, "t", twins)
        assert adapted.record.labels == ("caf\u00e9", "tea")

    run(tmp_path, work)


def test_an_unknown_method_names_the_known_ones(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        with pytest.raises(UnknownMethod, match="prototype, ridge"):
            await engine.adapt(scope, "t", SUPPORT, method="magic")

    run(tmp_path, work)


def test_unlabelled_examples_change_the_head_and_are_counted(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        plain = await engine.adapt(scope, "plain", SUPPORT)
        more = await engine.adapt(scope, "more", SUPPORT, unlabelled=[picture("orange"), picture("navy")])
        assert len(more.record.unlabelled) == 2
        heads = [await scope.head(adapted.pointer.head) for adapted in (plain, more)]
        assert heads[0] is not None
        assert heads[1] is not None
        assert not np.array_equal(heads[0].affine.weight, heads[1].affine.weight)

    run(tmp_path, work)


def test_one_call_answers_like_a_stored_task_and_stores_nothing(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        once, _ = await engine.classify_once(SUPPORT, [RED, b"junk", BLUE])
        assert not store.values
        await engine.adapt(scope, "t", SUPPORT)
        kept = await engine.classify(scope, "t", [RED, b"junk", BLUE])
        assert once.head_id == kept.head_id
        for index in (0, 2):
            np.testing.assert_array_equal(probabilities(once.rows[index]), probabilities(kept.rows[index]))
        assert getattr(once.rows[1], "index", None) == 1

    run(tmp_path, work)


def test_a_forgotten_task_is_gone(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        await engine.forget(scope, "t")
        for gone in (engine.classify(scope, "t", [RED]), engine.describe(scope, "t"), engine.forget(scope, "t")):
            with pytest.raises(TaskNotFound):
                await gone

    run(tmp_path, work)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 65, "ü", "a/b", "a\n"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(Exception, match="letters, digits"):
        task_name(name)


# Changes


# In whatever parts a support set comes, and whatever came and went meanwhile: the task is what its examples make it.
PARTS = [(example,) for example in (*SUPPORT[1:3], *SUPPORT[4:], *GREEN)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


@pytest.mark.slow
@settings(max_examples=20, deadline=None, database=None)
@given(
    order=st.permutations([*range(len(PARTS)), *range(-len(EXTRA), 0)]),
    method=st.sampled_from(["prototype", "ridge"]),
    retain=st.booleans(),
)
def test_examples_added_one_at_a_time_in_any_order_make_the_task_that_all_at_once_make(
    folder: Path, order: list[int], method: str, retain: bool
) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "whole", [*SUPPORT, *GREEN], unlabelled=EXTRA, method=method, retain=retain)
        await engine.adapt(scope, "grown", [SUPPORT[0], SUPPORT[3]], method=method, retain=retain)
        for version, index in enumerate(order, 2):
            examples, unlabelled = (PARTS[index], ()) if index >= 0 else ((), (EXTRA[index],))
            adapted = await engine.add(scope, "grown", examples, unlabelled=unlabelled)
            assert adapted.pointer.version == version
            assert not adapted.rejected
        assert await everything(engine, scope, "grown") == await everything(engine, scope, "whole")
        # Nor does it matter whether the head was kept or is made again.
        without_heads(store)
        assert await everything(engine, scope, "grown") == await everything(engine, scope, "whole")

    run(folder, work, rejects=True)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, database=None)
@given(
    gone=st.lists(st.integers(0, len(PARTS) + len(EXTRA) - 1), min_size=1, max_size=4, unique=True),
    method=st.sampled_from(["prototype", "ridge"]),
    retain=st.booleans(),
)
def test_a_task_that_gave_examples_back_equals_one_that_never_saw_them(
    folder: Path, gone: list[int], method: str, retain: bool
) -> None:
    more = [*(Example(part[0].label, part[0].payload) for part in PARTS), *(Example("", image) for image in EXTRA)]
    kept = [SUPPORT[0], SUPPORT[3], Example("green", picture("lime", seed=8))]
    stay = [*kept, *(example for index, example in enumerate(more) if index not in gone)]

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        for name, sent in (("all", [*kept, *more]), ("never", stay)):
            examples = [example for example in sent if example.label]
            unlabelled = [example.payload for example in sent if not example.label]
            await engine.adapt(scope, name, examples, unlabelled=unlabelled, method=method, retain=retain)
        for index in gone:
            name = example_id(more[index].label, more[index].payload)
            before = (await engine.describe(scope, "all")).record.ids
            adapted = await engine.remove_example(scope, "all", name)
            assert set(before) - set(adapted.record.ids) == {name}
        assert await everything(engine, scope, "all") == await everything(engine, scope, "never")

    run(folder, work, rejects=True)


def test_a_class_taken_back_leaves_the_task_as_if_it_had_never_been(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", [*SUPPORT, *GREEN], unlabelled=EXTRA)
        await engine.adapt(scope, "u", SUPPORT, unlabelled=EXTRA)
        adapted = await engine.remove_class(scope, "t", " green ")  # in any form that means the same
        assert adapted.record.labels == ("blue", "red")
        assert await everything(engine, scope, "t") == await everything(engine, scope, "u")

    run(tmp_path, work)


def test_an_example_of_a_new_class_makes_the_class(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        first = await engine.adapt(scope, "t", SUPPORT)
        adapted = await engine.add(scope, "t", GREEN)
        assert (adapted.pointer.version, adapted.created, adapted.known) == (2, False, False)
        assert adapted.record.labels == ("blue", "green", "red")
        assert adapted.record.created == first.record.created
        found = await engine.classify(scope, "t", [picture("lime", seed=9)])
        assert labels_of(found.rows) == [1]
        assert found.pointer == adapted.pointer

    run(tmp_path, work)


def test_what_is_there_already_moves_nothing(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        first = await engine.adapt(scope, "t", SUPPORT, unlabelled=EXTRA)
        before = dict(store.values)
        again = await engine.add(scope, "t", SUPPORT[:2], unlabelled=EXTRA[:1])
        assert again.known
        assert again.pointer == first.pointer
        assert [(r.index, r.code) for r in again.rejected] == [(k, "duplicate_example") for k in range(3)]
        assert store.values == before

    run(tmp_path, work)


def test_a_changed_task_ends_when_it_was_to_end(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        end = (await engine.adapt(scope, "t", SUPPORT, ttl_s=60)).record.expires
        added = await engine.add(scope, "t", GREEN)
        removed = await engine.remove_class(scope, "t", "green")
        assert end is not None
        assert [added.record.expires, removed.record.expires] == [end, end]
        later = (await engine.adapt(scope, "t", [*SUPPORT, *GREEN], ttl_s=3600)).record.expires
        back = await engine.rollback(scope, "t", 1)  # to other examples, not to another end
        assert back.record.expires == later
        assert (await engine.describe(scope, "t")).record.expires == later

    run(tmp_path, work)


def test_a_task_keeps_two_classes_and_each_class_an_example(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        adapted = await engine.adapt(scope, "t", [*SUPPORT, GREEN[0]])
        before = dict(store.values)
        only = adapted.record.ids[adapted.record.classes.tolist().index(1)]
        with pytest.raises(InvalidSupport, match="last example of 'green'"):
            await engine.remove_example(scope, "t", only)
        assert store.values == before
        await engine.remove_class(scope, "t", "green")
        before = dict(store.values)
        with pytest.raises(InvalidSupport, match="two classes"):
            await engine.remove_class(scope, "t", "red")
        assert store.values == before

    run(tmp_path, work)


def test_the_last_unlabelled_example_may_go(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT, unlabelled=EXTRA[:1])
        adapted = await engine.remove_example(scope, "t", example_id("", EXTRA[0]))
        assert len(adapted.record.unlabelled) == 0
        assert adapted.pointer.head == (await engine.adapt(scope, "u", SUPPORT)).pointer.head

    run(tmp_path, work)


def test_what_is_not_there_cannot_be_taken_back(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        adapted = await engine.adapt(scope, "t", SUPPORT)
        for change, error in (
            (engine.remove_example(scope, "t", "ex_nothing"), ExampleNotFound),
            (engine.remove_class(scope, "t", "green"), ClassNotFound),
            (engine.remove_class(scope, "t", ""), ClassNotFound),
            (engine.remove_example(scope, "u", adapted.record.ids[0]), TaskNotFound),
            (engine.remove_class(scope, "u", "red"), TaskNotFound),
            (engine.add(scope, "u", SUPPORT), TaskNotFound),
            (engine.rollback(scope, "u", 1), TaskNotFound),
            (engine.versions(scope, "u"), TaskNotFound),
        ):
            with pytest.raises(error):
                await change
        assert (await engine.describe(scope, "t")).pointer == adapted.pointer

    run(tmp_path, work)


def test_nothing_is_extracted_for_a_task_that_is_not_there(tmp_path: Path) -> None:
    extractor = MeanColour()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        with pytest.raises(TaskNotFound):
            await engine.add(scope, "t", SUPPORT)
        assert not extractor.batches

    run(tmp_path, work, extractor=extractor)


@pytest.mark.parametrize(
    ("examples", "unlabelled", "words"),
    [
        ([*SUPPORT[:2], *GREEN], [], "would have 8 images"),
        ([], EXTRA, "would have 8 images"),
        ([GREEN[0], Example("white", picture("white"))][::-1], [], "would have 8 images"),
        ([Example(str(k), RED) for k in range(9)], [], "has 9 images"),
    ],
)
def test_a_task_does_not_grow_over_the_limit_of_examples(
    tmp_path: Path, examples: list[Example], unlabelled: list[bytes], words: str
) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        before = dict(store.values)
        with pytest.raises(TooLarge, match=rf"{words}; the limit is 7 \(MAX_EXAMPLES\)"):
            await engine.add(scope, "t", examples, unlabelled=unlabelled)
        assert store.values == before
        await engine.add(scope, "t", [*SUPPORT, GREEN[0]])  # what counts is what it would have, not what is sent

    run(tmp_path, work, limits=Limits(max_examples=7))


def test_a_task_does_not_grow_over_the_limit_of_classes(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", [*SUPPORT, *GREEN])
        before = dict(store.values)
        with pytest.raises(TooLarge, match="would have 4 classes; the limit is 3"):
            await engine.add(scope, "t", [Example("white", picture("white"))])
        assert store.values == before

    run(tmp_path, work, limits=Limits(max_way=3))


def test_bad_images_among_good_ones_are_left_out_of_what_is_added(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        adapted = await engine.add(scope, "t", [Example("red", b"GIF89a"), *GREEN], unlabelled=[b"", EXTRA[0]])
        assert [(r.index, r.code) for r in adapted.rejected] == [(0, "undecodable_example"), (3, "undecodable_example")]
        whole = await engine.adapt(scope, "u", [*SUPPORT, *GREEN], unlabelled=EXTRA[:1])
        assert adapted.pointer.head == whole.pointer.head

    run(tmp_path, work)


@pytest.mark.parametrize(
    ("examples", "unlabelled", "fail", "error", "index"),
    [
        ([Example("red", b"junk"), Example("blue", b"")], [], False, UndecodableExample, 0),
        ([], [b"junk"], False, UndecodableExample, 0),
        ([*GREEN, Example("red", b"junk")], [], True, UndecodableExample, 2),
        ([Example("red", RED), Example("green", b"junk")], [], False, InvalidSupport, 1),
        ([], [], False, InvalidSupport, None),
    ],
    ids=["all bad", "all unlabelled bad", "not to be skipped", "a new class without any", "none"],
)
def test_images_of_which_none_can_be_used_change_nothing(
    tmp_path: Path,
    examples: list[Example],
    unlabelled: list[bytes],
    fail: bool,
    error: type[Exception],
    index: int | None,
) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        before = dict(store.values)
        with pytest.raises(error) as caught:
            await engine.add(scope, "t", examples, unlabelled=unlabelled, on_bad_image="fail" if fail else "skip")
        assert getattr(caught.value, "index", None) == index
        assert store.values == before

    run(tmp_path, work)


def test_an_extractor_that_fails_adds_nothing(tmp_path: Path) -> None:
    extractor = Failing(broken=False)

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        before = dict(store.values)
        extractor.broken = True
        with pytest.raises(ExtractorFailed):
            await engine.add(scope, "t", GREEN)
        assert store.values == before

    run(tmp_path, work, extractor=extractor)


# Versions


def test_versions_are_listed_and_an_earlier_one_comes_back_as_a_new_one(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        first = await engine.adapt(scope, "t", SUPPORT)
        was = await everything(engine, scope, "t")
        second = await engine.add(scope, "t", GREEN)
        assert await engine.versions(scope, "t") == [second.pointer, first.pointer]
        old = await engine.describe(scope, "t", version=1)
        assert (old.pointer, old.record.labels) == (first.pointer, ("blue", "red"))
        back = await engine.rollback(scope, "t", 1)
        assert (back.pointer.version, back.pointer.head) == (3, first.pointer.head)
        assert [at.version for at in await engine.versions(scope, "t")] == [3, 2, 1]
        assert await everything(engine, scope, "t") == was
        again = await engine.rollback(scope, "t", 2)
        assert (again.pointer.version, again.pointer.head) == (4, second.pointer.head)

    run(tmp_path, work)


def test_a_rollback_to_where_the_task_is_moves_nothing(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        second = await engine.add(scope, "t", GREEN)
        again = await engine.rollback(scope, "t", 2)
        assert again.known
        assert again.pointer == second.pointer

    run(tmp_path, work)


def test_a_version_that_is_not_kept_cannot_come_back(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        store.versions_kept = 3
        await engine.adapt(scope, "t", SUPPORT)
        for seed in range(3):
            await engine.add(scope, "t", [Example("red", picture("red", seed=100 + seed))])
        assert [at.version for at in await engine.versions(scope, "t")] == [4, 3, 2]
        for version in (1, 5):
            for found in (engine.rollback(scope, "t", version), engine.describe(scope, "t", version=version)):
                with pytest.raises(VersionNotFound, match=f"Version {version} "):
                    await found
        assert (await engine.rollback(scope, "t", 2)).pointer.version == 5

    run(tmp_path, work)


# Writers at once


def changes(engine: Engine, scope: Scope, expect: int | None) -> dict[str, Callable[[], Awaitable[Adapted]]]:
    """Every change of the task `t` (three classes, version 2), each under the condition that it is at `expect`."""
    return {
        "add": lambda: engine.add(scope, "t", [Example("red", RED)], expect=expect),
        "add what is there": lambda: engine.add(scope, "t", SUPPORT, expect=expect),
        "remove an example": lambda: engine.remove_example(
            scope, "t", example_id("red", SUPPORT[0].payload), expect=expect
        ),
        "remove a class": lambda: engine.remove_class(scope, "t", "green", expect=expect),
        "rollback": lambda: engine.rollback(scope, "t", 1, expect=expect),
        "replace": lambda: engine.adapt(scope, "t", SUPPORT[1:], expect=expect),
    }


@pytest.mark.parametrize("stale", [0, 1, 3])
def test_no_change_is_made_to_a_task_that_has_moved(tmp_path: Path, stale: int) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        await engine.add(scope, "t", GREEN)
        before = dict(store.values)
        for name, change in changes(engine, scope, stale).items():
            with pytest.raises(VersionConflict):
                await change()
            assert store.values == before, name

    run(tmp_path, work)


@pytest.mark.parametrize("name", ["add", "remove an example", "remove a class", "rollback", "replace"])
def test_a_change_under_the_right_condition_is_made_once_of_two(tmp_path: Path, name: str) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        await engine.add(scope, "t", GREEN)
        rival = engine.add(scope, "t", [Example("blue", BLUE)], expect=2)
        done = await asyncio.gather(changes(engine, scope, 2)[name](), rival, return_exceptions=True)
        assert sorted(type(one).__name__ for one in done) == ["Adapted", "VersionConflict"]
        assert (await engine.describe(scope, "t")).pointer.version == 3

    run(tmp_path, work)


def test_of_many_who_add_at_once_every_example_ends_up_in_the_task(tmp_path: Path) -> None:
    count = 2 * CHANGES + 8  # more than one of them could meet and give way to

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        store.versions_kept = 100
        await engine.adapt(scope, "t", SUPPORT)
        more = [Example("red", picture("red", seed=100 + k)) for k in range(count)]
        done = await asyncio.gather(*(engine.add(scope, "t", [example]) for example in more))
        assert sorted(adapted.pointer.version for adapted in done) == list(range(2, count + 2))
        for adapted, example in zip(done, more, strict=True):  # each sees its own
            assert example_id("red", example.payload) in adapted.record.ids
        await engine.adapt(scope, "u", [*SUPPORT, *more])
        assert await everything(engine, scope, "t") == await everything(engine, scope, "u")

    run(tmp_path, work)


def test_writers_of_other_processes_lose_nothing_either(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        engines = [engine, *(Engine(engine.artifact, engine.batcher) for _ in range(3))]
        await engine.adapt(scope, "t", [*SUPPORT, *GREEN])
        more = [Example("red", picture("red", seed=100 + k)) for k in range(12)]
        adds = [engines[k % 4].add(scope, "t", [example]) for k, example in enumerate(more)]
        removed = example_id("blue", SUPPORT[3].payload)
        await asyncio.gather(
            *adds, engines[1].remove_class(scope, "t", "green"), engines[2].remove_example(scope, "t", removed)
        )
        await engine.adapt(scope, "u", [*SUPPORT[:3], *SUPPORT[4:], *more])
        assert await everything(engine, scope, "t") == await everything(engine, scope, "u")
        assert (await engine.describe(scope, "t")).pointer.version == 15

    run(tmp_path, work)


def test_a_task_that_never_stands_still_is_given_up_at_last(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        tries = []

        class Busy:
            """Somebody else is always faster."""

            tenant = scope.tenant

            def __getattr__(self, name: str) -> object:
                return getattr(scope, name)

            async def commit(self, *args: object, expect: int) -> object:
                tries.append(expect)
                raise VersionConflict("moved")

        with pytest.raises(VersionConflict, match="kept moving"):
            await engine.add(Busy(), "t", GREEN)  # type: ignore[arg-type]
        assert len(tries) == CHANGES

    run(tmp_path, work)


# Another artifact


def served_by_another(engine: Engine, folder: Path) -> Engine:
    return Engine(tiny_artifact(folder, name="other", rejects=True), engine.batcher, limits=engine.limits)


FIRST_USES: dict[str, Callable[[Engine, Scope], Awaitable[object]]] = {
    "classify": lambda engine, scope: engine.classify(scope, "t", [RED]),
    "explain": lambda engine, scope: engine.classify(scope, "t", [RED], explain=True),
    "get": lambda engine, scope: engine.describe(scope, "t"),
    "head": lambda engine, scope: engine.head(scope, "t"),
    "add": lambda engine, scope: engine.add(scope, "t", GREEN),
    "remove an example": lambda engine, scope: engine.remove_example(scope, "t", example_id("red", SUPPORT[0].payload)),
    "rollback": lambda engine, scope: engine.rollback(scope, "t", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("heads_kept", [True, False])
@pytest.mark.parametrize("use", FIRST_USES)
def test_with_its_images_a_task_is_learned_again_on_first_use(tmp_path: Path, use: str, heads_kept: bool) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        old = await engine.adapt(scope, "t", SUPPORT, unlabelled=EXTRA, retain=True, ttl_s=600)
        if not heads_kept:
            without_heads(store)
        other = served_by_another(engine, tmp_path)
        await FIRST_USES[use](other, scope)
        told = await other.describe(scope, "t")
        assert told.record.artifact == "sha256:other"
        assert told.pointer == dataclasses.replace(old.pointer, version=2, head=record_id(told.record))
        assert (told.record.created, told.record.expires) == (old.record.created, old.record.expires)
        support = SUPPORT[1:] if use == "remove an example" else [*SUPPORT, *GREEN] if use == "add" else SUPPORT
        await other.adapt(scope, "u", support, unlabelled=EXTRA, retain=True)
        assert await everything(other, scope, "t") == await everything(other, scope, "u")
        assert labels_of((await other.classify(scope, "t", [RED, BLUE])).rows)[1] == 0

    run(tmp_path, work)


@pytest.mark.parametrize("artifact", ["the same", "another"])
def test_a_task_above_a_limit_that_was_lowered_is_used_and_made_smaller(tmp_path: Path, artifact: str) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", [*SUPPORT, *GREEN], retain=True)
        now = served_by_another(engine, tmp_path) if artifact == "another" else engine
        now.limits = now._learning.limits = Limits(max_examples=2, max_way=2, max_retained_bytes=1)
        assert len((await now.classify(scope, "t", [RED])).rows) == 1
        with pytest.raises(TooLarge):
            await now.add(scope, "t", GREEN)
        told = await now.remove_example(scope, "t", (await now.describe(scope, "t")).record.ids[0])
        told = await now.remove_class(scope, "t", told.record.labels[0])
        assert len(told.record.labels) == 2

    run(tmp_path, work)


def test_many_first_uses_at_once_learn_the_task_again_once(tmp_path: Path) -> None:
    extractor = MeanColour()

    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT, retain=True)
        other, before = served_by_another(engine, tmp_path), sum(extractor.batches)
        found = await asyncio.gather(
            *(other.classify(scope, "t", [RED]) for _ in range(10)), *(other.describe(scope, "t") for _ in range(5))
        )
        assert {answer.pointer.version for answer in found if answer.pointer} == {2}
        assert sum(extractor.batches) - before == len(SUPPORT) + 10

    run(tmp_path, work, extractor=extractor)


@pytest.mark.slow
def test_artifacts_that_take_turns_with_a_task_push_out_no_version_of_it(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT, retain=True)
        await engine.add(scope, "t", GREEN)
        other = served_by_another(engine, tmp_path)
        for _ in range(2 * store.versions_kept):
            for one in (other, engine):
                assert labels_of((await one.classify(scope, "t", [RED])).rows) == [2]
        at, first = await engine.versions(scope, "t")
        assert (at.version, first.version) == (2 + 4 * store.versions_kept, 1)
        back = await engine.rollback(scope, "t", 1)
        assert back.record.labels == ("blue", "red")

    run(tmp_path, work)


def test_an_explanation_whose_version_another_replica_replaces_meanwhile_is_of_the_new_one(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT, retain=True)
        other = served_by_another(engine, tmp_path)
        asked: list[int | None] = []

        class Overtaken:
            """Another replica learns the task again between the look at where it is and that at its record."""

            tenant = scope.tenant

            def __getattr__(self, name: str) -> object:
                return getattr(scope, name)

            async def record(self, task: str, *, version: int | None = None) -> object:
                if not asked:
                    await other.classify(scope, "t", [RED])
                asked.append(version)
                return await scope.record(task, version=version)

        found = await engine.classify(Overtaken(), "t", [RED], explain=True)  # type: ignore[arg-type]
        assert asked[0] == 1
        assert found.pointer is not None
        assert found.pointer.version == 3  # learned again here, too
        assert labels_of(found.rows) == [1]

    run(tmp_path, work)


def test_a_task_whose_record_is_gone_is_not_looked_for_without_end(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        for key in [key for key in store.values if key[1] == "record"]:
            del store.values[key]
        with pytest.raises(VersionNotFound):
            await engine.classify(scope, "t", [RED], explain=True)

    run(tmp_path, work)


def test_without_its_images_a_task_of_another_artifact_can_be_read_but_not_used(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        old = await engine.adapt(scope, "t", SUPPORT)
        other = served_by_another(engine, tmp_path)
        before = dict(store.values)
        told = await other.describe(scope, "t")
        assert (told.pointer, told.record.ids, told.rejects) == (old.pointer, old.record.ids, False)
        assert told.report.accuracy is None
        assert "another artifact" in told.report.advice
        for use in FIRST_USES.keys() - {"get"}:
            with pytest.raises(TaskStale, match="another artifact"):
                await FIRST_USES[use](other, scope)
        assert store.values == before

    run(tmp_path, work)


def test_an_earlier_version_of_another_artifact_can_be_read_and_come_back(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT, retain=True)
        other = served_by_another(engine, tmp_path)
        await other.adapt(scope, "t", [*SUPPORT, *GREEN], retain=True)
        before = dict(store.values)
        old = await other.describe(scope, "t", version=1)
        assert (old.record.artifact, old.pointer.version) == ("sha256:tiny", 1)
        assert store.values == before  # to read an old version changes nothing
        back = await other.rollback(scope, "t", 1)
        assert (back.record.artifact, back.record.labels, back.pointer.version) == ("sha256:other", ("blue", "red"), 3)

    run(tmp_path, work)


def test_a_method_that_the_new_artifact_lacks_gives_way_to_its_default_and_can_come_back(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT, method="ridge", retain=True)
        other = served_by_another(engine, tmp_path)
        other._learning.learners = {"prototype": other._learning.learners["prototype"]}
        for one in (other, engine, other, engine):
            assert (await one.classify(scope, "t", [RED])).head.method == "prototype"
        assert [at.version for at in await engine.versions(scope, "t")] == [5, 1]
        assert (await engine.rollback(scope, "t", 1)).record.method == "ridge"

    run(tmp_path, work)


def test_a_version_of_another_artifact_is_named_where_the_task_itself_is_fine(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        other = served_by_another(engine, tmp_path)
        await other.adapt(scope, "t", SUPPORT)
        with pytest.raises(TaskStale, match="Version 1 of the task 't' was learned with another artifact"):
            await other.rollback(scope, "t", 1)
        assert (await other.describe(scope, "t")).pointer.version == 2

    run(tmp_path, work)


def test_images_that_cannot_be_read_any_more_leave_the_task_stale_and_the_question_unblamed(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT, retain=True)
        other = served_by_another(engine, tmp_path)
        smaller = Batcher(MeanColour(), ImageDecoder(16, 16, 3, max_pixels=100), lanes=1, max_batch=8, max_waiting=99)
        other._learning.batcher = smaller
        before = dict(store.values)
        try:
            with pytest.raises(TaskStale, match="send its examples again"):
                await other.classify(scope, "t", [picture("red", size=(8, 8))])
            assert "another artifact" in (await other.describe(scope, "t")).report.advice
        finally:
            await smaller.close()
        assert store.values == before

    run(tmp_path, work)


# Images that are kept


def test_images_are_kept_only_where_that_was_asked_and_stay_with_their_examples(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        assert (await engine.adapt(scope, "t", SUPPORT)).record.images == ()
        assert (await engine.add(scope, "t", GREEN)).record.images == ()
        kept = await engine.adapt(scope, "k", SUPPORT[1:], unlabelled=EXTRA, retain=True)
        assert len(kept.record.images) == 7
        await engine.add(scope, "k", GREEN)
        await engine.remove_example(scope, "k", example_id("green", GREEN[0].payload))
        _, record = await engine.record(scope, "k")
        labels = [*(record.labels[c] for c in record.classes), "", ""]
        assert sorted(record.images) == sorted([*(e.payload for e in [*SUPPORT[1:], GREEN[1]]), *EXTRA])
        assert list(record.ids) == [example_id(*pair) for pair in zip(labels, record.images, strict=True)]

    run(tmp_path, work)


def test_the_same_support_set_with_and_without_its_images_is_the_same_head(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        first = await engine.adapt(scope, "t", SUPPORT)
        second = await engine.adapt(scope, "t", SUPPORT, retain=True)
        assert not second.known  # the images have to be written
        assert second.pointer == dataclasses.replace(first.pointer, version=2)
        third = await engine.adapt(scope, "t", SUPPORT)
        assert (third.pointer.version, third.record.images) == (3, ())  # and to be forgotten

    run(tmp_path, work)


# None of these, and why


def test_an_image_of_no_class_is_hardly_known_and_one_of_a_class_is(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        for name, support in (("many", SUPPORT), ("one", [SUPPORT[0], SUPPORT[3]])):
            assert (await engine.adapt(scope, name, support)).rejects
            rows = (await engine.classify(scope, name, [RED, BLUE, INDIGO, BLACK])).rows
            known = [row.known for row in rows if isinstance(row, Answer) and row.known is not None]
            assert len(known) == 4
            assert min(known[:2]) > 0.5
            assert 0.05 < known[2] < 0.25
            assert known[3] == 0

    run(tmp_path, work, rejects=True)


def test_a_method_without_a_rejection_leaves_open_how_well_an_image_is_known(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        assert not (await engine.adapt(scope, "t", SUPPORT, method="ridge")).rejects
        rows = (await engine.classify(scope, "t", [BLACK])).rows
        assert [row.known for row in rows if isinstance(row, Answer)] == [None]

    run(tmp_path, work, rejects=True)


def test_a_head_from_before_the_artifact_could_reject_answers_without(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        adapted = await engine.adapt(scope, "t", SUPPORT)
        head = await scope.head(adapted.pointer.head)
        assert head is not None
        await scope.keep_head("t", adapted.pointer, dataclasses.replace(head, gauge=None))
        (row,) = (await engine.classify(scope, "t", [BLACK])).rows
        assert isinstance(row, Answer)
        assert row.known is None

    run(tmp_path, work, rejects=True)


@pytest.mark.parametrize("once", [True, False])
def test_an_explanation_names_the_nearest_examples(tmp_path: Path, once: bool) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        support, questions = [*SUPPORT, *GREEN], [RED, b"junk", picture("lime", seed=9)]
        await engine.adapt(scope, "t", support, unlabelled=[RED])
        found = (
            (await engine.classify_once(support, questions, unlabelled=[RED], explain=True))[0]
            if once
            else await engine.classify(scope, "t", questions, explain=True)
        )
        embedded = await engine.batcher.embed([*(example.payload for example in support), *questions])
        features = {
            example_id(example.label, example.payload): (example.label, feature)
            for example, feature in zip(support, embedded.items, strict=False)
        }
        for index in (0, 2):
            row, question = found.rows[index], embedded.items[len(support) + index]
            assert isinstance(row, Answer)
            similar = sorted(
                ((float(f @ question), name, label) for name, (label, f) in features.items()), reverse=True
            )
            for near, (similarity, _, _) in zip(row.nearest, similar[:2], strict=True):
                assert near.label == features[near.example][0] == ("red", "", "green")[index]
                assert near.similarity == pytest.approx(similarity, abs=2e-3)  # of what is kept at half precision
        assert not isinstance(found.rows[1], Answer)
        plain = await engine.classify(scope, "t", [RED])
        assert [row.nearest for row in plain.rows if isinstance(row, Answer)] == [()]

    run(tmp_path, work)


# The report


def test_a_wrong_label_is_the_first_suspect_and_taking_it_back_clears_the_report(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        wrong = Example("red", picture("blue", seed=30))
        adapted = await engine.adapt(scope, "t", [*SUPPORT, wrong])
        assert adapted.report.suspects[0].example == example_id("red", wrong.payload)
        assert adapted.report.suspects[0].looks_like == "blue"
        assert adapted.report == (await engine.describe(scope, "t")).report
        clean = await engine.remove_example(scope, "t", adapted.report.suspects[0].example)
        assert (clean.report.accuracy, clean.report.suspects) == (1.0, ())

    run(tmp_path, work)


def counted(engine: Engine, op: str) -> tuple[float, ...]:
    """Images so far: used, and rejected."""
    images = engine.metrics.images
    return tuple(images.labels(op, kind)._value.get() for kind in ("used", "rejected"))


def test_the_images_of_a_change_are_counted_as_used_or_not(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", [*SUPPORT, Example("red", b"junk")])
        assert counted(engine, "adapt") == (6, 1)
        await engine.add(scope, "t", [*GREEN, Example("red", b"junk")])
        assert counted(engine, "adapt") == (8, 2)

    run(tmp_path, work)


def test_images_that_are_asked_about_are_counted_by_what_is_asked_though_all_are_refused(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        await engine.adapt(scope, "t", SUPPORT)
        for op, ask in (("embed", engine.embed), ("classify", partial(engine.classify, scope, "t"))):
            await ask([RED, b"junk", BLUE])
            assert counted(engine, op) == (2, 1)
            with pytest.raises(UndecodableExample):
                await ask([b"junk"])
            assert counted(engine, op) == (2, 2)

    run(tmp_path, work)


# Features


def test_images_become_features_and_bad_ones_errors(tmp_path: Path) -> None:
    async def work(engine: Engine, scope: Scope, store: MemoryStore) -> None:
        found = await engine.embed([RED, b"junk", BLUE])
        for index in (0, 2):
            feature = found.items[index]
            assert isinstance(feature, np.ndarray)
            assert np.linalg.norm(feature) == pytest.approx(1, abs=1e-3)
        assert isinstance(found.items[1], UndecodableExample)
        found = await engine.embed([b"junk", b"other junk"])
        assert [type(item) for item in found.items] == [UndecodableExample] * 2
        with pytest.raises(UndecodableExample):
            await engine.embed([b"junk"])
        with pytest.raises(UndecodableExample):
            await engine.embed([RED, b"junk"], on_bad_image="fail")
        with pytest.raises(TooLarge, match="MAX_QUERIES"):
            await engine.embed([RED] * 3 + [BLUE])
        assert not store.values

    run(tmp_path, work, limits=Limits(max_queries=3))
