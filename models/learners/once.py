"""What of a learner's work no task changes: done once for one that serves, anew each time for one that is trained."""

from __future__ import annotations

from typing import Any, TypeVar

L = TypeVar("L", bound="Once")


class Once:
    """No field is added, so whoever makes a learner anew of its arrays, in another precision or elsewhere, may."""

    __slots__ = ("_done",)

    def work_out(self) -> Any:
        """From the learned arrays alone."""
        raise NotImplementedError

    @property
    def worked_out(self) -> Any:
        return self._done if hasattr(self, "_done") else self.work_out()

    def ready(self: L) -> L:
        """The same learner for many tasks. Its arrays must not change any more."""
        object.__setattr__(self, "_done", self.work_out())
        return self
