"""What is wrong with this computer, its settings or its service, a line each, and what to do about it.

Looks and leaves nothing behind: no folder is made, no task is learned. Everything beyond the standard library is
imported inside the check that needs it, for that it is missing may be what there is to find. Knows nothing of how its
findings are printed.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import re
import shutil
import socket
import sqlite3
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from service.client import Client, Health
    from service.client.pictures import Support
    from service.settings import Settings

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "sample"
# Three texts of each of two kinds, and one to ask about.
TEXTS = {
    "code": [
        b"def add(a, b):\n    return a + b",
        b"for n in range(10):\n    print(n)",
        b"if x is None:\n    x = {}",
    ],
    "prose": [
        b"It was a dark night, and nobody was on the road.",
        b"She had walked to the sea with her brother.",
        b"In the morning the whole town was covered with snow.",
    ],
}
CODE = b"if not x:\n    break"
# What serving imports -> what it is called where packages come from.
PACKAGES = {
    "array_api_compat": "array-api-compat",
    "fastapi": "fastapi",
    "fastapi_offline": "fastapi-offline",
    "numpy": "numpy",
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "pydantic": "pydantic",
    "python_multipart": "python-multipart",
    "redis": "redis",
    "safetensors": "safetensors",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
}
LEAST_PYTHON = (3, 11)
LEAST_FREE, FEW_FREE = 100_000_000, 1_000_000_000  # bytes of a disk
ASK_S = 5.0  # for an answer of the service
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Literal["ok", "note", "warn", "fail"]
    found: str
    fix: str = ""


def wrong(checks: Iterable[Check]) -> bool:
    return any(check.status == "fail" for check in checks)


def examine(environment: Mapping[str, str], *, url: str | None = None, key: str | None = None) -> Iterator[Check]:
    """Every check in turn. `url` is a service that has to answer; without one, one that is running here is tried."""
    yield python()
    present = _safely("packages", partial(packages, environment))
    if present.status == "fail" and url:  # this computer may only ask
        yield Check("packages", "note", f"none to serve with here: {present.found}", present.fix)
        yield _safely("service", partial(service, url, key))
        return
    yield present
    if present.status == "fail":
        return
    yield clock()
    from service.settings import SettingsError, overlooked, read

    for text in overlooked(environment):
        yield Check("variables", "note", text, "Unset it where the service runs, if it was meant for that.")
    try:
        settings = read(environment)
    except SettingsError as error:
        yield Check("settings", "fail", str(error), "Correct or unset that variable.")
        settings = None
    if settings is not None:
        yield _effective(settings)
        yield _safely("secrets", partial(secrets, settings))
        yield _safely("artifact", partial(artifact, settings))
        free = _safely("port", partial(port, settings))
        yield free
        running = free.status == "ok" and free.found.startswith("fewshot")
        if settings.redis_url:
            yield _safely("redis", partial(redis, settings))
        else:
            yield _safely("data", partial(data, settings, running=running))
            yield _safely("disk", partial(disk, settings))
        if url is None and running:
            url = settings.address()
    if url is None:
        yield Check("service", "note", "none is running with these settings", "`fewshot serve` starts one.")
    else:
        yield _safely("service", partial(service, url, key))


def _safely(name: str, check: Callable[[], Check]) -> Check:
    """A check that meets something unforeseen has found something, too."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fail", f"could not be checked ({type(error).__name__}: {error})", "Look into that first.")


def python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] < LEAST_PYTHON:
        return Check("python", "fail", version, "Install Python 3.11 or later.")
    return Check("python", "ok", version)


def packages(environment: Mapping[str, str]) -> Check:
    """Imports them: one that is there and broken is found as well."""
    # With an extractor on torch, as on a GPU, onnxruntime is not needed.
    extractor = "torch" if environment.get("FEWSHOT_DEVICE") in ("cuda", "torch-cpu") else "onnxruntime"
    bad: dict[str, str] = {}
    for module, name in {**PACKAGES, extractor: extractor}.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            bad[name] = "missing" if isinstance(error, ModuleNotFoundError) else f"broken: {error}"
    if bad:
        found = ", ".join(f"{name} ({why})" for name, why in bad.items())
        return Check("packages", "fail", found, "In the project's folder: pip install '.[serve]'")
    versions = (f"{name} {metadata.version(name)}" for name in ("fastapi", "numpy", extractor))
    return Check("packages", "ok", ", ".join(versions))


def clock() -> Check:
    """Keys and tasks that end, end by it."""
    newest = max(path.stat().st_mtime for path in HERE.glob("*.py"))
    behind = newest - time.time()
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if behind > 3600:
        return Check("clock", "warn", f"{now}, which is before this program was installed", "Set the clock.")
    return Check("clock", "ok", now)


