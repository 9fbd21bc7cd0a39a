"""Settings, secrets and the artifact: no secret is shown, and what is wrong is told."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from models.artifact import Artifact
from service import doctor, keys
from service.doctor import configured
from service.settings import PRETRAINED, Settings
from tests.service.doctor.findings import everything, fine, wrong


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


def test_an_artifact_that_is_none_or_was_changed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(PRETRAINED / "characters", tmp_path / "changed")
    with (tmp_path / "changed" / "learners.safetensors").open("ab") as file:
        file.write(b"x")
    wrong(configured.artifact(Settings(artifact=tmp_path / "changed")), "learners.safetensors is not the file")
    wrong(configured.artifact(Settings(artifact=tmp_path)), "manifest.json cannot be read")
    found = configured.artifact(Settings(artifact=PRETRAINED / "characters", default_method="magic"))
    wrong(found, "no method 'magic'")
    fine(configured.artifact(Settings(artifact=PRETRAINED / "characters", precision="int8")), "probe within")
    monkeypatch.setattr(Artifact, "kind", "text")
    wrong(configured.artifact(Settings(artifact=PRETRAINED / "characters", views=2)), "texts, which have no views")


def test_secrets_are_there_and_not_for_everybody(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    wrong(configured.secrets(Settings(redis_password_file=secret)), "FEWSHOT_REDIS_PASSWORD_FILE")
    secret.write_text("x" * 32)
    for mode in (0o644, 0o620, 0o602):
        secret.chmod(mode)
        wrong(configured.secrets(Settings(store_key_file=secret)), f"has mode {mode:o}", status="warn")
    secret.write_text("short")
    wrong(configured.secrets(Settings(store_key_file=secret)), "at least 16 characters")
    secret.write_bytes(bytes(range(256)))
    wrong(configured.secrets(Settings(store_key_file=secret)), "is no text")
    secret.write_text("x" * 32)
    secret.chmod(0o440)
    fine(configured.secrets(Settings(store_key_file=secret)), str(secret))
    fine(configured.secrets(Settings()), "none are configured")
    wrong(configured.secrets(Settings(host="0.0.0.0")), "whoever reaches the port", status="warn")


def test_a_keys_file_that_lets_nobody_in_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, _ = keys.create(file, tenant="acme", scopes=("adapt",))
    settings = Settings(keys_file=file, host="0.0.0.0")
    fine(configured.secrets(settings), str(file))
    keys.revoke(file, key.id)
    wrong(configured.secrets(settings), "no live key", status="warn")
    keys.create(file, tenant="acme", scopes=("adapt",), expires=datetime.now(UTC) - timedelta(seconds=1))
    wrong(configured.secrets(settings), "no live key", status="warn")
    keys.create(file, tenant="acme", scopes=("adapt",), expires=datetime.now(UTC) + timedelta(days=1))
    fine(configured.secrets(settings))
    for mode in (0o644, 0o620):
        keys.pepper_file(file).chmod(mode)
        wrong(configured.secrets(settings), f"keys.json.pepper has mode {mode:o}", status="warn")
    keys.pepper_file(file).unlink()
    wrong(doctor._safely("secrets", lambda: configured.secrets(settings)), "pepper")
