"""One tenant's values as sealed bytes: how every store writes them and reads them back.

Each value is sealed for the tenant, its kind and its name, so one that was moved, swapped or left to rot is noticed.
Knows nothing of where the bytes are kept.
"""

from __future__ import annotations

import logging

from models.errors import VersionConflict
from models.head import Head, HeadInvalid
from service.stores import Pointer, Record, SealBroken, Sealer

log = logging.getLogger(__name__)


def next_version(current: int, expect: int | None) -> int:
    """The version that follows `current` (0: no task). Raises VersionConflict unless it is the expected one."""
    if expect is not None and expect != current:
        raise VersionConflict(f"The task is at version {current}, not {expect}.")
    return current + 1


class Sealed:
    def __init__(self, sealer: Sealer, tenant: str):
        self._sealer = sealer
        self._tenant = tenant

    def seal_pointer(self, task: str, pointer: Pointer) -> bytes:
        return self._sealer.seal(pointer.to_bytes(), self._tenant, "pointer", task)

    def open_pointer(self, task: str, data: bytes) -> Pointer:
        return Pointer.from_bytes(self._sealer.open(data, self._tenant, "pointer", task))

    def list_pointer(self, task: str, data: bytes) -> Pointer | None:
        """For listings, which one damaged task must not end: None, and a line in the log."""
        try:
            return self.open_pointer(task, data)
        except SealBroken:
            log.warning("The pointer of task %s is damaged; the task is left out of the listing.", task)
            return None

    def seal_record(self, task: str, version: int, *, record: Record) -> bytes:
        return self._sealer.seal(record.to_bytes(), self._tenant, "record", task, str(version))

    def open_record(self, task: str, version: int, *, data: bytes) -> Record:
        return Record.from_bytes(self._sealer.open(data, self._tenant, "record", task, str(version)))

    def seal_head(self, head_id: str, head: Head) -> bytes:
        return self._sealer.seal(head.to_bytes(), self._tenant, "head", head_id)

    def open_head(self, head_id: str, data: bytes | None) -> Head | None:
        """None when there is none, and when it is damaged: it will be made again from its record."""
        try:
            return None if data is None else Head.from_bytes(self._sealer.open(data, self._tenant, "head", head_id))
        except (SealBroken, HeadInvalid):
            log.warning("The cached head %s is damaged and counts as gone.", head_id)
            return None
