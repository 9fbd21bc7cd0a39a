"""The folder of the embedded store: locked against other processes, with the key that seals what lies in it.

Knows nothing of SQLite.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO

from service.stores import StoreMisconfigured

KEY = "store.key"


def lock(folder: Path) -> IO[str]:
    """Makes the folder and takes it; closing the file gives it back, and so does the end of the process."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = (folder / "store.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StoreMisconfigured(f"Another process uses the folder {folder}.") from None
    return file


def has_key(folder: Path) -> bool:
    return (folder / KEY).exists()


def make_private(path: Path) -> None:
    """Makes an empty file that nobody else can read, unless there is one."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def keep_private(path: Path) -> None:
    """Keeps others from reading a file, where it is ours and there is one; where that fails, it stays as it is."""
    with suppress(OSError):
        at = path.stat()
        if at.st_uid == os.geteuid() and at.st_mode & 0o077:
            path.chmod(0o600)


def own_key(folder: Path, *, new: bool) -> bytes:
    """The key that lies beside the data; made when the folder is new."""
    path = folder / KEY
    if not path.exists():
        if not new:
            raise StoreMisconfigured(f"{path} is missing: without it no stored task can be read.")
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_bytes(32).hex())  # text, so that it can also be given as a secret file
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
    key = path.read_bytes().strip()
    if len(key) < 16:
        raise StoreMisconfigured(f"{path} holds no key.")
    return key
