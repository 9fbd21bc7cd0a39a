"""The store that the settings name: its folder, or its Redis. Knows nothing of who uses it."""

from __future__ import annotations

import fcntl
import sqlite3
import ssl
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from service.doctor.check import Check
from service.doctor.computer import nearest
from service.doctor.configured import masked

if TYPE_CHECKING:
    from service.settings import Settings


def data(settings: Settings, *, running: bool) -> Check:
    """The folder of the embedded store: writable, its key private, not held by another process."""
    folder = settings.data_dir
    there = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Check("data", "fail", f"{there}: {error.strerror}", "Make it writable, or set FEWSHOT_DATA_DIR.")
    if there != folder:
        return Check("data", "ok", f"{folder} will be made")
    key = folder / "store.key"
    if key.exists() and key.stat().st_mode & 0o077:
        return Check("data", "warn", f"{key} can be read by others", f"chmod 600 {key}")
    if (folder / "fewshot.sqlite3").exists() and not key.exists() and settings.store_key_file is None:
        found = f"{key} is missing: without it no stored task can be read"
        return Check("data", "fail", found, "Put it back, or set FEWSHOT_STORE_KEY_FILE, or choose another folder.")
    if not _locked(folder / "store.lock"):
        return _sealed(settings) or Check("data", "ok", f"{folder} is writable and not in use")
    if running:
        return Check("data", "ok", f"{folder} is in use by the running service")
    found = f"{folder} is in use by another process, and these settings start one more"
    return Check("data", "fail", found, "Stop the other service, or set FEWSHOT_DATA_DIR.")


def _sealed(settings: Settings) -> Check | None:
    """What is wrong with the key of a store that nobody uses; nothing, where that cannot be seen."""
    from service.stores import SealBroken, Sealer, StoreMisconfigured
    from service.stores import folder as store_folder

    file = settings.data_dir / "fewshot.sqlite3"
    if not file.exists():
        return None
    try:
        # The store makes no key here: there is one, or one is given.
        key = settings.secret(settings.store_key_file).encode() or store_folder.own_key(settings.data_dir, new=False)
        # Immutable: without that SQLite makes files of its own beside it. What a crash left in the log is not seen.
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True)) as db:
            (seal,) = db.execute("SELECT value FROM seal").fetchone()
        Sealer(key).open(seal, "store")
    except StoreMisconfigured as error:
        return Check("data", "fail", error.detail, "Put the key back that was there.")
    except SealBroken:
        return Check("data", "fail", f"{file} was sealed with another key", "Put the right key back.")
    except (sqlite3.Error, TypeError):
        return None
    return None


def _locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def redis(settings: Settings) -> Check:
    """Answers, keeps what it acknowledged, and throws no record away."""
    from redis import Redis, exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from service.stores import SealBroken, Sealer
    from service.stores.opening import PUBLIC_KEY
    from service.stores.redis import MARK

    login = {"username": settings.redis_user, "password": settings.secret(settings.redis_password_file)}
    where = masked(settings.redis_url)
    try:
        client = Redis.from_url(
            settings.redis_url,
            socket_timeout=max(1.0, settings.store_timeout_s),
            socket_connect_timeout=max(1.0, settings.store_timeout_s),
            retry=Retry(NoBackoff(), 0),
            **{name: value for name, value in login.items() if value},
        )
    except ValueError:
        return Check("redis", "fail", f"{where} is no address of a Redis", "It has the form redis://host:port/db.")
    with client:
        try:
            client.ping()
        except exceptions.AuthenticationError:
            found = f"{where} does not accept the password"
            return Check("redis", "fail", found, "Correct FEWSHOT_REDIS_PASSWORD_FILE and FEWSHOT_REDIS_USER.")
        except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
            secured = settings.redis_url.startswith("rediss:")
            if secured and (why := _refused_by_tls(error)):
                fix = "With a CA of your own add ?ssl_ca_certs=FILE; without TLS it is redis://."
                return Check("redis", "fail", f"no TLS with {where}: {why}", fix)
            found = f"{where} does not answer" + " to TLS" * secured
            return Check(
                "redis", "fail", found, "Start Redis, or correct FEWSHOT_REDIS_URL (with TLS it is rediss://)."
            )
        with suppress(exceptions.RedisError):
            mark = client.get(MARK)
            try:
                if isinstance(mark, bytes):  # there is none before the first start
                    Sealer(settings.secret(settings.store_key_file).encode() or PUBLIC_KEY).open(mark, "mark")
            except SealBroken:
                found = f"what {where} holds was sealed with another key, or with none"
                return Check("redis", "fail", found, "Set FEWSHOT_STORE_KEY_FILE to the right one.")
        try:
            told = {k: v for part in ("memory", "persistence", "replication") for k, v in client.info(part).items()}
        except exceptions.ResponseError:
            found = f"{where} answers and does not tell its settings"
            return Check("redis", "note", found, "See to it that it has appendonly, appendfsync always and noeviction.")
        try:
            synced = client.config_get("appendfsync", "no-appendfsync-on-rewrite")
        except exceptions.ResponseError:
            synced = {}  # it does not tell
    policy = told.get("maxmemory_policy", "")
    if policy.startswith("allkeys"):
        found = f"{where} has maxmemory-policy {policy}, which throws tasks away"
        return Check("redis", "fail", found, "CONFIG SET maxmemory-policy noeviction")
    lazily = synced.get("appendfsync", "always") != "always" or synced.get("no-appendfsync-on-rewrite") == "yes"
    if not told.get("aof_enabled") or lazily:
        found = f"{where} can lose tasks that were acknowledged"
        fix = "CONFIG SET appendonly yes, appendfsync always, no-appendfsync-on-rewrite no."
        return Check("redis", "warn", found, fix)
    if policy.startswith("volatile"):
        found = f"{where} has maxmemory-policy {policy}: when it is full, tasks with an end go before it"
        return Check("redis", "warn", found, "CONFIG SET maxmemory-policy noeviction")
    if told.get("role") == "slave":
        found = f"{where} is a replica of another Redis, and takes no changes"
        return Check("redis", "fail", found, "Set FEWSHOT_REDIS_URL to the one that is written to.")
    if not synced:
        found = f"{where} answers, keeps a log, and does not tell how it syncs it"
        return Check("redis", "note", found, "See to it that it has appendfsync always.")
    return Check("redis", "ok", f"{where} answers and keeps what it acknowledges")


def _refused_by_tls(error: BaseException | None) -> str:
    """What is wrong with TLS, if that is why there is no connection; else nothing."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return str(getattr(error, "verify_message", "") or error.reason or error)
        if isinstance(error, FileNotFoundError | PermissionError):
            return f"a file of certificates cannot be read ({error.strerror})"
        error = error.__cause__ or error.__context__
    return ""
