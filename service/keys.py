"""API keys: made, listed and revoked on the command line, checked by a running service.

A key is `fsk_<env>_<id>_<secret>`, a form that a scanner for secrets finds. It belongs to one tenant and has scopes.
The keys file holds all of it but the secret; of that a SHA-256, keyed with a pepper that lies in a file of its own
beside it, so that neither file alone tells whether a guess is right. A secret has 256 random bits: there is nothing to
guess, and nothing a slow hash would add. Knows nothing of HTTP, nor of what a scope opens.
"""

from __future__ import annotations

import argparse
import fcntl
import hmac
import json
import logging
import os
import re
import secrets
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from models.errors import Unauthorized
from service.secrets import keep, write
from service.settings import SettingsError, read

log = logging.getLogger(__name__)
Permission = Literal["adapt", "classify", "admin"]
PERMISSIONS: tuple[Permission, ...] = ("adapt", "classify", "admin")
FORMAT = "fewshot-keys-1"
CHECK_S = 1.0  # a running service looks at the file at most this often
# 12 characters of 36 name a key, 43 of 62 are a little more than 256 bits. Underscores stand between the parts only.
ID = string.ascii_lowercase + string.digits, 12
SECRET = string.ascii_letters + string.digits, 43
TOKEN = re.compile(rb"fsk_[a-z0-9]{1,16}_([a-z0-9]{12})_[A-Za-z0-9]{43}")
NOBODY = "0" * 64  # the digest that a secret is compared with when there is no key of that id


class KeysUnusable(SettingsError):
    """The keys file or its pepper cannot be read or written; the message names the file."""


class Key(BaseModel):
    """A key as it is kept, without its secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9]{12}$")
    env: str = Field(pattern=r"^[a-z0-9]{1,16}$")
    tenant: str = Field(pattern=r"^[a-z0-9-]{1,32}$")
    scopes: tuple[Permission, ...] = Field(min_length=1)
    name: str = Field("", max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    quota: int | None = Field(None, ge=1, description="images a minute; none = no limit")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")

    def state(self, now: datetime) -> Literal["live", "revoked", "expired"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "live"


class KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fewshot-keys-1"]
    keys: tuple[Key, ...]


def digest_of(token: bytes, pepper: bytes) -> str:
    """Of the whole key, so that a digest is worth nothing under another id."""
    return hmac.digest(pepper, token, "sha256").hex()


def load(path: Path) -> dict[str, Key]:
    """The keys of a file by id. Raises KeysUnusable."""
    try:
        found = KeysFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KeysUnusable(f"The keys file {path} cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KeysUnusable(f"The keys file {path} is damaged: {where + ': ' if where else ''}{first['msg']}.") from None
    keys = {key.id: key for key in found.keys}
    if len(keys) < len(found.keys):
        raise KeysUnusable(f"The keys file {path} is damaged: two keys have the same id.")
    return keys


def pepper_file(path: Path) -> Path:
    return path.with_name(path.name + ".pepper")


def load_pepper(path: Path) -> bytes:
    """The pepper beside a keys file. Raises KeysUnusable."""
    beside = pepper_file(path)
    try:
        return _pepper(beside, beside.read_bytes())
    except OSError as error:
        raise KeysUnusable(f"{beside} cannot be read ({error.strerror}); no key can be checked without it.") from None


def _pepper(beside: Path, text: bytes) -> bytes:
    try:
        found = bytes.fromhex(text.decode())
    except ValueError:
        found = b""
    if len(found) != 32:
        raise KeysUnusable(f"{beside} holds no pepper; it is not replaced, for every key would be lost.")
    return found


class Keyring:
    """The keys of a file as it is now. A file that cannot be read after the start leaves the keys as they were."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic):
        """Raises KeysUnusable."""
        self._path = path
        self._clock = clock
        self._load()
        self._next = clock() + CHECK_S
        self._told = self._seen  # the state of the file whose damage has been logged

    def check(self, token: bytes) -> Key:
        """The key that was presented. Raises Unauthorized."""
        self._refresh()
        form = TOKEN.fullmatch(token)
        key = self._keys.get(form[1].decode()) if form else None
        # Whether or not there is a key of that id, the same work is done.
        mac = self._mac.copy()
        mac.update(token)
        same = hmac.compare_digest(mac.hexdigest(), key.digest if key else NOBODY)
        if key is None or not same:
            raise Unauthorized("There is no such key.")
        if key.revoked is not None or key.expires is not None:
            state = key.state(datetime.now(UTC))
            if state != "live":
                raise Unauthorized("This key was revoked." if state == "revoked" else "This key has expired.")
        return key

    def _load(self) -> None:
        # The state comes first: a change that comes in between is found next time.
        state, keys, pepper = self._state(), load(self._path), load_pepper(self._path)
        # Begun once and copied: hmac.digest would let go of the interpreter, and under load it is a while until the
        # event loop gets it back.
        self._seen, self._keys, self._mac = state, keys, hmac.new(pepper, digestmod="sha256")

    def _state(self) -> object:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _refresh(self) -> None:
        now = self._clock()
        if now < self._next:
            return
        self._next = now + CHECK_S
        state = self._state()
        if state == self._seen:
            return
        try:
            self._load()  # small and rare enough for the event loop
        except KeysUnusable as error:
            if state != self._told:
                log.error("%s The keys that were read before stay in force.", error)
            self._told = state
            return
        log.info("The keys file was read again (keys in it: %d).", len(self._keys))


