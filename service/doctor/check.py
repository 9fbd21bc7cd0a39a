"""One finding of the doctor's. Knows nothing of what is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Literal["ok", "note", "warn", "fail"]
    found: str
    fix: str = ""
