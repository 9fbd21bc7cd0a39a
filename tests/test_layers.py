"""Who may import whom. Each rule is shown to notice what it forbids before it is held against the project."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "service", "training")


class Import(NamedTuple):
    path: str  # of the file, from the root
    inside: str  # the function it stands in; empty at the top of the file
    module: str


def imports(path: str, source: str) -> Iterator[Import]:
    """Everything a file imports: at its top or inside a function, by a statement or by a string given to importlib.

    `from a import b` gives both "a" and "a.b", since b may be a module. Relative imports are made absolute.
    """
    todo: list[tuple[ast.AST, str]] = [(ast.parse(source, filename=path), "")]
    while todo:
        node, inside = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = node.name
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]
        names: list[str] = []
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=module, names=aliases, level=level):
                package = Path(path).parent.parts
                above = package[: len(package) - level + 1] if level else ()
                start = ".".join([*above, *([module] if module else [])])
                names = [start, *(f"{start}.{alias.name}" for alias in aliases)]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names = [name]
        yield from (Import(path, inside, name) for name in names)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def models_know_neither_service_nor_training_nor_their_libraries(found: Import) -> bool:
    return found.path.startswith("models/") and within(
        found.module, "service", "training", "fastapi", "starlette", "redis", "pydantic", "pydantic_settings"
    )


def service_and_training_do_not_know_each_other(found: Import) -> bool:
    package = found.path.split("/")[0]
    return (package == "service" and within(found.module, "training")) or (
        package == "training" and within(found.module, "service")
    )


def torch_is_imported_where_devices_or_gradients_are(found: Import) -> bool:
    allowed = (
        found.path.startswith("training/")
        or found.path in ("models/resnet.py", "models/bytenet.py", "models/extractor_torch.py")
        or (found.path, found.inside) == ("models/arrays.py", "place")
    )
    return within(found.module, "torch", "safetensors.torch") and not allowed


def onnxruntime_is_imported_by_its_extractor_and_where_graphs_are_written(found: Import) -> bool:
    allowed = found.path in ("models/extractor_onnx.py", "training/export.py") or (
        found.path.startswith("training/") and within(found.module, "onnxruntime.quantization")
    )
    return within(found.module, "onnxruntime") and not allowed


def http_is_known_in_web_only(found: Import) -> bool:
    if not found.path.startswith("service/") or found.path.startswith("service/web/"):
        return False
    server = within(found.module, "uvicorn") and found.path != "service/__main__.py"
    return server or within(found.module, "fastapi", "starlette")


def learners_see_arrays_episodes_heads_and_each_other(found: Import) -> bool:
    return (
        found.path.startswith("models/learners/")
        and found.module.startswith("models.")
        and not within(found.module, "models.arrays", "models.episode", "models.head", "models.learners")
    )


def the_client_needs_httpx_alone(found: Import) -> bool:
    known = within(found.module, "httpx", "service.client", *sys.stdlib_module_names)
    return found.path.startswith("service/client/") and not known


def the_command_loads_what_it_starts_when_it_starts_it(found: Import) -> bool:
    at_once = within(found.module, "typer", "rich", "service.cli", "service.client", *sys.stdlib_module_names)
    later = found.inside and within(found.module, "service.__main__", "service.keys", "service.doctor")
    return found.path.startswith("service/cli/") and not at_once and not later


Rule = Callable[[Import], bool]  # whether it forbids that import

# Each rule with files that break it, and files close by that do not.
RULES: list[tuple[Rule, list[tuple[str, str]], list[tuple[str, str]]]] = [
    (
        models_know_neither_service_nor_training_nor_their_libraries,
        [
            ("models/head.py", "import redis"),
            ("models/head.py", "from pydantic import BaseModel"),
            ("models/images.py", "def later():\n    import fastapi.responses"),
            ("models/artifact.py", "from service.stores import Record"),
            ("models/learners/ridge.py", "from ...training import losses"),
        ],
        [("models/head.py", "import numpy\nfrom models import arrays"), ("service/settings.py", "import pydantic")],
    ),
    (
        service_and_training_do_not_know_each_other,
        [
            ("service/engine.py", "from training.episodes import Pool"),
            ("service/web/app.py", "import importlib\nimportlib.import_module('training.export')"),
            ("training/export.py", "if True:\n    from service import settings"),
        ],
        [("service/engine.py", "from models.head import Head"), ("training/export.py", "from training import data")],
    ),
    (
        torch_is_imported_where_devices_or_gradients_are,
        [
            ("models/head.py", "import torch"),
            ("models/arrays.py", "import torch"),
            ("models/arrays.py", "def fetch(x):\n    from torch import Tensor"),
            ("models/learners/lstm.py", "from torch.nn import functional"),
            ("models/text.py", "import torch"),
            ("models/artifact.py", "from safetensors.torch import load_file"),
            ("service/batcher.py", "async def go():\n    import torch.cuda"),
            ("service/web/app.py", "import importlib\ntorch = importlib.import_module('torch')"),
            ("service/engine.py", "torch = __import__('torch')"),
        ],
        [
            ("models/arrays.py", "def place(x):\n    import torch"),
            ("models/resnet.py", "import torch"),
            ("models/bytenet.py", "import torch"),
            ("models/head.py", "import torchless\nfrom safetensors.numpy import load"),
        ],
    ),
    (
        onnxruntime_is_imported_by_its_extractor_and_where_graphs_are_written,
        [
            ("service/batcher.py", "import onnxruntime as ort"),
            ("models/extractor.py", "def load():\n    from onnxruntime import InferenceSession"),
            ("training/evaluate.py", "import onnxruntime"),
        ],
        [
            ("models/extractor_onnx.py", "import onnxruntime"),
            ("training/export.py", "import onnxruntime"),
            ("training/int8.py", "from onnxruntime.quantization import quantize_static"),
        ],
    ),
    (
        http_is_known_in_web_only,
        [
            ("service/engine.py", "from fastapi import HTTPException"),
            ("service/batcher.py", "import starlette.concurrency"),
            ("service/__main__.py", "import fastapi"),
            ("service/engine.py", "import uvicorn"),
        ],
        [("service/__main__.py", "import uvicorn"), ("service/web/app.py", "import fastapi, starlette.types")],
    ),
    (
        the_client_needs_httpx_alone,
        [
            ("service/client/pictures.py", "from PIL import Image"),
            ("service/client/errors.py", "from models import errors"),
            ("service/client/plans.py", "from service.settings import Settings"),
            ("service/client/sync.py", "def later():\n    import numpy"),
        ],
        [
            ("service/client/sync.py", "import httpx, time\nfrom service.client import values"),
            ("service/doctor/store.py", "import redis"),
        ],
    ),
    (
        the_command_loads_what_it_starts_when_it_starts_it,
        [
            ("service/cli/operate.py", "from service.keys import main"),
            ("service/cli/operate.py", "import service.__main__"),
            ("service/cli/teach.py", "def adapt():\n    import torch"),
            ("service/cli/operate.py", "def train():\n    from training import pretrain"),
        ],
        [
            ("service/cli/operate.py", "def keys():\n    from service.keys import main"),
            ("service/cli/show.py", "import json\nfrom rich.table import Table\nfrom service.client import Client"),
        ],
    ),
    (
        learners_see_arrays_episodes_heads_and_each_other,
        [
            ("models/learners/ridge.py", "from models.images import ImageDecoder"),
            ("models/learners/ridge.py", "from models import artifact"),
            ("models/learners/ridge.py", "from .. import extractor"),
            ("models/learners/__init__.py", "import models.calibration"),
        ],
        [
            ("models/learners/ridge.py", "from models.head import Affine\nfrom .prototype import prototypes"),
            ("models/artifact.py", "from models.images import ImageDecoder"),
        ],
    ),
]

BREAKING = [(rule, path, source) for rule, breaking, _ in RULES for path, source in breaking]
KEEPING = [(rule, path, source) for rule, _, keeping in RULES for path, source in keeping]


def name(value: object) -> str:
    return getattr(value, "__name__", str(value)).replace("\n", " ")


@pytest.fixture(scope="module")
def project() -> list[Import]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [found for file in files for found in imports(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))]


@pytest.mark.parametrize(("rule", "path", "source"), BREAKING, ids=name)
def test_a_planted_import_is_noticed(rule: Rule, path: str, source: str) -> None:
    assert any(rule(found) for found in imports(path, source))


@pytest.mark.parametrize(("rule", "path", "source"), KEEPING, ids=name)
def test_what_stands_close_by_is_allowed(rule: Rule, path: str, source: str) -> None:
    assert not any(rule(found) for found in imports(path, source))


@pytest.mark.slow
def test_the_walk_reaches_every_package_and_the_imports_inside_functions(project: list[Import]) -> None:
    assert {found.path.split("/")[0] for found in project} == set(PACKAGES)
    assert Import("models/arrays.py", "place", "torch") in project
    assert Import("models/learners/lstm.py", "", "models.learners.memory") in project


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule for rule, _, _ in RULES], ids=name)
def test_the_project_keeps_the_rule(rule: Rule, project: list[Import]) -> None:
    assert [f"{found.path} imports {found.module}" for found in project if rule(found)] == []