def in_force(environment: Mapping[str, str]) -> dict[str, Any]:
    """Every setting by its variable, secrets masked; empty when they cannot be read."""
    from service.settings import PREFIX, SettingsError, read

    try:
        settings = read(environment)
    except SettingsError:
        return {}
    return {PREFIX + name.upper(): _masked(getattr(settings, name)) for name in type(settings).model_fields}


def _masked(value: object) -> Any:
    """Passwords inside addresses; every other secret is in a file, and the setting its path."""
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str) or "://" not in value:
        return value
    # Up to the last @, for a password may hold one, or a slash; in an address of a socket it stands behind the path.
    return re.sub(r"(?<=://).+(?=@)", "***", re.sub(r"([?&]\w*password=)[^&]*", r"\1***", value))


def _effective(settings: Settings) -> Check:
    defaults = type(settings)()
    names = [name for name in type(settings).model_fields if getattr(settings, name) != getattr(defaults, name)]
    given = ", ".join(f"FEWSHOT_{name.upper()}={_masked(getattr(settings, name))}" for name in names)
    return Check("settings", "ok", given or "all as they come")


def secrets(settings: Settings) -> Check:
    """Files that hold secrets: there, readable, and not for everybody."""
    from service.settings import SettingsError
    from service.stores.opening import LEAST_KEY

    files = {name: getattr(settings, name) for name in type(settings).model_fields if name.endswith("_file")}
    given = {name: path for name, path in files.items() if path is not None}
    for name, path in given.items():
        try:
            if name == "keys_file":
                path.read_bytes()
            elif len(settings.secret(path).encode()) < LEAST_KEY and name == "store_key_file":
                found = f"{path} holds no key of at least {LEAST_KEY} characters"
                return Check(
                    "secrets", "fail", found, f"Put the key back; for a new store: openssl rand -base64 32 > {path}"
                )
            mode = path.stat().st_mode & 0o777
        except OSError as error:
            return Check("secrets", "fail", f"FEWSHOT_{name.upper()}: {path}: {error.strerror}", "Make it readable.")
        except SettingsError as error:
            return Check("secrets", "fail", f"FEWSHOT_{name.upper()}: {error}", "Make it a readable line of text.")
        if mode & 0o027:
            return _open(path, mode)
    if settings.keys_file is not None:
        from service import keys

        live = [key for key in keys.load(settings.keys_file).values() if key.state(datetime.now(UTC)) == "live"]
        keys.load_pepper(settings.keys_file)
        pepper = keys.pepper_file(settings.keys_file)
        if (mode := pepper.stat().st_mode & 0o777) & 0o027:
            return _open(pepper, mode)
        if not live:
            found = f"{settings.keys_file} has no live key: nobody is let in"
            return Check("secrets", "warn", found, "fewshot keys create --tenant NAME --scopes adapt,classify")
    elif settings.host not in LOOPBACK:
        found = f"no keys, and FEWSHOT_HOST={settings.host}: whoever reaches the port may use the service"
        return Check("secrets", "warn", found, "Make a key with `fewshot keys create`, or listen on 127.0.0.1.")
    return Check("secrets", "ok", ", ".join(str(path) for path in given.values()) or "none are configured")


def _open(path: Path, mode: int) -> Check:
    found = f"{path} has mode {mode:o}: others may read it, or its group write it"
    return Check("secrets", "warn", found, f"chmod 600 {path}")


def artifact(settings: Settings) -> Check:
    """Loads it and runs its probe, as a start does."""
    from models.artifact import Artifact
    from models.errors import ArtifactInvalid
    from models.extractor import best_device, load_extractor
    from service.precision import automatic

    try:
        loaded = Artifact.load(settings.artifact)
        loaded.learners()
        if settings.views > 1 and loaded.kind != "image":
            return Check("artifact", "fail", f"it reads {loaded.kind}s, which have no views", "Unset FEWSHOT_VIEWS.")
        device = best_device(loaded) if settings.device == "auto" else settings.device
        precision: str = settings.precision
        if precision == "auto":
            precision = automatic(loaded, settings.data_dir, device=device, keep=False)
        extractor = load_extractor(loaded, device=device, precision=precision)
        difference = loaded.check(extractor, precision=precision)
    except ArtifactInvalid as error:
        fix = "FEWSHOT_ARTIFACT names a folder that `python -m training export` made; unset it for the one that ships."
        return Check("artifact", "fail", error.detail, fix)
    if settings.default_method and settings.default_method not in loaded.manifest.methods:
        found = f"it has no method {settings.default_method!r}, only {', '.join(loaded.manifest.methods)}"
        return Check("artifact", "fail", found, "Correct FEWSHOT_DEFAULT_METHOD.")
    return Check("artifact", "ok", f"{loaded.manifest.name} on {device}, {precision}, probe within {difference:.0e}")


