"""How many images a caller may send in a minute, counted in this process.

The allowance of the request in hand lies in a context variable: the engine's use cases work within `spending`, and no
route has to hand anything on, so none can forget it. Windows are fixed: one begins with the first image after
the last has ended. Knows nothing of keys or HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from models.errors import FewshotError, OverQuota, TooLarge

WINDOW_S = 60


class Allowance:
    """What one caller may spend; kept between requests."""

    def __init__(self, quota: int, *, clock: Callable[[], float] = time.monotonic):
        """`quota` is the number of images in a window."""
        self.quota = quota
        self._clock = clock
        self._spent = 0
        self._ends = -math.inf

    def left(self) -> tuple[int, int]:
        """Images that may still be sent, and the seconds, rounded up, until all may be sent again."""
        remaining = self._ends - self._clock()
        if remaining <= 0:
            return self.quota, WINDOW_S
        return self.quota - self._spent, math.ceil(remaining)

    def spend(self, images: int) -> float:
        """Takes the images of one request, all or none; tells from which window. Raises OverQuota, or TooLarge for a
        request that no window has room for."""
        left, seconds = self.left()
        if images > self.quota:
            raise TooLarge(
                f"The request has {images} images, and this key's quota is {self.quota} a minute: send fewer at once."
            )
        if images > left:
            raise OverQuota(
                f"The request has {images} images, and of this key's quota of {self.quota} a minute {left} are left.",
                retry_after=seconds,
            )
        if self._ends <= self._clock():
            self._ends, self._spent = self._clock() + WINDOW_S, 0
        self._spent += images
        return self._ends

    def give_back(self, images: int, window: float) -> None:
        """What was spent on a request that was refused for something else; nothing once its window has ended."""
        if window == self._ends:
            self._spent -= images


current: ContextVar[Allowance | None] = ContextVar("allowance", default=None)


@contextmanager
def spending(images: int, *free: type[FewshotError]) -> Iterator[None]:
    """Takes images, and gives them back when the block is refused for what costs nothing. Raises OverQuota
    or TooLarge."""
    allowance = current.get()
    window = 0.0 if allowance is None else allowance.spend(images)
    try:
        yield
    except free:
        if allowance is not None:
            allowance.give_back(images, window)
        raise
