"""`python -m service.secrets FOLDER`: makes the secrets that the service and its Redis share, where there are none yet.

    service/redis-password    for the service: its group may read them, nobody may write them
    service/store-key
    redis/users.acl           for Redis: who may do what. It holds a digest of the password only, so anybody may read it
    data/                     Redis's own; given to its user when nobody owns it yet

Each folder is a volume of its own, so that neither side sees the other's. A secret that was made is never replaced:
what it sealed would be lost. The rules for Redis are written anew each time. Standard library only; knows nothing of
the rest of the service.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path

REDIS_OWNER = 999, 1000  # uid and gid that Redis runs under; those of its official image
LEAST = 32  # characters of a secret
# Everything that service/stores/redis.py sends, and nothing that runs code, changes settings or reads other keys.
COMMANDS = (
    "ping",
    "info",
    "select",
    "get",
    "mget",
    "set",
    "del",
    "watch",
    "unwatch",
    "multi",
    "exec",
    "zadd",
    "zrem",
    "zrangebylex",
    "scan",
)


def write(path: Path, text: str, *, mode: int) -> None:
    """A new file that is on disk when this returns."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())


def keep(folder: Path) -> None:
    """Puts the names in a folder on disk, as `write` does with the content."""
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def secret(path: Path) -> str:
    """The secret in a file; made when there is no such file."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        write(draft, secrets.token_urlsafe(32), mode=0o440)
        with suppress(FileExistsError):  # somebody was faster: theirs it is
            path.hardlink_to(draft)
        draft.unlink()
        keep(path.parent)
    found = path.read_text().strip()
    if len(found) < LEAST:
        raise SystemExit(f"{path} holds no secret. It is not replaced, for what it sealed would be lost.")
    return found


def users(password: str) -> str:
    """The users of Redis: nobody without a name, one that may only ask whether it is up, and the service."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    allowed = " ".join(f"+{command}" for command in COMMANDS)
    return (
        # Off: nobody can be that user. But Redis reads its log as that user, and without these rights it silently
        # leaves out every transaction, which is all that we write (redis/redis#14541, valkey-io/valkey#3983).
        "user default off resetpass resetchannels ~* +@all\n"
        "user health on nopass resetkeys resetchannels -@all +ping\n"
        f"user fewshot on #{digest} ~fs:* resetchannels -@all {allowed}"
    )


def make(root: Path) -> None:
    secret(root / "service" / "store-key")
    rules = users(secret(root / "service" / "redis-password"))
    draft = root / "redis" / f"users.{secrets.token_hex(4)}"
    write(draft, rules, mode=0o444)
    draft.replace(root / "redis" / "users.acl")
    keep(root / "redis")
    data = root / "data"
    if os.geteuid() == 0 and data.stat().st_uid == 0:
        os.chown(data, *REDIS_OWNER)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    print("The secrets are in place.")
