"""The doctor finds what is wrong, says what to do, and leaves everything as it was."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
import tomllib
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis, ResponseError

from models.artifact import Artifact
from service import doctor, keys
from service.cli import main
from service.doctor import Check
from service.settings import PRETRAINED, Settings
from service.stores import folder as store_folder
from service.stores.memory import MemoryStore
from service.stores.redis import RedisStore
from service.stores.sqlite import SqliteStore
from service.web.app import create_app
from tests.fakes import Letters, tiny_text_artifact
from tests.redis_server import RedisServer
from tests.service.live import served
from tests.service.test_client import service
from tests.service.test_main import started


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FEWSHOT_"):
            monkeypatch.delenv(name)


def wrong(check: Check, words: str, *, status: str = "fail") -> None:
    assert (check.status, words in check.found) == (status, True), check
    assert check.fix.strip()


def fine(check: Check, words: str = "") -> None:
    assert check.status == "ok", check
    assert words in check.found
    assert check.fix == ""


def everything(environment: dict[str, str], **given: str) -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(environment, **given)}


@contextmanager
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.slow
def test_a_computer_that_is_fine_is_found_fine_and_left_as_it_was(tmp_path: Path) -> None:
    data = tmp_path / "data" / "deeper"
    found = everything({"FEWSHOT_PORT": "0", "FEWSHOT_DATA_DIR": str(data)})
    assert list(found) == [
        *("python", "packages", "clock", "settings", "secrets", "artifact", "port", "data", "disk", "service"),
    ]
    assert [name for name, check in found.items() if check.status not in ("ok", "note")] == []
    assert not doctor.wrong(found.values())
    assert "probe within" in found["artifact"].found
    assert found["service"].fix == "`fewshot serve` starts one."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_ends_with_ok_or_with_what_to_see_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEWSHOT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("FEWSHOT_PORT", "0")
    assert main(["doctor", "--settings"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "OK"
    assert "FEWSHOT_MAX_BATCH\t16" in said
    monkeypatch.setenv("FEWSHOT_ARTIFACT", str(tmp_path))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "Something has to be seen to: artifact"
    assert main(["doctor", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert document["settings"]["FEWSHOT_ARTIFACT"] == str(tmp_path)
    failed = next(check for check in document["checks"] if check["status"] == "fail")
    assert failed["name"] == "artifact"
    assert "manifest.json cannot be read" in failed["found"]


def test_a_missing_or_broken_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_one.py").write_text("raise OSError('libgomp.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        doctor, "PACKAGES", {"numpy": "numpy", "missing_one": "missing-one", "broken_one": "broken-one"}
    )
    found = list(doctor.examine({}))
    assert [check.name for check in found] == ["python", "packages"]  # the rest needs them
    wrong(found[1], "missing-one (missing), broken-one (broken: libgomp.so.1: cannot open)")
    assert found[1].fix == "In the project's folder: pip install '.[serve]'"
    elsewhere = everything({}, url="http://127.0.0.1:9")
    wrong(elsewhere["packages"], "missing-one (missing)", status="note")
    wrong(elsewhere["service"], "Nothing answers")


def test_every_package_that_serving_imports_is_looked_for() -> None:
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["serve"]
    names = {line.split(">")[0].split("[")[0] for line in needed}
    # The extractor's runtime is looked for by device; the command itself could not run without its own; onnx is
    # loaded by the first export only.
    assert names - {"onnxruntime", "onnx", "httpx", "rich", "typer"} == set(doctor.PACKAGES.values())


def test_a_wrong_setting_is_told_and_what_does_not_need_it_is_still_checked() -> None:
    found = everything({"FEWSHOT_PROT": "1"})
    wrong(found["settings"], "FEWSHOT_PROT")
    assert found["packages"].status == "ok"
    assert "artifact" not in found


@pytest.mark.slow
def test_passwords_in_settings_are_not_shown() -> None:
    environment = {"FEWSHOT_REDIS_URL": "redis://me:sesame@127.0.0.1:1/0", "FEWSHOT_PORT": "0"}
    assert doctor.in_force(environment)["FEWSHOT_REDIS_URL"] == "redis://***@127.0.0.1:1/0"
    found = everything(environment)
    assert "sesame" not in str(found)
    assert "FEWSHOT_REDIS_URL=redis://***@127.0.0.1:1/0" in found["settings"].found
    assert {"data", "disk"} & set(found) == set()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://:pa/ss@host:6379/0", "redis://***@host:6379/0"),
        ("redis://me:p@ss@host/0", "redis://***@host/0"),
        ("rediss://me:pass@host/0?ssl_ca_certs=/ca.pem", "rediss://***@host/0?ssl_ca_certs=/ca.pem"),
        ("unix:///run/redis.sock?db=0&password=pass", "unix:///run/redis.sock?db=0&password=***"),
        ("unix://me:pass@/run/redis.sock?db=0", "unix://***@/run/redis.sock?db=0"),
        ("redis://host/0?password=pa@ss&db=1", "redis://host/0?password=***&db=1"),
        ("rediss://host/0?ssl_password=pass", "rediss://host/0?ssl_password=***"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_no_form_of_an_address_shows_its_password(address: str, shown: str) -> None:
    assert doctor.in_force({"FEWSHOT_REDIS_URL": address})["FEWSHOT_REDIS_URL"] == shown


def test_a_variable_that_others_read_is_noted(tmp_path: Path) -> None:
    found = everything({"FEWSHOT_DATA": "/srv/x", "FEWSHOT_PROT": "1"})
    wrong(found["variables"], "Is it FEWSHOT_DATA_DIR?", status="note")


def test_an_artifact_that_is_none_or_was_changed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(PRETRAINED / "characters", tmp_path / "changed")
    with (tmp_path / "changed" / "learners.safetensors").open("ab") as file:
        file.write(b"x")
    wrong(doctor.artifact(Settings(artifact=tmp_path / "changed")), "learners.safetensors is not the file")
    wrong(doctor.artifact(Settings(artifact=tmp_path)), "manifest.json cannot be read")
    found = doctor.artifact(Settings(artifact=PRETRAINED / "characters", default_method="magic"))
    wrong(found, "no method 'magic'")
    fine(doctor.artifact(Settings(artifact=PRETRAINED / "characters", precision="int8")), "probe within")
    monkeypatch.setattr(Artifact, "kind", "text")
    wrong(doctor.artifact(Settings(artifact=PRETRAINED / "characters", views=2)), "texts, which have no views")


@pytest.mark.slow
def test_a_port_is_free_taken_or_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_S", 0.5)  # the other program takes the connection and says nothing
    with taken() as port:
        wrong(doctor.port(Settings(port=port)), f"127.0.0.1:{port} is taken by another program")
    fine(doctor.port(Settings(port=port)), "is free")
    wrong(doctor.port(Settings(host="nowhere.invalid")), "is no address")
    wrong(doctor.port(Settings(host="192.0.2.1")), "192.0.2.1")
    with service(tmp_path) as (url, _):
        fine(doctor.port(Settings(port=int(url.rsplit(":", 1)[1]))), "fewshot is running")


@pytest.mark.slow
@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize("host", ["::", "::1"])
def test_a_port_of_ipv6_is_another_than_that_of_ipv4(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_S", 0.5)
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        fine(doctor.port(Settings(host=host, port=port)), f"[{host}]:{port} is free")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        wrong(doctor.port(Settings(host="::1", port=port)), f"[::1]:{port} is taken by another program")


def test_the_data_folder_is_writable_private_and_not_in_use(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    fine(doctor.data(settings, running=False), "will be made")
    with store_folder.lock(settings.data_dir):
        wrong(doctor.data(settings, running=False), "in use by another process")
        fine(doctor.data(settings, running=True), "in use by the running service")
    fine(doctor.data(settings, running=False), "not in use")
    store_folder.own_key(settings.data_dir, new=True)
    fine(doctor.data(settings, running=False))
    (settings.data_dir / "store.key").chmod(0o644)
    wrong(doctor.data(settings, running=False), "can be read by others", status="warn")
    (settings.data_dir / "fewshot.sqlite3").touch()
    (settings.data_dir / "store.key").unlink()
    wrong(doctor.data(settings, running=False), "store.key is missing")
    (tmp_path / "file").touch()
    wrong(doctor.data(Settings(data_dir=tmp_path / "file"), running=False), "file")
    assert sorted(path.name for path in settings.data_dir.iterdir()) == ["fewshot.sqlite3", "store.lock"]


@pytest.mark.anyio
async def test_a_store_that_was_sealed_with_another_key_is_told_and_left_as_it_was(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    store = SqliteStore(settings.data_dir)
    await store.open()
    wrong(doctor.data(settings, running=False), "in use by another process")
    await store.close()
    key = settings.data_dir / "store.key"
    before = {path: path.read_bytes() for path in settings.data_dir.iterdir()}
    fine(doctor.data(settings, running=False))
    (tmp_path / "given").write_text("another key of the length")
    given = settings.model_copy(update={"store_key_file": tmp_path / "given"})
    wrong(doctor.data(given, running=False), "sealed with another key")
    assert {path: path.read_bytes() for path in settings.data_dir.iterdir()} == before
    (tmp_path / "given").write_bytes(key.read_bytes())
    fine(doctor.data(given, running=False))
    key.write_text("f" * 64)
    wrong(doctor.data(settings, running=False), "sealed with another key")
    key.write_text("f")
    wrong(doctor.data(settings, running=False), "holds no key")
    (settings.data_dir / "fewshot.sqlite3").write_bytes(b"")
    key.write_text("f" * 64)
    fine(doctor.data(settings, running=False))


def test_asking_for_the_lock_takes_it_from_nobody(tmp_path: Path) -> None:
    doctor.data(Settings(data_dir=tmp_path), running=False)
    (tmp_path / "store.lock").touch()
    doctor.data(Settings(data_dir=tmp_path), running=False)
    with (tmp_path / "store.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    for free, status in ((5e9, "ok"), (5e8, "warn"), (5e7, "fail")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(1e10, 0, free))
        assert doctor.disk(Settings()).status == status


def test_a_clock_that_is_behind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fine(doctor.clock())
    monkeypatch.setattr(time, "time", lambda: 1e9)
    wrong(doctor.clock(), "before this program was installed", status="warn")


def test_secrets_are_there_and_not_for_everybody(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    wrong(doctor.secrets(Settings(redis_password_file=secret)), "FEWSHOT_REDIS_PASSWORD_FILE")
    secret.write_text("x" * 32)
    secret.chmod(0o644)
    wrong(doctor.secrets(Settings(store_key_file=secret)), "has mode 644", status="warn")
    secret.write_text("short")
    wrong(doctor.secrets(Settings(store_key_file=secret)), "at least 16 characters")
    secret.write_bytes(bytes(range(256)))
    wrong(doctor.secrets(Settings(store_key_file=secret)), "is no text")
    secret.write_text("x" * 32)
    secret.chmod(0o440)
    fine(doctor.secrets(Settings(store_key_file=secret)), str(secret))
    fine(doctor.secrets(Settings()), "none are configured")
    wrong(doctor.secrets(Settings(host="0.0.0.0")), "whoever reaches the port", status="warn")


def test_a_keys_file_that_lets_nobody_in_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, _ = keys.create(file, tenant="acme", scopes=("adapt",))
    settings = Settings(keys_file=file, host="0.0.0.0")
    fine(doctor.secrets(settings), str(file))
    keys.revoke(file, key.id)
    wrong(doctor.secrets(settings), "no live key", status="warn")
    keys.create(file, tenant="acme", scopes=("adapt",), expires=datetime.now(UTC) - timedelta(seconds=1))
    wrong(doctor.secrets(settings), "no live key", status="warn")
    keys.create(file, tenant="acme", scopes=("adapt",), expires=datetime.now(UTC) + timedelta(days=1))
    fine(doctor.secrets(settings))
    keys.pepper_file(file).chmod(0o644)
    wrong(doctor.secrets(settings), "keys.json.pepper has mode 644", status="warn")
    keys.pepper_file(file).unlink()
    wrong(doctor._safely("secrets", lambda: doctor.secrets(settings)), "pepper")


def test_what_nobody_foresaw_is_a_finding_and_no_crash() -> None:
    wrong(doctor._safely("x", lambda: Check("x", "ok", str(1 // 0))), "ZeroDivisionError")


def test_a_service_that_does_not_answer_or_is_another_is_told(tmp_path: Path) -> None:
    with taken() as port:
        pass
    wrong(doctor.service(f"http://127.0.0.1:{port}", None), "Nothing answers")
    wrong(doctor.service("ftp://x", None), "no address of a service")
    with service(tmp_path) as (url, faults):
        faults.next.append("404")
        wrong(doctor.service(url, None), "not one of a fewshot service")


@pytest.mark.slow
def test_a_service_with_keys_asks_for_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, weak = keys.create(file, tenant="acme", scopes=("admin",))
    with service(tmp_path, keys_file=file, max_body_bytes=10**6, max_example_bytes=10**6) as (url, _):
        wrong(doctor.service(url, None), "key")
        wrong(doctor.service(url, "fsk_live_000000000000_" + "0" * 43), "key")
        wrong(doctor.service(url, weak), "is up", status="note")


@pytest.mark.slow
def test_a_running_service_is_put_to_the_test(tmp_path: Path) -> None:
    with started(tmp_path / "data") as (process, url, _):
        environment = {"FEWSHOT_PORT": url.rsplit(":", 1)[1], "FEWSHOT_DATA_DIR": str(tmp_path / "data")}
        found = everything(environment)
        fine(found["port"], "fewshot is running")
        fine(found["data"], "in use by the running service")
        fine(found["service"], "learned two letters and knew a third in")
        process.kill()
        process.wait()
        found = everything(environment, url=url)
        fine(found["port"], "is free")
        wrong(found["service"], "Nothing answers")


@pytest.mark.slow
def test_a_running_service_that_reads_texts_is_put_to_the_test_with_texts(tmp_path: Path) -> None:
    artifact = tiny_text_artifact(tmp_path)
    app = create_app(Settings(), artifact=artifact, extractor=Letters(), store=MemoryStore())
    with served(app) as http:
        fine(doctor.service(str(http.base_url), None), "learned two kinds of text and knew another in")


@pytest.mark.redis
def test_a_redis_is_away_forgetful_or_fine(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--requirepass", "open sesame") as server:
        (tmp_path / "password").write_text("open sesame")
        closed = Settings(redis_url=server.url)
        settings = closed.model_copy(update={"redis_password_file": tmp_path / "password"})
        wrong(doctor.redis(closed), "does not accept the password")
        fine(doctor.redis(settings), "keeps what it acknowledges")
        for setting, value, status, words in (
            ("maxmemory-policy", "allkeys-lru", "fail", "which throws tasks away"),
            ("appendfsync", "everysec", "warn", "can lose tasks"),
        ):
            before = server_set(server, setting, value)
            wrong(doctor.redis(settings), words, status=status)
            server_set(server, setting, before)
        fine(doctor.redis(settings))
    wrong(doctor.redis(settings), "does not answer")
    wrong(doctor.redis(Settings(redis_url="nonsense")), "no address of a Redis")


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.anyio
async def test_a_redis_that_was_sealed_with_another_key_is_told(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a key of enough characters")
    with RedisServer(tmp_path) as server:
        settings = Settings(redis_url=server.url, store_key_file=tmp_path / "key")
        fine(doctor.redis(settings))
        store = RedisStore(server.url, key=b"a key of enough characters")
        await store.open()
        await store.close()
        fine(doctor.redis(settings))
        wrong(doctor.redis(Settings(redis_url=server.url)), "sealed with another key")


@pytest.mark.slow
@pytest.mark.redis
def test_what_tls_does_not_like_is_told(tmp_path: Path) -> None:
    def secured(server: RedisServer, more: str = "") -> Check:
        return doctor.redis(Settings(redis_url=server.url.replace("redis:", "rediss:") + more))

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
