"""Settings come from the environment once, and a wrong one stops the start by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, read


def test_without_any_variable_the_defaults_serve_on_loopback() -> None:
    settings = read({})
    assert (settings.host, settings.port, settings.redis_url) == ("127.0.0.1", 8000, "")


def test_a_variable_sets_its_field() -> None:
    settings = read({"FEWSHOT_PORT": "9001", "FEWSHOT_PRECISION": "int8", "PATH": "/bin"})
    assert (settings.port, settings.precision) == (9001, "int8")


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "high"), ("PORT", "70000"), ("PRECISION", "int4"), ("MAX_WAY", "1"), ("STORE_TIMEOUT_S", "0")],
)
def test_a_wrong_value_is_told_with_the_name_of_its_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"FEWSHOT_{name}"):
        read({f"FEWSHOT_{name}": value})


def test_an_unknown_variable_is_refused_so_that_a_typing_error_cannot_hide() -> None:
    with pytest.raises(SettingsError, match="FEWSHOT_PROT is no setting"):
        read({"FEWSHOT_PROT": "8001"})


def test_variables_of_training_and_tests_are_left_alone() -> None:
    assert read({"FEWSHOT_DATA": "/data", "FEWSHOT_TEST_REQUIRE": "redis"}) == Settings()


def test_settings_do_not_read_the_environment_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSHOT_PORT", "9999")
    assert read({}).port == 8000


def test_a_secret_is_read_from_its_file_without_the_line_end(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    assert Settings().secret(tmp_path / "password") == "secret"
    assert Settings().secret(None) == ""
    with pytest.raises(SettingsError, match="missing"):
        Settings().secret(tmp_path / "missing")
