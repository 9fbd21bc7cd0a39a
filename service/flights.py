"""Work of coroutines that is shared, or done side by side. Knows nothing of what the work is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from service.callers import has_left, stays

T = TypeVar("T")
U = TypeVar("U")


class Flights:
    """Pieces of work that are under way, by key. Use on one event loop."""

    def __init__(self) -> None:
        self._flights: dict[tuple[str, ...], asyncio.Task[Any]] = {}

    def once(self, key: tuple[str, ...], work: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        """Twins share one piece of work, and a caller who leaves does not end it for the others.

        It is found or begun in the call itself: what the caller knew of its result just before still holds.
        """
        flight = self._flights.get(key)
        if flight is None:

            async def fly() -> T:
                has_left.set(stays)  # the work is a twin's as much as of who came first
                return await work()

            flight = self._flights[key] = asyncio.create_task(fly())

            def landed(done: asyncio.Task[Any]) -> None:
                if self._flights.get(key) is done:
                    del self._flights[key]
                if not done.cancelled():
                    done.exception()  # seen, even if every caller has left

            flight.add_done_callback(landed)
        return asyncio.shield(flight)

    def under_way(self, key: tuple[str, ...]) -> bool:
        """For who would first see whether it is done: it may be by the time that they are told that it is not."""
        return key in self._flights

    def leave_alone(self, *start: str) -> None:
        """Who comes from now on shares no work under way whose key starts so; who waits for it already still does."""
        for key in [key for key in self._flights if key[: len(start)] == start]:
            del self._flights[key]


async def both(first: Awaitable[T], second: Awaitable[U]) -> tuple[T, U]:
    """Awaits two at once. When one fails, the other is cancelled and its own failure, if any, is nobody's concern."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        one, other = await asyncio.gather(*tasks)
        return one, other
    finally:
        for task in tasks:
            task.cancel()
