"""What a program flushes to disk and what it names, in order: the one that a power cut asks for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The list that it is noted in, as "flush NAME" and "name NAME"; what is random of a name is a *."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to tell files by")
    done: list[str] = []
    fsync = os.fsync

    def flush(file: int) -> None:
        done.append("flush " + _plain(Path(os.readlink(f"/proc/self/fd/{file}")).name))
        fsync(file)

    def naming(how: str) -> None:
        real = getattr(os, how)

        def name(source: Any, target: Any, **more: Any) -> None:
            done.append("name " + _plain(Path(target).name))
            real(source, target, **more)

        monkeypatch.setattr(os, how, name)

    monkeypatch.setattr(os, "fsync", flush)
    for how in ("rename", "replace", "link"):
        naming(how)
    return done


def _plain(name: str) -> str:
    return re.sub(r"\.[0-9a-f]{8}(?![^.])", ".*", name)