@contextmanager
def _changing(path: Path) -> Iterator[tuple[dict[str, Key], bytes]]:
    """The keys and the pepper, while nobody else changes them; the keys as they are at the end are written."""
    beside = pepper_file(path)
    # The pepper is the lock too: it is made once and never replaced.
    with open(os.open(beside, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        if len(text) < 64 and not path.exists():  # new, or cut short when it was
            text = secrets.token_hex(32).encode()
            file.seek(0)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            _give(beside, like=path.parent)
        keys = load(path) if path.exists() else {}
        yield keys, _pepper(beside, text)
        rows = [key.model_dump(mode="json", exclude_none=True) for key in keys.values()]
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            write(draft, json.dumps({"format": FORMAT, "keys": rows}, indent=1), mode=0o600)
            _give(draft, like=path if path.exists() else path.parent)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        keep(path.parent)


def _give(path: Path, *, like: Path) -> None:
    """What root writes stays readable for the service, which is somebody else."""
    if os.geteuid() == 0:
        owner = like.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _random(kind: tuple[str, int]) -> str:
    alphabet, length = kind
    return "".join(secrets.choice(alphabet) for _ in range(length))


def create(
    path: Path,
    *,
    tenant: str,
    scopes: Sequence[str],
    name: str = "",
    env: str = "live",
    expires: datetime | None = None,
    quota: int | None = None,
) -> tuple[Key, str]:
    """A new key, on disk when this returns, and its spelling, which is kept nowhere. Raises KeysUnusable."""
    with _changing(path) as (keys, pepper):
        id = _random(ID)
        token = f"fsk_{env}_{id}_{_random(SECRET)}"
        try:
            key = Key(
                id=id,
                env=env,
                tenant=tenant,
                scopes=tuple(scope for scope in PERMISSIONS if scope in scopes),
                name=name,
                created=datetime.now(UTC).replace(microsecond=0),
                expires=expires,
                quota=quota,
                digest=digest_of(token.encode(), pepper),
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise KeysUnusable(f"{first['loc'][0]}: {first['msg']}.") from None
        keys[id] = key
    return key, token


def revoke(path: Path, id: str) -> Key:
    """The key, which no service takes any more a second after this returned. Raises KeysUnusable."""
    found = re.fullmatch(r"(?:fsk_[a-z0-9]{1,16}_)?([a-z0-9]{12})(?:_.*)?", id)
    if found is None:  # not repeated here: it may be a key with a typing error
        raise KeysUnusable("An id is the 12 characters after fsk_<env>_; `list` shows those of all keys.")
    id = found[1]
    with _changing(path) as (keys, _):
        if id not in keys:
            raise KeysUnusable(f"{path} has no key {id}.")
        if keys[id].revoked is None:
            keys[id] = keys[id].model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
        return keys[id]


def main(arguments: Sequence[str]) -> int:
    """The command line, without the name of the command. The key itself goes to stdout alone, words to stderr."""
    parser = argparse.ArgumentParser(prog="fewshot keys", description="Makes, lists and revokes API keys.")
    parser.add_argument("--file", type=Path, help="the keys file (default: FEWSHOT_KEYS_FILE)")
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("create", help="make a key and print it, once")
    new.add_argument("--tenant", required=True, help="whose tasks it sees: 1 to 32 of a-z, 0-9 and '-'")
    new.add_argument("--scopes", required=True, type=_scopes, help="of adapt, classify and admin, with commas between")
    new.add_argument("--name", default="", help="a note on who has it")
    new.add_argument("--env", default="live", help="second part of the key, such as live or test (default: live)")
    new.add_argument("--expires", type=_moment, help="a date such as 2030-01-31, in UTC, or days such as 90d")
    new.add_argument("--quota", type=int, help="images a minute (default: no limit)")
    commands.add_parser("list", help="show every key, without secrets")
    old = commands.add_parser("revoke", help="end a key at once")
    old.add_argument("id", help="the 12 characters after fsk_<env>_, or the whole key")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    try:
        path = given.file or read().keys_file
        if path is None:
            raise KeysUnusable("Set FEWSHOT_KEYS_FILE, or name the keys file with --file before the command.")
        if given.command == "create":
            key, token = create(
                path,
                tenant=given.tenant,
                scopes=given.scopes,
                name=given.name,
                env=given.env,
                expires=given.expires,
                quota=given.quota,
            )
            print(token)
            print(f"This is the only time that the key is shown. `revoke {key.id}` ends it.", file=sys.stderr)
        elif given.command == "revoke":
            key = revoke(path, given.id)
            print(f"The key {key.id} of {key.tenant} is revoked.", file=sys.stderr)
        else:
            print(table(load(path).values()))
    except SettingsError as error:
        print(f"fewshot keys: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fewshot keys: {error.filename or path}: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


def table(keys: Iterable[Key]) -> str:
    now = datetime.now(UTC)
    rows = [("id", "tenant", "scopes", "state", "quota", "created", "expires", "name")]
    for key in keys:
        rows.append(
            (
                key.id,
                key.tenant,
                ",".join(key.scopes),
                key.state(now),
                "-" if key.quota is None else str(key.quota),
                f"{key.created:%Y-%m-%d}",
                "-" if key.expires is None else f"{key.expires:%Y-%m-%d}",
                key.name,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _scopes(text: str) -> list[str]:
    scopes = text.split(",")
    for scope in scopes:
        if scope not in PERMISSIONS:
            raise argparse.ArgumentTypeError(f"{scope!r} is no scope; scopes are {', '.join(PERMISSIONS)}")
    return scopes


def _moment(text: str) -> datetime:
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        days = re.fullmatch(r"(\d{1,5})d", text)
        moment = now + timedelta(days=int(days[1])) if days else datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date such as 2030-01-31 and no days such as 90d") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment <= now:
        raise argparse.ArgumentTypeError(f"{text} is over already")
    return moment


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
