"""docs/client.md is held to the code: its Python and its commands run, and say what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cli.app import app
from tests.service.test_main import started
from tests.test_docs import DOCS, FENCE, MARK, Block, blocks, check, run

PAGE = (DOCS / "client.md").read_text()
PYTHON, SHELL = PAGE.split("## From the shell")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real service, and `fewshot` on the path, installed or not."""
    command = tmp_path / "bin" / "fewshot"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m service.cli "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    with started(tmp_path / "data") as (_, address, _said):
        yield address


def python_blocks(text: str) -> list[Block]:
    """As `blocks`, for Python: what follows a block is what it prints."""
    return blocks(text.replace("```python\n", "```sh\n"))


def test_no_block_is_of_a_kind_that_is_not_run() -> None:
    assert {kind for kind, _ in FENCE.findall(PYTHON)} == {"console", "python", "text"}
    assert {kind for kind, _ in FENCE.findall(SHELL)} == {"console", "sh", "text", "json"}
    assert len([kind for kind, _ in FENCE.findall(PAGE) if kind == "console"]) == 2


@pytest.mark.slow
def test_the_page_runs_and_says_what_it_shows(service: str, tmp_path: Path) -> None:
    code = python_blocks(PYTHON)
    assert len(code) > 9
    # One program, with a mark before the output of each block.
    source = "\n".join(f"print('\\n{MARK}')\n{block.source}" for block in code)
    source = source.replace("Client()", f'Client("{service}")').replace("/tmp/", f"{tmp_path}/")
    program = [sys.executable, "-W", "error", "-c", source]
    done = subprocess.run(program, cwd=DOCS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout, done.stderr)
    shown = [Block(b.source, b.shown and (b.shown[0], b.shown[1].replace("/tmp/", f"{tmp_path}/"))) for b in code]
    check(shown, done.stdout.split(f"\n{MARK}\n")[1:])

    variables = {"URL": service, "PORT": service.rsplit(":", 1)[1], "DATA_DIR": str(tmp_path / "data")}
    exports = "\n".join(f"export FEWSHOT_{name}={value}" for name, value in variables.items())
    commands = [Block(exports, None), *blocks(SHELL)]
    assert len(commands) > 4
    check(commands, run(commands, replace={"/tmp/": f"{tmp_path}/"}))
    assert (tmp_path / "letters.onnx").stat().st_size > 10**6
    assert "model.onnx" in zipfile.ZipFile(tmp_path / "letters.zip").namelist()


def test_every_command_is_in_the_table() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    names |= {str(group.name) for group in app.registered_groups}
    assert len(names) > 9
    assert {name for name in names if not re.search(rf"^\| `fewshot {name}[ `]", SHELL, re.MULTILINE)} == set()
