"""The command `fewshot` as a person or a script meets it: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service import keys
from service.cli import main, show
from tests.fakes import picture
from tests.service.test_client import drawn, service

ROOT = Path(__file__).resolve().parents[2]


class Said(str):
    """What a command printed, and how it ended."""

    status: int
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self)

    @property
    def fields(self) -> list[list[str]]:
        return [line.split("\t") for line in self.splitlines()]


Fewshot = Callable[..., Said]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with service(tmp_path_factory.mktemp("service")) as (url, _):
        yield url


@pytest.fixture
def fewshot(address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fewshot:
    """Runs a command against a service that knows mean colours."""
    monkeypatch.setenv("FEWSHOT_URL", address)
    monkeypatch.delenv("FEWSHOT_KEY", raising=False)

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        said = Said(out)
        said.status, said.err = status, err
        return said

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return drawn(tmp_path / "photos", "red", "blue", shots=3)


def program(*arguments: object, module: str = "service.cli") -> list[str]:
    return [sys.executable, "-m", module, *(str(argument) for argument in arguments)]


def refused(said: Said, words: str, *, status: int = 1) -> None:
    """One sentence on stderr, nothing on stdout."""
    assert (said, said.status) == ("", status), said.err
    assert said.err.startswith("fewshot: ")
    assert said.err.count("\n") == 1
    assert words in said.err


def test_a_folder_becomes_a_task_and_answers(fewshot: Fewshot, folder: Path) -> None:
    learned = fewshot("adapt", folder, "--task", "colours", "--method", "ridge")
    assert (learned.status, learned.err) == (0, "")
    assert ["task", "colours"] in learned.fields
    assert ["method", "ridge"] in learned.fields
    assert ["class", "blue", "3"] in learned.fields
    assert any(line[0] == "accuracy" and len(line) == 4 for line in learned.fields)
    asked = fewshot("classify", "colours", folder / "red" / "0.png", folder / "blue", "--reject", "off")
    assert asked.status == 0
    assert [line[:2] for line in asked.fields] == [
        [str(folder / "red" / "0.png"), "red"],
        *([str(folder / "blue" / f"{k}.png"), "blue"] for k in range(3)),
    ]
    assert 0.5 < float(asked.fields[0][2]) <= 1


def test_json_is_what_the_api_calls_things(fewshot: Fewshot, folder: Path) -> None:
    task = fewshot("adapt", folder, "--task", "json", "--retain", "images", "--ttl", 3600, "--json").json
    assert (task["task"], task["version"], task["retained"]) == ("json", 1, True)
    assert task["classes"] == [{"label": "blue", "shots": 3}, {"label": "red", "shots": 3}]
    assert task["report"]["estimate"] == "leave-one-out"
    assert task["expires_at"] > task["created_at"]
    rows = fewshot("classify", "json", folder / "red" / "0.png", "--explain", "--json").json
    assert (rows[0]["image"], rows[0]["label"]) == (str(folder / "red" / "0.png"), "red")
    assert {item["label"] for item in rows[0]["nearest"]} == {"red"}
    assert {"task": "json", "version": 1, "head": task["head"]} in fewshot("tasks", "--json").json
    shown = fewshot("tasks", "show", "json", "--json").json
    what = {"version": 1, "head": task["head"], "method": task["method"], "classes": 2, "examples": 6}
    assert [{**item, "created_at": None} for item in shown["versions"]] == [{**what, "created_at": None}]
    assert fewshot("tasks", "forget", "json", "--json").json == {"task": "json", "forgotten": True}


@pytest.mark.slow
def test_a_task_is_changed_shown_rolled_back_and_forgotten(fewshot: Fewshot, folder: Path, tmp_path: Path) -> None:
    name = fewshot("adapt", folder, "--json").json["task"]
    more = fewshot("add", name, drawn(tmp_path / "more", "lime", shots=2), "--json").json
    assert [item["label"] for item in more["classes"]] == ["blue", "lime", "red"]
    example = next(item for item in more["examples"] if item["label"] == "lime")
    assert example["name"] in ("lime/0.png", "lime/1.png")
    assert ["class", "lime", "1"] in fewshot("remove", name, "--example", example["id"]).fields
    assert "lime" not in fewshot("remove", name, "--label", "lime")
    shown = fewshot("tasks", "show", name).fields
    assert [line[1] for line in shown if line[0] == "kept"] == ["4", "3", "2", "1"]
    back = fewshot("tasks", "rollback", name, 2).fields
    assert ["version", "5"] in back
    assert ["class", "lime", "2"] in back
    assert ["class", "lime", "2"] not in fewshot("tasks", "show", name, "--version", 1).fields
    assert [name, "5", more["head"]] in fewshot("tasks").fields
    gone = fewshot("tasks", "forget", name, "--yes")
    assert (gone, gone.status) == ("", 0)
    refused(fewshot("tasks", "show", name), f"There is no task {name!r}.")


def test_what_is_left_out_is_said_beside_the_answer(fewshot: Fewshot, folder: Path) -> None:
    (folder / "red" / "broken.jpg").write_bytes(b"nothing")
    learned = fewshot("adapt", folder, "--task", "beside", "--json")
    assert learned.status == 1  # it is learned, and not from all
    assert learned.err == "Left out red/broken.jpg: This is not an image; JPEG, PNG and WEBP are accepted.\n"
    assert learned.json["rejected"][0]["name"] == "red/broken.jpg"
    refused(fewshot("adapt", folder, "--on-bad-image", "fail"), "red/broken.jpg: This is not an image")
    asked = fewshot("classify", "beside", folder / "red")
    assert asked.status == 1  # the answers are there, and not all
    assert [line[1] for line in asked.fields] == ["red", "red", "red", ""]
    assert asked.fields[3][4] == "undecodable_example"
    assert asked.err == f"{folder}/red/broken.jpg: This is not an image; JPEG, PNG and WEBP are accepted.\n"
    added = fewshot("add", "beside", folder, "--json")
    assert (added.status, added.json["version"]) == (1, 1)
    assert "Left out red/broken.jpg: This is not an image; JPEG, PNG and WEBP are accepted.\n" in added.err
    (folder / "red" / "broken.jpg").unlink()
    twice = fewshot("add", "beside", folder)
    assert twice.status == 0  # what is there already was read
    assert "Left out red/0.png: The same image was sent twice; it counts once.\n" in twice.err


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 6])
def test_pictures_of_which_none_can_be_read_are_named_each(
    fewshot: Fewshot, folder: Path, tmp_path: Path, count: int
) -> None:
    fewshot("adapt", folder, "--task", "unread")
    files = [tmp_path / f"{k}.png" for k in range(count)]
    for file in files:
        file.write_bytes(b"nothing")
    asked = fewshot("classify", "unread", *files)
    assert asked.status == 1
    assert asked.fields == [[str(file), "", "", "", "undecodable_example"] for file in files]
    text = "This is not an image; JPEG, PNG and WEBP are accepted."
    assert asked.err.splitlines() == [f"{file}: {text}" for file in files]


@pytest.mark.slow
def test_an_example_is_taken_back_by_its_id_or_its_file(fewshot: Fewshot, folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "2.png").write_bytes(picture("blue", seed=70))
    learned = fewshot("adapt", folder, "--task", "taken")
    (suspect,) = (line for line in learned.fields if line[0] == "suspect")
    assert suspect[1:4] == ["red/2.png", "red", "blue"]
    shown = fewshot("tasks", "show", "taken").fields
    assert [line[0] for line in shown if line[0] in ("class", "example")] == ["class", *["example"] * 3] * 2
    examples = [line[1:] for line in shown if line[0] == "example"]
    assert [label for label, _ in examples] == ["blue"] * 3 + ["red"] * 3
    assert ["red", suspect[4]] in examples
    refused(
        fewshot("remove", "taken", "--example", "red/2.png"), "There is no file red/2.png; `fewshot tasks show taken`"
    )
    refused(fewshot("remove", "taken", "--example", "red"), "The task has no example 'red'.")
    less = fewshot("remove", "taken", "--example", folder / "red" / "2.png")
    assert ["class", "red", "2"] in less.fields
    refused(
        fewshot("remove", "taken", "--example", folder / "red" / "2.png"), "2.png is no example of the task 'taken'."
    )
    assert ["class", "blue", "2"] in fewshot("remove", "taken", "--example", examples[0][1]).fields

    (folder / "blue" / "both.png").write_bytes(picture("tan"))
    (folder / "red" / "both.png").write_bytes(picture("tan"))
    fewshot("adapt", folder, "--task", "taken")
    refused(
        fewshot("remove", "taken", "--example", folder / "red" / "both.png"), "is an example of several classes; say"
    )

    drawn(tmp_path / "more", "unlabelled", shots=0)
    (tmp_path / "more" / "unlabelled" / "0.png").write_bytes(picture("red", seed=30))
    assert ["unlabelled", "1"] in fewshot("add", "taken", tmp_path / "more").fields
    less = fewshot("remove", "taken", "--example", tmp_path / "more" / "unlabelled" / "0.png")
    assert less.status == 0
    assert not any(line[0] == "unlabelled" for line in less.fields)


def test_a_name_that_no_task_has_is_said_to_be_none(fewshot: Fewshot, folder: Path) -> None:
    words = "A task name has 1 to 64 letters, digits, '-' or '_'."
    for arguments in (
        ["adapt", folder, "--task", "a/b"],
        ["classify", "a/b", folder],
        ["remove", "a/b", "--label", "red"],
        ["tasks", "show", ".."],
        ["tasks", "forget", "a/b", "--yes"],
    ):
        refused(fewshot(*arguments), words)


def test_the_version_is_that_of_the_project(fewshot: Fewshot) -> None:
    from service.web.app import VERSION

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = fewshot("--version")
    assert (said, said.err, said.status) == (f"fewshot {project['version']}\n", "", 0)
    assert project["version"] == VERSION


@pytest.mark.slow
def test_what_goes_wrong_is_one_sentence_and_status_1(
    fewshot: Fewshot, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(fewshot("classify", "none", folder / "red"), "There is no task 'none'.")
    refused(fewshot("adapt", tmp_path / "none"), f"There is no folder {tmp_path / 'none'}.")
    refused(fewshot("adapt", folder / "red"), "lies in no sub-folder")
    refused(fewshot("classify", "none", tmp_path / "none.png"), "none.png: No such file or directory.")
    assert fewshot("adapt", folder, "--task", "leaves").status == 0
    refused(fewshot("export", "leaves", "-o", tmp_path / "x.tflite"), "x.tflite ends in neither .onnx nor .zip")
    refused(fewshot("adapt", folder, "--method", "magic"), "There is no method 'magic'")
    refused(fewshot("tasks", "--url", "127.0.0.1:9"), "Nothing answers at http://127.0.0.1:9; is the service running")
    refused(fewshot("tasks", "--url", "ftp://x"), "is no address of a service")
    refused(fewshot("tasks", "--url", "http://localhost:80o0"), "'http://localhost:80o0' is no address of a service")
    monkeypatch.setattr("service.cli.operate.ROOT", tmp_path)
    refused(fewshot("bench"), "deploy/bench.py of the project's source")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["adapt"], "Missing argument 'folder'. See `fewshot adapt --help`."),
        (["adapt", "x", "--ttl", "soon"], "'--ttl'"),
        (["adapt", "x", "--retain", "all"], "'--retain'"),
        (["teach"], "No such command 'teach'."),
        (["tasks", "rollback", "x"], "Missing argument 'version'"),
        (["remove", "x"], "Say either --example or --label."),
        (["classify", "x", "y", "--reject", "often"], "'often' is neither a number nor off."),
        (["export", "x"], "Missing option '--output'"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(fewshot: Fewshot, arguments: list[str], words: str) -> None:
    refused(fewshot(*arguments), words, status=2)


@pytest.mark.slow
def test_every_command_that_asks_a_service_takes_its_address_a_key_and_json(fewshot: Fewshot) -> None:
    said = fewshot("--help")
    asking = ["adapt", "add", "remove", "classify", "export", "tasks"]
    commands = [*asking, "serve", "doctor", "keys", "bench", "train"]
    assert [name for name in commands if not re.search(rf"^\W+{name} ", said, re.MULTILINE)] == []
    for command in [*asking, "tasks show", "tasks forget", "tasks rollback"]:
        words = fewshot(*command.split(), "--help")
        assert words.status == 0
        assert all(option in words for option in ("--url", "--key", "--json", "FEWSHOT_URL", "FEWSHOT_KEY")), command


@pytest.mark.slow
def test_a_key_comes_from_the_environment_or_the_command(
    fewshot: Fewshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    made = fewshot("keys", "--file", file, "create", "--tenant", "acme", "--scopes", "adapt,classify")
    assert made.status == 0
    key = made.strip()
    with service(tmp_path, keys_file=file) as (url, _):
        refused(fewshot("tasks", "--url", url), "Set FEWSHOT_KEY, or use --key.")
        assert fewshot("tasks", "--url", url, "--key", key).status == 0
        monkeypatch.setenv("FEWSHOT_KEY", key)
        assert fewshot("tasks", "--url", url).status == 0
    assert "acme" in fewshot("keys", "--file", file, "list")
    assert fewshot("keys", "--file", file, "revoke", next(iter(keys.load(file)))).status == 0
    assert "usage: fewshot keys" in fewshot("keys", "--help")
    assert fewshot("keys", "mend").status == 2


def terminal(arguments: list[str], **variables: str) -> str:
    """What a program shows on a terminal."""
    control, screen = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", **variables}
    try:
        with subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdin=screen, stdout=screen, stderr=screen
        ) as process:
            os.close(screen)
            shown = b""
            while True:
                try:
                    chunk = os.read(control, 65536)
                except OSError:  # Linux says so when the other side is closed
                    break
                if not chunk:
                    break
                shown += chunk
                if b"[y/N]" in chunk:
                    os.write(control, b"n\n")
            process.wait(10)
    finally:
        os.close(control)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n")


@pytest.mark.slow
def test_a_terminal_shows_tables_bars_and_sentences(address: str, folder: Path) -> None:
    (folder / "red" / "2.png").write_bytes(picture("mediumblue", seed=79))
    shown = terminal(program("adapt", folder, "--task", "seen"), FEWSHOT_URL=address)
    assert re.search(r"^class +blue +3 examples *$", shown, re.MULTILINE), shown
    assert re.search(r"^accuracy +\d+ % of its own examples, each held out in turn", shown, re.MULTILINE), shown
    assert re.search(r"red/2.png is called 'red' and looks like 'blue' \(ex_[0-9a-f]{32}\)", shown), shown
    assert "Look at red/2.png of 'red': it looks like 'blue'." in shown
    shown = terminal(program("classify", "seen", folder / "blue" / "0.png"), FEWSHOT_URL=address)
    assert re.search(r"image +label +probability", shown), shown
    assert re.search(r"blue +━+.* \d+ %", shown), shown
    shown = terminal(program("tasks", "forget", "seen"), FEWSHOT_URL=address)
    assert "Forget 'seen' and all its versions for good? [y/N]" in shown
    assert "seen" in terminal(program("tasks"), FEWSHOT_URL=address)
    shown = terminal(program("tasks", "show", "seen"), FEWSHOT_URL=address)
    assert len(re.findall(r"^example +ex_[0-9a-f]{32} *$", shown, re.MULTILINE)) == 6, shown


def test_a_name_with_a_tab_stays_one_field(fewshot: Fewshot, folder: Path) -> None:
    (folder / "red" / "a\tb\n.png").write_bytes(picture("red", seed=9))
    fewshot("adapt", folder, "--task", "odd")
    asked = fewshot("classify", "odd", folder / "red")
    assert [len(line) for line in asked.fields] == [5] * 4
    assert "a b .png" in asked


def test_no_name_of_a_file_and_no_word_of_a_service_is_a_command_to_the_terminal(
    fewshot: Fewshot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = "\x1b]0;owned\x07\x9b2J"
    (folder / "red" / f"{orders}.png").write_bytes(b"no picture")
    (folder / "red" / f"{orders}ok.png").write_bytes(picture("red", seed=9))
    adapted = fewshot("adapt", folder, "--task", "odd")
    asked = fewshot("classify", "odd", folder / "red")
    monkeypatch.setattr(show, "is_terminal", lambda: True)
    shown = fewshot("classify", "odd", folder / "red")
    told = fewshot("tasks", "show", "odd", "--url", f"http://x{orders}")
    plain = fewshot("classify", "odd", folder / "red", "--json")
    assert any(orders in row["image"] for row in json.loads(plain))
    for said in (adapted, adapted.err, asked, asked.err, shown, shown.err, told.err, plain):
        assert not any(order in said for order in ("\x1b]", "\x07", "\x9b")), said
    for said in (adapted.err, asked, shown):
        assert "]0;owned" in said


def test_the_command_loads_neither_the_server_nor_a_model() -> None:
    barred = ("torch", "training", "fastapi", "starlette", "onnxruntime", "numpy", "uvicorn", "redis", "models")
    code = f"import service.cli, sys; sys.exit(', '.join(m for m in {barred!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stderr.strip() == ""


@pytest.mark.slow
@pytest.mark.parametrize(("module", "extra"), [("uvicorn", "serve"), ("typer", "cli"), ("torch", "train")])
def test_what_a_command_lacks_is_named_with_a_remedy(module: str, extra: str) -> None:
    command = {"serve": "serve", "cli": "tasks", "train": "train"}[extra]
    code = f"import sys; sys.modules[{module!r}] = None; from service.cli import main; sys.exit(main([{command!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == (
        f"fewshot: This needs more packages (no {module} here): in the project's folder, pip install '.[{extra}]'.\n"
    )


@pytest.mark.slow
def test_a_pipe_that_closes_early_is_no_error(address: str) -> None:
    line = f"{' '.join(program('tasks'))} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env={**os.environ, "FEWSHOT_URL": address},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_serve_starts_the_service_with_its_flags(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
    arguments = program("serve", "--port", 0, "--artifact", "characters", "--data-dir", tmp_path / "kept")
    with subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**clean, "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout
            found = next(filter(None, (re.search(r"http://[0-9.:]+", line) for line in process.stdout)))
            asked = subprocess.run(
                program("doctor", "--url", found.group(), "--json"),
                cwd=ROOT,
                env=clean,
                capture_output=True,
                timeout=60,
            )
            served = next(check for check in json.loads(asked.stdout)["checks"] if check["name"] == "service")
            assert served["status"] == "ok", served
            assert (tmp_path / "kept" / "fewshot.sqlite3").exists()
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_the_benchmark_is_handed_its_own_arguments() -> None:
    done = subprocess.run(program("bench", "--help"), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "bench.py" in done.stdout


@pytest.mark.torch
def test_training_is_handed_its_own_arguments() -> None:
    done = subprocess.run(program("train", "pretrain", "--help"), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--data" in done.stdout + done.stderr
