"""The value passed to learners."""

from __future__ import annotations

from dataclasses import dataclass

from models.arrays import Array
from models.errors import InvalidSupport


@dataclass(frozen=True, slots=True, eq=False)
class Support:
    """The labelled examples of one task, and perhaps some without labels."""

    features: Array  # [n, dim]
    labels: Array  # [n] integers in 0..way-1
    way: int
    unlabelled: Array | None = None  # [u, dim]

    def __post_init__(self) -> None:
        """Raises InvalidSupport for fewer than two classes, or labels with a gap."""
        if self.way < 2:
            raise InvalidSupport("A task needs at least two classes.")
        seen = {int(label) for label in self.labels}
        if seen != set(range(self.way)):
            raise InvalidSupport(f"Labels must be 0..{self.way - 1} with no gap.")
