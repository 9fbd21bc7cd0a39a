"""What operating systems and editors leave in folders and archives beside what somebody put there.

Knows nothing of what the other files are.
"""

from __future__ import annotations

from pathlib import PurePath

JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini")


def left_behind(path: PurePath) -> bool:
    """Whether a path, seen from the folder or archive that was given, is of no use to anybody, or hidden."""
    return any(part in JUNK or part.startswith(".") for part in path.parts)
