"""The doctor finds what is wrong, says what to do, and leaves everything as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service import doctor
from service.cli import main
from service.doctor import Check, computer
from tests.service.doctor.findings import everything, wrong


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
        computer, "PACKAGES", {"numpy": "numpy", "missing_one": "missing-one", "broken_one": "broken-one"}
    )
    found = list(doctor.examine({}))
    assert [check.name for check in found] == ["python", "packages"]  # the rest needs them
    wrong(found[1], "missing-one (missing), broken-one (broken: libgomp.so.1: cannot open)")
    assert found[1].fix == "In the project's folder: pip install '.[serve]'"
    elsewhere = everything({}, url="http://127.0.0.1:9")
    wrong(elsewhere["packages"], "missing-one (missing)", status="note")
    wrong(elsewhere["service"], "Nothing answers")


def test_a_wrong_setting_is_told_and_what_does_not_need_it_is_still_checked() -> None:
    found = everything({"FEWSHOT_PROT": "1"})
    wrong(found["settings"], "FEWSHOT_PROT")
    assert found["packages"].status == "ok"
    assert "artifact" not in found


def test_a_variable_that_others_read_is_noted(tmp_path: Path) -> None:
    found = everything({"FEWSHOT_DATA": "/srv/x", "FEWSHOT_PROT": "1"})
    wrong(found["variables"], "Is it FEWSHOT_DATA_DIR?", status="note")


def test_what_nobody_foresaw_is_a_finding_and_no_crash() -> None:
    wrong(doctor._safely("x", lambda: Check("x", "ok", str(1 // 0))), "ZeroDivisionError")
