"""The images of a request: as many as fit, told by their place and name, and written as a body.

A support set or a list of images that is too large for one request is sent in several. Knows nothing of which requests
these are.
"""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from service.client import errors, pictures, values, wire
from service.client.pictures import File

OnBadImage: TypeAlias = Literal["skip", "fail"]
Loaded: TypeAlias = list[tuple[File, bytes]]

HEADROOM = 1000  # bytes of a body that are left free
ENCODED = 4 / 3  # base64
RESERVED = {*pictures.NEARLY, "query", "queries"}  # fields that are no class, or taken for such


class Waiting:
    """Examples that are still to be sent, taken from all classes in turn, so that every request has some of each."""

    def __init__(self, files: Sequence[File], limits: values.Limits, on_bad_image: OnBadImage):
        self.total = len(files)
        self._queues: dict[str | None, deque[tuple[File, bytes | None]]] = {}
        self._most = limits.max_examples
        awkward = any(wire.AWKWARD & set(file.label or "") for file in files)
        self._room = int((limits.max_body_bytes - HEADROOM) / (ENCODED if awkward else 1))
        self._positions = {id(file): index for index, file in enumerate(files)}
        self.rejected: list[values.Rejected] = []
        largest = min(limits.max_example_bytes, self._room - _cost(None, 0))
        for index, file in enumerate(files):
            if file.size <= largest:
                self._queues.setdefault(file.label, deque()).append((file, None))
                continue
            detail = f"The image has {file.size} bytes; the limit is {largest}."
            if on_bad_image == "fail":
                raise errors.TooLarge(f"{file.name}: {detail}", code="too_large", index=index)
            self.leave_out(file, "too_large", detail)
        for label in {file.label for file in files} - set(self._queues):
            if label is not None:
                raise errors.TooLarge(
                    f"All images of {label!r} are too large; the limit is {largest} bytes.", code="too_large"
                )

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    @property
    def fits_one_request(self) -> bool:
        costs = [_cost(file.label, file.size) for queue in self._queues.values() for file, _ in queue]
        return len(costs) <= self._most and sum(costs) <= self._room

    def take(self) -> Loaded:
        batch: Loaded = []
        room = self._room
        turn = deque(queue for queue in self._queues.values() if queue)
        while turn and len(batch) < self._most:
            queue = turn.popleft()
            file, data = queue[0]
            cost = _cost(file.label, file.size)
            if cost > room and batch:
                break
            queue.popleft()
            batch.append((file, file.load() if data is None else data))
            room -= cost
            if queue:
                turn.append(queue)
        # The service counts what it leaves out in this order.
        return sorted(batch, key=lambda pair: pair[0].label is None)

    def positions(self, batch: Loaded) -> list[int]:
        """Where the files stand among all that were given."""
        return [self._positions[id(file)] for file, _ in batch]

    def leave_out(self, file: File, code: str, detail: str) -> None:
        self.rejected.append(values.Rejected(self._positions[id(file)], code, detail, file.name))

    def has(self, label: str) -> bool:
        return bool(self._queues[label])

    def put_back(self, batch: Loaded) -> None:
        for file, data in reversed(batch):
            self._queues[file.label].appendleft((file, data))


@contextmanager
def naming(batch: Loaded, positions: Sequence[int]) -> Iterator[None]:
    """The service counts the images of one request; an error tells the place among all of them, and names the file."""
    try:
        yield
    except errors.FewshotError as error:
        index = error.index
        if index is not None and index in range(len(batch)):
            name = batch[index][0].name
            error.names(positions[index], None if name.startswith("[") else name)
        raise


def fitting(left: deque[File], *, most: int, largest_body: int) -> Loaded:
    """As many as fit into one request, and at least one."""
    batch: Loaded = []
    room = largest_body - HEADROOM
    while left and len(batch) < most and (not batch or _cost(None, left[0].size) <= room):
        file = left.popleft()
        room -= _cost(None, file.size)
        batch.append((file, file.load()))
    return batch


def _cost(label: str | None, size: int) -> int:
    return wire.PART_BYTES + 4 * len(label or "") + size


def encoded(files: Loaded, queries: Sequence[bytes] | None = None) -> tuple[bytes, dict[str, str]]:
    """A support set, and the questions of a call that has some: as a form, or as JSON when a label is awkward."""
    if not any(wire.AWKWARD & set(file.label or "") for file, _ in files):
        return wire.form(
            [(_field(file.label), data) for file, data in files] + [("query", data) for data in queries or ()]
        )
    document: dict[str, Any] = {
        "support": [{"label": file.label, "image": _text(data)} for file, data in files if file.label is not None],
        "unlabelled": [_text(data) for file, data in files if file.label is None],
    }
    if queries is not None:
        document["queries"] = [_text(data) for data in queries]
    return json.dumps(document).encode(), {"Content-Type": "application/json"}


def _field(label: str | None) -> str:
    if label is None:
        return pictures.UNLABELLED
    reserved = label.casefold() in RESERVED or label.startswith(pictures.PREFIX)
    return pictures.PREFIX + label if reserved else label


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
