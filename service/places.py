"""How many tasks a tenant may have, kept also where many come at once. Knows nothing of what a task is."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from models.errors import TooLarge
from service.stores import Scope, SealBroken


class Places:
    """Places for new tasks, up to `most` of each tenant; 0: for as many as the store holds.

    Those that other replicas are making just now are not known here.
    """

    def __init__(self, most: int):
        self._most = most
        self._coming: Counter[tuple[str, str]] = Counter()  # new tasks that are being made, by tenant and name

    @asynccontextmanager
    async def kept(self, scope: Scope, task: str) -> AsyncIterator[None]:
        """Keeps a place for a task while it is made. Raises TooLarge where the tenant has as many as it may."""
        new = bool(self._most)
        if new:
            with suppress(SealBroken):  # damaged, and to be replaced
                new = await scope.pointer(task) is None
        if not new:
            yield
            return
        place = scope.tenant, task
        self._coming[place] += 1  # before the store is asked: of two that come at once one counts the other
        try:
            if await self._full(scope, task) and await scope.pointer(task) is None and await self._full(scope, task):
                raise TooLarge(f"A tenant may have {self._most} tasks (MAX_TASKS): delete one first.")
            yield
        finally:
            self._coming[place] -= 1
            if not self._coming[place]:
                del self._coming[place]

    async def _full(self, scope: Scope, task: str) -> bool:
        """Whether there are as many tasks as may be, with those that are coming: one of them may be there by now."""
        others = sum(tenant == scope.tenant and name != task for tenant, name in self._coming)
        return others >= self._most or await scope.full(self._most - others)
