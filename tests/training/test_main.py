from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.learners import LEARNERS
from tests.training.conftest import ROOT, needs
from training import __main__ as commands

NAMES = [
    "pretrain",
    "metatrain",
    "evaluate",
    "continual",
    "export",
    "import",
    "lake",
    "results",
    "compare-objectives",
    "pretext",
    "baseline",
    "demo",
    "text-demo",
]


@pytest.mark.slow
def test_without_a_command_the_commands_are_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "training"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "python -m training COMMAND [--help]"
    assert [line.split()[0] for line in lines[2:]] == NAMES
    assert all(len(line.split()) > 2 for line in lines[2:])  # each says what it does


@pytest.mark.parametrize("arguments", [[], ["train"], ["--help"]])
def test_what_is_no_command_is_answered_with_the_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(arguments) == 2
    printed = capsys.readouterr().err
    assert all(f"  {name} " in printed for name in NAMES)


@pytest.mark.slow
def test_threads_do_not_spin_while_they_wait_and_measuring_needs_no_torch() -> None:
    """torch reads the two settings when it is imported; what the user has set goes first."""
    code = (
        "import os, sys; import training.__main__, training.evaluate, training.memory; "
        "print(os.environ['GOMP_SPINCOUNT'], os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    given = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    given["OMP_WAIT_POLICY"] = "ACTIVE"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0 ACTIVE False", done.stderr


def test_a_folder_that_is_no_artifact_is_one_sentence_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["evaluate", "--artifact", f"{tmp_path}/none", "--data", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"evaluate: {tmp_path}/none/manifest.json cannot be read")


@pytest.mark.torch
def test_missing_data_and_checkpoints_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("torch")
    folder = str(tmp_path)
    assert commands.main(["pretrain", "--data", f"{folder}/none", "--out", folder, "--shape", "tiny"]) == 2
    assert capsys.readouterr().err == f"pretrain: {folder}/none does not exist.\n"
    assert commands.main(["metatrain", "--data", folder, "--out", folder]) == 2
    assert f"run `python -m training pretrain --out {folder}` first" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.slow
def test_the_demo_goes_from_data_to_a_table(demo: Path) -> None:
    assert (demo / "artifact" / "manifest.json").exists()
    lines = (demo / "printed.md").read_text().splitlines()
    assert "| learner | 5-way 1-shot | 5-way 5-shot |" in lines
    assert {line.split()[1] for line in lines[-7:-1]} == {*LEARNERS}


def test_a_full_disk_and_ctrl_c_are_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[BaseException] = [OSError(28, "No space left on device", "x.jsonl"), KeyboardInterrupt()]

    def failing(config: object) -> None:
        raise raised.pop(0)

    monkeypatch.setattr("training.results.main", failing)
    assert commands.main(["results"]) == 2
    assert capsys.readouterr().err == "results: [Errno 28] No space left on device: 'x.jsonl'\n"
    assert commands.main(["results"]) == 130
    assert capsys.readouterr().err == "\nresults: stopped.\n"
