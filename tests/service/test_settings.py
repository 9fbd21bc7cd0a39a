"""Settings come from the environment once, and a wrong one stops the start by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from service.settings import Settings, SettingsError, overlooked, read
from service.support import Limits


def test_without_any_variable_the_defaults_serve_on_loopback() -> None:
    settings = read({})
    assert (settings.host, settings.port, settings.redis_url) == ("127.0.0.1", 8000, "")


def test_a_task_with_all_the_photos_that_it_may_keep_fits_into_what_compose_gives() -> None:
    """A process of 450 MB that takes eight times what it keeps of a task (docs/operating.md), with room for two."""
    limits = re.findall(r"mem_limit: (\d)g", (Path(__file__).parents[2] / "docker-compose.yml").read_text())
    assert [450e6 + 2 * 8 * read({}).max_retained_bytes < int(limit) * 2**30 for limit in limits] == [True]
    assert Limits().max_retained_bytes == read({}).max_retained_bytes


def test_a_variable_sets_its_field() -> None:
    settings = read({"FEWSHOT_PORT": "9001", "FEWSHOT_PRECISION": "int8", "PATH": "/bin"})
    assert (settings.port, settings.precision) == (9001, "int8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("PORT", "high"), ("PORT", "70000"), ("PRECISION", "int4"), ("MAX_WAY", "1"), ("STORE_TIMEOUT_S", "0")),
        *(("HOST", ""), ("ANSWER_TIMEOUT_S", "3000000"), ("DRAIN_S", "3601"), ("HEAD_TTL_S", "9" * 18)),
        *(("MAX_CONNECTIONS", "9" * 30), ("LANES", "1000000")),
    ],
)
def test_a_wrong_value_is_told_with_the_name_of_its_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"FEWSHOT_{name}"):
        read({f"FEWSHOT_{name}": value})


@pytest.mark.parametrize(
    "name", [n for n, field in Settings.model_fields.items() if Path in (field.annotation, *get_args(field.annotation))]
)
def test_an_empty_path_is_refused_for_it_would_be_the_current_folder(name: str) -> None:
    with pytest.raises(SettingsError, match=f"FEWSHOT_{name.upper()}: It is empty"):
        read({f"FEWSHOT_{name.upper()}": ""})


@pytest.mark.parametrize("name", [n for n, field in Settings.model_fields.items() if field.annotation is float])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e300"])
def test_no_number_is_without_end(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"FEWSHOT_{name.upper()}"):
        read({f"FEWSHOT_{name.upper()}": value})


def test_an_unknown_variable_is_refused_so_that_a_typing_error_cannot_hide() -> None:
    with pytest.raises(SettingsError, match="FEWSHOT_PROT is no setting"):
        read({"FEWSHOT_PROT": "8001"})


def test_variables_of_training_and_tests_are_left_alone() -> None:
    assert read({"FEWSHOT_DATA": "/data", "FEWSHOT_TEST_REQUIRE": "redis"}) == Settings()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"DATA": "/srv/x"}, "FEWSHOT_DATA_DIR"),
        ({"DATA": "/srv/x", "DATA_DIR": "/srv/y"}, ""),
        ({"KEY": "keys-sesame.json"}, "FEWSHOT_KEYS_FILE"),
        ({"KEY": "keys.json", "KEYS_FILE": "keys.json"}, ""),
        ({"KEY": "fsk_live_000000000000_" + "0" * 43}, ""),
        ({"URL": "redis://host:6379/0"}, "FEWSHOT_REDIS_URL"),
        ({"URL": "rediss://:sesame@host"}, "FEWSHOT_REDIS_URL"),
        ({"URL": "http://redis:8000", "REDIS_URL": "redis://host"}, ""),
    ],
)
def test_what_others_read_and_was_meant_for_the_service_is_told(given: dict[str, str], meant: str) -> None:
    found = overlooked({f"FEWSHOT_{name}": value for name, value in given.items()})
    assert [text.rpartition("Is it ")[2] for text in found] == [f"{meant}?"] * bool(meant)
    assert "sesame" not in str(found)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
        ("fe80::2", "http://[fe80::2]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_address_is_one_that_can_be_asked(host: str, address: str) -> None:
    assert Settings(host=host).address() == address
    assert Settings(host=host, port=0).address(8000) == address


def test_settings_do_not_read_the_environment_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSHOT_PORT", "9999")
    assert read({}).port == 8000


def test_a_secret_is_read_from_its_file_without_the_line_end(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    assert Settings().secret(tmp_path / "password") == "secret"
    assert Settings().secret(None) == ""
    with pytest.raises(SettingsError, match="missing"):
        Settings().secret(tmp_path / "missing")
    (tmp_path / "random").write_bytes(bytes(range(256)))
    with pytest.raises(SettingsError, match=r"random is no text: .* `openssl rand"):
        Settings().secret(tmp_path / "random")
