"""service/secrets.py: what it writes, for whom, and what its rules allow at a real Redis with compose's options."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from models.errors import VersionConflict
from service import secrets
from service.stores import Pointer
from service.stores.redis import RedisStore
from tests import flushed
from tests.deploy import ROOT
from tests.redis_server import RedisServer
from tests.service.stores.values import commit, make_head, same

PARTS = ("service", "redis", "data")


def volumes(root: Path) -> Path:
    for name in PARTS:
        (root / name).mkdir(parents=True)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The volumes, new."""
    return volumes(tmp_path / "volumes")


def text(path: Path) -> str:
    return path.read_text().strip()


def test_two_folders_get_different_secrets(folder: Path, tmp_path: Path) -> None:
    other = volumes(tmp_path / "other")
    secrets.make(folder)
    secrets.make(other)
    found = [text(root / "service" / name) for root in (folder, other) for name in ("redis-password", "store-key")]
    assert len(set(found)) == 4
    assert all(len(value) >= 32 for value in found)


def test_each_side_gets_what_it_needs_and_no_more(folder: Path) -> None:
    secrets.make(folder)
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(found) == {"service/redis-password", "service/store-key", "redis/users.acl"}
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in found.items()}
    assert modes == {"service/redis-password": 0o440, "service/store-key": 0o440, "redis/users.acl": 0o444}
    rules = text(found["redis/users.acl"])
    assert text(found["service/redis-password"]) not in rules
    assert hashlib.sha256(text(found["service/redis-password"]).encode()).hexdigest() in rules


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_new_data_folder_is_given_to_redis_and_one_that_has_an_owner_is_left_alone(folder: Path) -> None:
    secrets.make(folder)
    assert ((folder / "data").stat().st_uid, (folder / "data").stat().st_gid) == secrets.REDIS_OWNER
    os.chown(folder / "data", 4321, 4321)
    secrets.make(folder)
    assert (folder / "data").stat().st_uid == 4321


def test_secrets_stay_and_rules_follow_the_password(folder: Path) -> None:
    secrets.make(folder)
    before = {path: (text(path), path.stat().st_ino) for path in (folder / "service").iterdir()}
    rules = text(folder / "redis" / "users.acl")
    (folder / "redis" / "users.acl").unlink()
    secrets.make(folder)
    assert {path: (text(path), path.stat().st_ino) for path in (folder / "service").iterdir()} == before
    assert text(folder / "redis" / "users.acl") == rules


def test_secrets_and_rules_outlive_a_power_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = flushed.noted(monkeypatch)
    secrets.make(folder)
    made = [
        part
        for name in ("store-key", "redis-password")
        for part in (f"flush {name}.*", f"name {name}", "flush service")
    ]
    assert done == [*made, "flush users.*", "name users.acl", "flush redis"]


