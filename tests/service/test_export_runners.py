"""The program beside an exported task, as a person runs it."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from models.artifact import GRAPH, Artifact
from models.head import Affine, Head
from service.export_onnx import Answers, Exported, bundle, facts_of
from tests.fakes import a_head, picture, tiny_text_artifact
from tests.service.test_export_onnx import POINTER, file_of, graphed

Ran = subprocess.CompletedProcess[str]


def run(folder: Path, *arguments: object, **variables: str) -> Ran:
    command = [sys.executable, str(folder / "run.py"), *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def exported(artifact: Artifact, head: Head, folder: Path) -> Path:
    """What leaves of a task, unpacked; without golden vectors, which are not looked at here."""
    facts = facts_of(artifact, "t", POINTER, head, precision="float32", reject=0.05)
    answers = Answers(np.zeros((0, 2), np.float32), np.zeros(0, np.float32))
    made = Exported(file_of(artifact, head), facts, np.zeros(0, np.uint8), answers, artifact.kind)
    with zipfile.ZipFile(io.BytesIO(bundle(made))) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A task whose two classes are alike, whatever it is asked; with two pictures, and a file that is none."""
    head = a_head(way=2)
    alike = Affine(np.zeros_like(head.affine.weight), np.zeros_like(head.affine.bias))
    head = dataclasses.replace(head, labels=("日本", "語"), affine=alike)
    folder = exported(graphed(tmp_path), head, tmp_path / "unpacked")
    for colour in ("red", "blue"):
        (folder / f"{colour}.png").write_bytes(picture(colour))
    (folder / "broken.png").write_bytes(picture("red")[:60])
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A task that reads texts, by the sum of their bytes."""
    artifact, kind = tiny_text_artifact(tmp_path), onnx.TensorProto
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["texts"], ["floats"], to=kind.FLOAT),
            onnx.helper.make_node("MatMul", ["floats", "ones"], ["features"]),
        ],
        "sums",
        [onnx.helper.make_tensor_value_info("texts", kind.UINT8, ["n", 64])],
        [onnx.helper.make_tensor_value_info("features", kind.FLOAT, ["n", 3])],
        [onnx.numpy_helper.from_array(np.full((64, 3), 1e-4, np.float32), "ones")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), artifact.path / GRAPH)
    return exported(artifact, a_head(way=2), tmp_path / "unpacked")


def test_of_classes_that_score_the_same_the_first_is_named_as_by_the_service(images: Path) -> None:
    said = run(images, "red.png", PYTHONUTF8="1").stdout
    assert said == "red.png: 日本\n  日本 0.500000\n  語 0.500000\n"


def test_a_bad_file_is_named_and_the_others_are_answered(images: Path) -> None:
    done = run(images, "red.png", "broken.png", "none.png", "blue.png", PYTHONUTF8="1")
    assert done.returncode == 1
    assert re.findall(r"^(\S+): ", done.stdout, re.MULTILINE) == ["red.png", "blue.png"]
    broken, missing = done.stderr.splitlines()
    assert broken.startswith("broken.png: ")
    assert "none.png: [Errno 2] No such file" in missing


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_label_in_letters_that_a_terminal_has_not_is_printed_as_their_numbers(images: Path, encoding: str) -> None:
    done = run(images, "red.png", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("red.png: \\u65e5\\u672c\n")


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_without_a_file_it_says_how_it_is_used(kind: str, request: pytest.FixtureRequest) -> None:
    done = run(request.getfixturevalue(kind))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python run.py ")


def test_a_text_that_the_service_refuses_is_refused(texts: Path) -> None:
    for name, text in {"empty": b"", "mark": b"\xef\xbb\xbf \n", "nul": b"a\0b", "latin": b"caf\xe9"}.items():
        (texts / name).write_bytes(text)
    (texts / "fine").write_bytes(b"a text")
    done = run(texts, "empty", "mark", "nul", "latin", "fine")
    assert done.returncode == 1
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["empty", "mark", "nul", "latin"]
    assert re.findall(r"^(\S+): ", done.stdout, re.MULTILINE) == ["fine"]