def port(settings: Settings) -> Check:
    """Free, or held by a service of ours."""
    from service.settings import spelled

    where = f"{spelled(settings.host)}:{settings.port}"
    if settings.port == 0:
        return Check("port", "ok", "any free one")
    try:
        for address in socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM):
            _listen(address)
    except socket.gaierror:
        return Check("port", "fail", f"{settings.host} is no address", "Correct FEWSHOT_HOST.")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            health = _health(settings.address())
            if health is not None:
                return Check("port", "ok", f"fewshot is running on {where}")
            found = f"{where} is taken by another program"
            return Check("port", "fail", found, "Choose another with FEWSHOT_PORT, or stop that program.")
        fix = (
            "Ports below 1024 need privileges: choose another."
            if error.errno == errno.EACCES
            else "Correct FEWSHOT_HOST."
        )
        return Check("port", "fail", f"{where}: {error.strerror}", fix)
    return Check("port", "ok", f"{where} is free")


def _listen(found: tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]) -> None:
    """For a moment, as the service does: on IPv6 alone where the address is one of it."""
    family, kind, proto, _, address = found
    with socket.socket(family, kind, proto) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)


def _health(url: str) -> Health | None:
    from service.client import Client, FewshotError

    try:
        with Client(url, timeout=ASK_S, retries=0) as client:
            return client.health()
    except FewshotError:
        return None


def data(settings: Settings, *, running: bool) -> Check:
    """The folder of the embedded store: writable, its key private, not held by another process."""
    folder = settings.data_dir
    there = _nearest(folder)
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


def _nearest(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    folder = folder.absolute() if not folder.exists() else folder
    while not folder.exists():
        folder = folder.parent
    return folder


def _locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def disk(settings: Settings) -> Check:
    place = _nearest(settings.data_dir)
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free for {settings.data_dir}"
    if free < LEAST_FREE:
        return Check("disk", "fail", found, "Make room, or set FEWSHOT_DATA_DIR to another disk.")
    return Check("disk", "warn" if free < FEW_FREE else "ok", found, "Make room." if free < FEW_FREE else "")


def redis(settings: Settings) -> Check:
    """Answers, keeps what it acknowledged, and throws no record away."""
    from redis import Redis, exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from service.stores import SealBroken, Sealer
    from service.stores.opening import PUBLIC_KEY
    from service.stores.redis import MARK

    login = {"username": settings.redis_user, "password": settings.secret(settings.redis_password_file)}
    where = _masked(settings.redis_url)
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


def service(url: str, key: str | None) -> Check:
    """Asks it for something: is it there, is it ready, and does it tell two letters apart, or two kinds of text?"""
    from service.client import Client, FewshotError, Forbidden, Unauthorized

    try:
        with Client(url, key, timeout=4 * ASK_S, retries=0) as client:
            health = client.health()
            if health.status == "unavailable":
                text = f"{client.base_url} has stopped working on images"
                return Check("service", "fail", text, "Restart it; its log says why.")
            if health.status == "stopping":
                return Check("service", "warn", f"{client.base_url} is being stopped", "Ask the one that follows it.")
            kind = client.artifact().input["kind"]
            right, found, took_ms = _round_trip(client, kind)
            if health.status != "ok":
                return Check("service", "warn", f"{client.base_url} has lost its store", "See to Redis or the disk.")
    except Unauthorized as error:
        return Check("service", "fail", f"{url}: {error.detail}", "Set FEWSHOT_KEY, or use --key.")
    except Forbidden as error:
        return Check("service", "note", f"{url} is up; {error.detail}", "Its round trip needs a key with more scopes.")
    except (FewshotError, ValueError) as error:
        return Check("service", "fail", str(error), "Correct --url or FEWSHOT_URL, or start it with `fewshot serve`.")
    sort, learned = (
        ("texts", "kinds of text and knew another") if kind == "text" else ("pictures", "letters and knew a third")
    )
    if found != right:
        text = f"{url} took {right} for {found!r}"
        return Check("service", "warn", text, f"Is its artifact made for other {sort} than these?")
    return Check("service", "ok", f"{url} learned two {learned} in {took_ms:.0f} ms")


def _round_trip(client: Client, kind: str) -> tuple[str, str | None, float]:
    """What it is asked about in one call that stores nothing, what it takes that for, and milliseconds."""
    support: Support = TEXTS
    right, query = "code", CODE
    if kind != "text":
        support = {label: [SAMPLE / label / f"{n}.png" for n in (1, 2, 3)] for label in ("alpha", "theta")}
        right, query = "theta", (SAMPLE / "theta" / "9.png").read_bytes()
    start = time.perf_counter()
    found = client.classify_once(support, query, reject="off")
    return right, found[0].label, (time.perf_counter() - start) * 1e3
