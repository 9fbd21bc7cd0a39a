"""deploy/floor.py: how steady it finds a machine to be."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest

from deploy import floor


def test_a_machine_that_is_taken_away_now_and_then_is_found_unsteady(monkeypatch: pytest.MonkeyPatch) -> None:
    number, dumps = itertools.count(), json.dumps

    def taken_away(value: Any) -> str:
        if next(number) % 40 == 10:
            time.sleep(0.05)
        return dumps(value)

    monkeypatch.setattr(json, "dumps", taken_away)
    half, most = floor.steadiness(0.6)
    assert 0 < half < 40 < most
