"""The folder and the Redis of a store: each way to be unfit is told, and nothing is taken or left."""

from __future__ import annotations

import fcntl
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from redis import Redis, ResponseError

from service.doctor import Check
from service.doctor import store as the_store
from service.settings import Settings
from service.stores import folder as store_folder
from service.stores.redis import RedisStore
from service.stores.sqlite import SqliteStore
from tests.redis_server import RedisServer
from tests.service.doctor.findings import fine, wrong


def test_the_data_folder_is_writable_private_and_not_in_use(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    fine(the_store.data(settings, running=False), "will be made")
    with store_folder.lock(settings.data_dir):
        wrong(the_store.data(settings, running=False), "in use by another process")
        fine(the_store.data(settings, running=True), "in use by the running service")
    fine(the_store.data(settings, running=False), "not in use")
    store_folder.own_key(settings.data_dir, new=True)
    fine(the_store.data(settings, running=False))
    (settings.data_dir / "store.key").chmod(0o644)
    wrong(the_store.data(settings, running=False), "can be read by others", status="warn")
    (settings.data_dir / "fewshot.sqlite3").touch()
    (settings.data_dir / "store.key").unlink()
    wrong(the_store.data(settings, running=False), "store.key is missing")
    (tmp_path / "file").touch()
    wrong(the_store.data(Settings(data_dir=tmp_path / "file"), running=False), "file")
    assert sorted(path.name for path in settings.data_dir.iterdir()) == ["fewshot.sqlite3", "store.lock"]


@pytest.mark.anyio
async def test_a_store_that_was_sealed_with_another_key_is_told_and_left_as_it_was(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    store = SqliteStore(settings.data_dir)
    await store.open()
    wrong(the_store.data(settings, running=False), "in use by another process")
    await store.close()
    key = settings.data_dir / "store.key"
    before = {path: path.read_bytes() for path in settings.data_dir.iterdir()}
    fine(the_store.data(settings, running=False))
    (tmp_path / "given").write_text("another key of the length")
    given = settings.model_copy(update={"store_key_file": tmp_path / "given"})
    wrong(the_store.data(given, running=False), "sealed with another key")
    assert {path: path.read_bytes() for path in settings.data_dir.iterdir()} == before
    (tmp_path / "given").write_bytes(key.read_bytes())
    fine(the_store.data(given, running=False))
    key.write_text("f" * 64)
    wrong(the_store.data(settings, running=False), "sealed with another key")
    key.write_text("f")
    wrong(the_store.data(settings, running=False), "holds no key")
    (settings.data_dir / "fewshot.sqlite3").write_bytes(b"")
    key.write_text("f" * 64)
    fine(the_store.data(settings, running=False))


def test_asking_for_the_lock_takes_it_from_nobody(tmp_path: Path) -> None:
    the_store.data(Settings(data_dir=tmp_path), running=False)
    (tmp_path / "store.lock").touch()
    the_store.data(Settings(data_dir=tmp_path), running=False)
    with (tmp_path / "store.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.redis
def test_a_redis_is_away_forgetful_or_fine(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--requirepass", "open sesame") as server:
        (tmp_path / "password").write_text("open sesame")
        closed = Settings(redis_url=server.url)
        settings = closed.model_copy(update={"redis_password_file": tmp_path / "password"})
        wrong(the_store.redis(closed), "does not accept the password")
        fine(the_store.redis(settings), "keeps what it acknowledges")
        for setting, value, status, words in (
            ("maxmemory-policy", "allkeys-lru", "fail", "which throws tasks away"),
            ("appendfsync", "everysec", "warn", "can lose tasks"),
        ):
            before = server_set(server, setting, value)
            wrong(the_store.redis(settings), words, status=status)
            server_set(server, setting, before)
        fine(the_store.redis(settings))
    wrong(the_store.redis(settings), "does not answer")
    wrong(the_store.redis(Settings(redis_url="nonsense")), "no address of a Redis")


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.anyio
async def test_a_redis_that_was_sealed_with_another_key_is_told(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a key of enough characters")
    with RedisServer(tmp_path) as server:
        settings = Settings(redis_url=server.url, store_key_file=tmp_path / "key")
        fine(the_store.redis(settings))
        store = RedisStore(server.url, key=b"a key of enough characters")
        await store.open()
        await store.close()
        fine(the_store.redis(settings))
        wrong(the_store.redis(Settings(redis_url=server.url)), "sealed with another key")


@pytest.mark.slow
@pytest.mark.redis
def test_what_tls_does_not_like_is_told(tmp_path: Path) -> None:
    def secured(server: RedisServer, more: str = "") -> Check:
        return the_store.redis(Settings(redis_url=server.url.replace("redis:", "rediss:") + more))

    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *(
                "-keyout",
                str(key),
                "-out",
                str(certificate),
                "-subj",
                "/CN=x",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
            ),
        ],
        check=True,
        capture_output=True,
    )
    with RedisServer(tmp_path) as server:
        wrong(secured(server), "does not answer to TLS")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = {"tls-cert-file": certificate, "tls-key-file": key, "tls-auth-clients": "no", "tls-port": port}
        with Redis(port=server.port) as client:
            try:
                for name, value in options.items():
                    client.config_set(name, str(value))
            except ResponseError:
                pytest.skip("this redis-server knows no TLS")
        server.url = f"redis://127.0.0.1:{port}/0"
        wrong(secured(server), "self-signed certificate")
        wrong(secured(server, f"?ssl_ca_certs={tmp_path}/none"), "a file of certificates cannot be read")
        fine(secured(server, f"?ssl_ca_certs={certificate}"))


def server_set(server: RedisServer, name: str, value: str) -> str:
    """Changes a setting of a running Redis; what it was."""
    with Redis(port=server.port, password="open sesame") as client:
        before = client.config_get(name)[name]
        client.config_set(name, value)
    return str(before)