def test_makers_that_come_at_once_agree(folder: Path) -> None:
    makers = [
        subprocess.Popen([sys.executable, "-m", "service.secrets", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL)
        for _ in range(4)
    ]
    assert [maker.wait(30) for maker in makers] == [0] * 4
    password = text(folder / "service" / "redis-password")
    assert text(folder / "redis" / "users.acl") == secrets.users(password)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3


@pytest.mark.parametrize("damage", ["", "short"])
def test_a_damaged_secret_is_reported_and_not_replaced(folder: Path, damage: str) -> None:
    (folder / "service" / "store-key").write_text(damage)
    with pytest.raises(SystemExit, match="store-key holds no secret"):
        secrets.make(folder)
    assert text(folder / "service" / "store-key") == damage


def test_it_prints_no_secret(folder: Path) -> None:
    command = [sys.executable, "-m", "service.secrets", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for path in (folder / "service").iterdir():
        assert text(path) not in done.stdout + done.stderr
    assert done.stderr == ""


def test_it_runs_without_anything_installed(folder: Path) -> None:
    """The image it runs in has nothing but Python."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import runpy, sys; sys.path[:0] = sys.argv.pop(1).split();"
        "runpy.run_module('service.secrets', run_name='__main__')",
        str(ROOT),
        str(folder),
    ]
    assert subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, str]]:
    """A Redis with compose's options and the rules as made, and an inspector of our own; and its password."""
    root = tmp_path_factory.mktemp("guarded")
    folder = volumes(root / "volumes")
    secrets.make(folder)
    with (root / "users.acl").open("w") as rules:
        rules.write((folder / "redis" / "users.acl").read_text() + "user inspector on nopass ~* &* +@all\n")
    places = {"/rules/users.acl": str(root / "users.acl"), "/data": str(root)}
    command = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["redis"]["command"]
    with RedisServer(root, *(places.get(option, option) for option in command[1:])) as server:
        yield server, text(folder / "service" / "redis-password")


@contextlib.contextmanager
def asking(server: RedisServer, user: str | None, password: str | None) -> Iterator[redis.Redis]:
    once = Retry(NoBackoff(), 0)
    with contextlib.closing(redis.Redis(port=server.port, username=user, password=password, retry=once)) as client:
        yield client


@pytest.mark.redis
def test_the_options_are_in_force(guarded: tuple[RedisServer, str]) -> None:
    with asking(guarded[0], "inspector", "any") as client:
        found = client.config_get("append*", "maxmemory*", "save")
    assert {name: found[name] for name in ("appendonly", "appendfsync", "maxmemory-policy", "maxmemory", "save")} == {
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory-policy": "noeviction",
        "maxmemory": str(256 << 20),
        "save": "",
    }


@pytest.mark.redis
@pytest.mark.parametrize(
    "command",
    [
        ("EVAL", "return 1", "0"),
        ("FUNCTION", "LIST"),
        ("SCRIPT", "FLUSH"),
        ("CONFIG", "GET", "*"),
        ("CONFIG", "SET", "appendfsync", "no"),
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("KEYS", "*"),
        ("MODULE", "LIST"),
        ("RESTORE", "fs:a", "0", "x"),
        ("SUBSCRIBE", "a"),
        ("ACL", "LIST"),
        ("SHUTDOWN",),
        ("CLIENT", "LIST"),
        ("MONITOR",),
        ("REPLICAOF", "no", "one"),
        ("SAVE",),
        ("BGREWRITEAOF",),
        ("MIGRATE", "h", "1", "fs:a", "0", "9"),
        ("GET", "other"),
        ("SET", "other", "1"),
        ("DEL", "f"),
        ("MGET", "fs:a", "other"),
        ("ZADD", "x", "0", "y"),
    ],
    ids=" ".join,
)
def test_what_the_service_does_not_need_is_denied(guarded: tuple[RedisServer, str], command: tuple[str, ...]) -> None:
    with asking(guarded[0], "fewshot", guarded[1]) as client:
        assert client.set("fs:a", "1")  # the control: the user is in, and allowed to write what is its own
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)


@pytest.mark.redis
def test_nobody_gets_in_without_name_and_password(guarded: tuple[RedisServer, str]) -> None:
    server, password = guarded
    for user, given in ((None, None), (None, password), ("fewshot", "wrong"), ("fewshot", None), ("default", "")):
        with asking(server, user, given) as client, pytest.raises(redis.exceptions.RedisError):
            client.ping()
    with asking(server, "fewshot", password) as client:
        connection = client.connection_pool.get_connection()
        connection.send_command("RESET")  # back to the user of a new connection
        assert connection.read_response() == b"RESET"
        connection.send_command("GET", "fs:a")
        with pytest.raises(redis.exceptions.AuthenticationError):
            connection.read_response()
        connection.disconnect()
    with asking(server, "health", "any") as client:
        assert client.ping()
        for command in (("GET", "fs:a"), ("INFO",), ("SCAN", "0")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.redis
@pytest.mark.anyio
async def test_the_store_is_allowed_all_it_asks_for_and_asks_for_all_it_is_allowed(
    guarded: tuple[RedisServer, str],
) -> None:
    server, password = guarded
    with asking(server, "inspector", "any") as client:
        client.flushall()
        client.acl_log_reset()
        client.config_resetstat()
    for database in (1, 0):  # any but the first has to be selected
        url = f"{server.url.removesuffix('/0')}/{database}"
        store = RedisStore(url, key=b"a key for tests only", user="fewshot", password=password, timeout_s=5)
        await store.open()
        if database:
            await store.close()
    scope = store.scope("t")
    for task in ("cats", "dogs", "gone"):
        assert await commit(scope, task, 1) == 1
    assert await commit(scope, "cats", 2, expect=1) == 2
    with pytest.raises(VersionConflict):
        await commit(scope, "cats", 3, expect=1)
    await scope.keep_head("cats", Pointer(2, "hd_2"), make_head(9))
    assert same(await scope.head("hd_2"), make_head(9))
    assert await scope.record("dogs") is not None
    with asking(server, "inspector", "any") as client:
        client.set("fs:t:p:dogs", b"damaged")  # its version is found again by the names of its records
        client.delete("fs:t:p:gone")  # as when it expires: it is taken off the list
    assert await commit(scope, "dogs", 3) == 2
    assert [name for name, _ in await scope.tasks(limit=10)] == ["cats", "dogs"]
    assert await scope.delete("cats") is True
    assert await store.ping()
    await store.close()
    with asking(server, "inspector", "any") as client:
        denied = {entry["object"] for entry in client.acl_log() if entry["username"] == "fewshot"}
        used = {name.removeprefix("cmdstat_") for name, found in client.info("commandstats").items() if found["calls"]}
    # Both are asked for politely: the one names the client's library, the other is a warning where it is allowed.
    assert {name.lower() for name in denied} <= {"client|setinfo", "client", "config|get"}
    assert set(secrets.COMMANDS) - used == set()


@pytest.mark.redis
def test_redis_reads_back_what_was_written_under_these_rules(guarded: tuple[RedisServer, str]) -> None:
    """Rules that took the rights of the default user lost every transaction when Redis was started again."""
    server, password = guarded
    with asking(server, "fewshot", password) as client, client.pipeline(transaction=True) as pipe:
        pipe.set("fs:kept", "1").set("fs:later", "2", pxat=4102444800000).zadd("fs:list", {"kept": 0}).execute()
    server.kill()
    server.start()
    with asking(server, "fewshot", password) as client:
        assert client.mget("fs:kept", "fs:later") == [b"1", b"2"]
        assert client.zrangebylex("fs:list", "-", "+") == [b"kept"]
