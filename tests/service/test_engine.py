"""The use cases, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from models.errors import InvalidSupport, TaskNotFound, TaskStale, TooLarge, UnknownMethod
from models.head import Head
from models.images import ImageDecoder
from service.batcher import Batcher
from service.engine import Engine
from service.stores import Scope
from service.stores.memory import MemoryStore
from service.support import Example, Limits, task_name
from tests.fakes import Gated, MeanColour, picture, tiny_artifact

SUPPORT = [Example(label, picture(label, seed=seed)) for label in ("red", "blue") for seed in range(3)]
RED, BLUE = picture("red", seed=9), picture("blue", seed=9)
Work = Callable[[Engine, Scope, MemoryStore], Awaitable[None]]


def run(folder: Path, work: Work, *, extractor: MeanColour | None = None, limits: Limits | None = None) -> None:
    async def main() -> None:
        artifact = tiny_artifact(folder)
        batcher = Batcher(extractor or MeanColour(), ImageDecoder(16, 16, 3), lanes=2, max_batch=8, max_waiting=500)
        store = MemoryStore()
        try:
            async with asyncio.timeout(10):
                await work(Engine(artifact, batcher, limits=limits), store.scope("a"), store)
        finally:
            await batcher.close()

    asyncio.run(main())


def labels_of(rows: list[object]) -> list[int]:
    return [int(np.asarray(row).argmax()) for row in rows]


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
            for key in [key for key in store.values if key[1] == "head"]:
                del store.values[key]
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
        for key in [key for key in store.values if key[1] == "head"]:
            del store.values[key]
        made = []
        original = engine._head
        monkeypatch.setattr(engine, "_head", lambda *args: made.append(1) or original(*args))
        await asyncio.gather(*(engine.classify(scope, "t", [RED]) for _ in range(20)))
        assert len(made) == 1

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

        for key in [key for key in store.values if key[1] == "head"]:
            del store.values[key]
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
        for key in [key for key in store.values if key[1] == "head"]:
            del store.values[key]
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
        np.testing.assert_array_equal(once.rows[0], kept.rows[0])
        np.testing.assert_array_equal(once.rows[2], kept.rows[2])
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
