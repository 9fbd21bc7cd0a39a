"""What no line of the project may say: code from bytes, programs, and errors' own words in answers.

tests/audit.py sees what happens; this sees what could. Each rule is shown to notice what it forbids first.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVING = ("models", "service")

MODULES = re.compile(
    r"(pickle|_pickle|cPickle|marshal|shelve|joblib|dill|cloudpickle|jsonpickle|subprocess|pty|ctypes|cffi"
    r"|multiprocessing|xmlrpc|code|codeop|imp|runpy|telnetlib|ftplib|smtplib|paramiko)(\.|$)"
)
CALLS = re.compile(
    r"eval|exec|compile|__import__|breakpoint|(torch|joblib|dill)\.load|yaml\.(load|unsafe_load|full_load)"
    r"|(np|numpy)\.(load|fromregex)|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*|fork)|sys\.setprofile"
    r"|(pandas|pd)\.read_pickle|traceback\.(format|print)_\w+|.*\.allow_pickle"
)
# What stands in the command of a person at a terminal, who may start what they like.
BESIDE = ("service/cli/", "service/client/")
# Where a program speaks to the person who started it, an error may have its words.
SPEAKING = (*BESIDE, "service/__main__.py", "service/doctor/", "service/keys.py", "service/secrets.py")
# Lines that are no such thing, with why.
LOOKED_AT = {
    "models/artifact.py": 2,  # an artifact that is refused at the start
    "service/stores/sqlite_file.py": 1,  # a folder that is refused at the start
    "service/stores/redis_link.py": 3,  # for the log, cut to Redis's own words
    "service/web/connections.py": 1,  # a number of bytes
}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute of one; the last parts where it begins with something else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(source: str) -> Iterator[str]:
    """Modules and calls that would make code of bytes, or start a program."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (f"line {node.lineno}: imports {name}" for name in names if MODULES.match(name))
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if CALLS.fullmatch(name):
                yield f"line {node.lineno}: calls {name}"
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "shell") and not _is(keyword.value, False):
                    yield f"line {node.lineno}: {keyword.arg}"
                if keyword.arg == "weights_only" and not _is(keyword.value, True):
                    yield f"line {node.lineno}: {keyword.arg}"


def _is(node: ast.AST, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def spoken(source: str) -> Iterator[str]:
    """Places where the words of an exception that was not made here become text: str, repr, format, args.

    The words of our own errors are in `detail`. To compare them is no harm, and neither is the log, which nobody but
    the operator reads.
    """
    tree = ast.parse(source)
    seen: set[str] = set()
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for scope in ast.walk(tree):
        caught: set[str] = set()
        if isinstance(scope, ast.ExceptHandler) and scope.name:
            caught = {scope.name}
        elif isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]
            caught = {
                one.arg
                for one in given
                if one.annotation and re.search(r"Error|Exception", ast.unparse(one.annotation))
            }
        for node in ast.walk(scope) if caught else ():
            text = None
            if isinstance(node, ast.FormattedValue):
                text = node.value
            elif isinstance(node, ast.Call) and dotted(node.func) in ("str", "repr", "format", "ascii") and node.args:
                text = node.args[0]
            elif isinstance(node, ast.Attribute) and node.attr == "args" and dotted(node.value) in caught:
                text = node.value
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant):
                text = node.right
            if text is None or not {one.id for one in ast.walk(text) if isinstance(one, ast.Name)} & caught:
                continue
            plain = dotted(text).split(".")[1:]  # our own sentences, and numbers
            if plain and plain[-1] in ("detail", "code", "strerror", "status_code", "index", "retry_after", "__name__"):
                continue
            above = parents.get(node)
            asked = isinstance(above, ast.Attribute) and above.attr in ("startswith", "endswith")
            if asked or isinstance(above, ast.Compare) or _logged(node, parents):
                continue
            seen.add(f"line {node.lineno}: {ast.unparse(text)}")
    yield from sorted(seen)


def _logged(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    above = parents.get(node)
    while above is not None and not isinstance(above, ast.stmt):
        if isinstance(above, ast.Call) and dotted(above.func).startswith("log."):
            return True
        above = parents.get(above)
    return False


FORBIDDEN = [
    "import pickle",
    "from marshal import loads",
    "def f():\n    import subprocess",
    "import torch\ntorch.load('x')",
    "import torch\ntorch.load('x', weights_only=False)",
    "import yaml\nyaml.load(x)",
    "import numpy as np\nnp.load('x')",
    "x.read(allow_pickle=True)",
    "eval('1')",
    "exec('1')",
    "compile('1', '', 'exec')",
    "import os\nos.system('x')",
    "from joblib import load",
    "import ctypes",
]
NOT_FORBIDDEN = ["import re\nre.compile('x')", "model.eval()", "import json\njson.loads(x)", "f(allow_pickle=False)"]
SPOKEN = [
    "try: ...\nexcept OSError as error:\n    answer(str(error))",
    "try: ...\nexcept OSError as error:\n    answer(f'{error}')",
    "try: ...\nexcept OSError as error:\n    answer(f'{error!r}')",
    "try: ...\nexcept OSError as error:\n    raise InvalidRequest('%s' % error)",
    "try: ...\nexcept OSError as error:\n    answer(error.args[0])",
    "def handler(request, error: Exception):\n    return problem(repr(error.__cause__))",
]
NOT_SPOKEN = [
    "try: ...\nexcept OSError as error:\n    log.warning('%s', str(error))",
    "try: ...\nexcept FewshotError as error:\n    answer(f'{error.detail}')",
    "try: ...\nexcept OSError as error:\n    if 'x' in str(error):\n        raise",
    "def handler(request, error: Exception):\n    return problem('Something is wrong.')",
]


@pytest.mark.parametrize("source", FORBIDDEN)
def test_a_planted_call_or_import_is_noticed(source: str) -> None:
    assert list(forbidden(source))


@pytest.mark.parametrize("source", SPOKEN)
def test_a_planted_word_of_an_exception_is_noticed(source: str) -> None:
    assert list(spoken(source))


@pytest.mark.parametrize("source", NOT_FORBIDDEN + NOT_SPOKEN)
def test_what_is_close_by_is_allowed(source: str) -> None:
    assert [*forbidden(source), *spoken(source)] == []


def files(*packages: str) -> list[Path]:
    return [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.slow
def test_nothing_that_serves_makes_code_of_bytes_or_starts_programs() -> None:
    found = {file.relative_to(ROOT).as_posix(): list(forbidden(file.read_text())) for file in files(*SERVING)}
    assert len(found) > 60
    assert {name: lines for name, lines in found.items() if lines and not name.startswith(BESIDE)} == {}


@pytest.mark.slow
def test_no_answer_has_the_words_of_an_exception() -> None:
    named = [file.relative_to(ROOT).as_posix() for file in files(*SERVING)]
    asked = [name for name in named if not name.startswith(SPEAKING)]
    found = {name: list(spoken((ROOT / name).read_text())) for name in asked}
    assert {name: lines for name, lines in found.items() if len(lines) > LOOKED_AT.get(name, 0)} == {}
