"""How many tasks a tenant may have, with those that are being made."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from models.errors import TooLarge
from service.places import Places
from service.stores.memory import MemoryStore
from tests.service.stores.values import make_record

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_what_is_being_made_has_a_place_already() -> None:
    store, places = MemoryStore(), Places(2)
    scope = store.scope("a")
    async with AsyncExitStack() as made:
        await made.enter_async_context(places.kept(scope, "one"))
        await made.enter_async_context(places.kept(scope, "two"))
        with pytest.raises(TooLarge, match="MAX_TASKS"):
            await made.enter_async_context(places.kept(scope, "three"))
        await made.enter_async_context(places.kept(scope, "two"))  # twice the same is one
        await made.enter_async_context(places.kept(store.scope("b"), "three"))  # and others have their own
    async with places.kept(scope, "three"):
        pass  # none of them was made in the end


async def test_a_task_that_is_there_needs_no_place() -> None:
    store, places = MemoryStore(), Places(1)
    scope = store.scope("a")
    await scope.commit("one", make_record(), "hd_1", None, expect=0)
    async with places.kept(scope, "one"):
        pass
    with pytest.raises(TooLarge):
        async with places.kept(scope, "two"):
            pass
    await scope.delete("one")
    async with places.kept(scope, "two"):
        pass


async def test_who_finds_its_task_made_by_another_meanwhile_is_let_in() -> None:
    store, places = MemoryStore(), Places(1)
    scope = store.scope("a")
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with places.kept(scope, "one"):
            inside.set()
            await go_on.wait()
            await scope.commit("one", make_record(), "hd_1", None, expect=0)

    running = asyncio.create_task(first())
    await inside.wait()
    async with places.kept(scope, "one"):
        go_on.set()
        await running
    async with places.kept(scope, "one"):
        pass


async def test_a_task_that_is_made_meanwhile_takes_one_place_and_not_two() -> None:
    store, places = MemoryStore(), Places(2)
    scope = store.scope("a")
    async with AsyncExitStack() as made:
        await made.enter_async_context(places.kept(scope, "one"))
        await scope.commit("one", make_record(), "hd_1", None, expect=0)  # it is in the store now, and still coming

        class Meanwhile:
            """Its maker is done while the store is asked."""

            tenant, pointer = scope.tenant, scope.pointer

            async def full(self, most: int) -> bool:
                found = await scope.full(most)
                await made.aclose()
                return found

        async with places.kept(Meanwhile(), "two"):  # type: ignore[arg-type]
            pass


async def test_with_no_bound_the_store_is_not_asked() -> None:
    async with Places(0).kept(None, "one"):  # type: ignore[arg-type]
        pass
