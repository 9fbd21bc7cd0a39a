"""The program beside an exported task, as a person runs it."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from models.head import Affine
from service.export_onnx import Answers, Exported, bundle, facts_of
from tests.fakes import a_head, picture
from tests.service.test_export_onnx import POINTER, file_of, graphed

Ran = subprocess.CompletedProcess[str]


def run(folder: Path, *arguments: object, **variables: str) -> Ran:
    command = [sys.executable, str(folder / "run.py"), *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def unpacked(exported: Exported, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(bundle(exported))) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """What is exported of a task whose two classes are alike, whatever it is asked."""
    artifact, head = graphed(tmp_path), a_head(way=2)
    alike = Affine(np.zeros_like(head.affine.weight), np.zeros_like(head.affine.bias))
    head = dataclasses.replace(head, labels=("ant", "zebra"), affine=alike)
    facts = facts_of(artifact, "t", POINTER, head, precision="float32", reject=0.05)
    none = np.zeros((0, 16, 16, 3), np.uint8)
    answers = Answers(np.zeros((0, 2), np.float32), np.zeros(0, np.float32))
    folder = unpacked(Exported(file_of(artifact, head), facts, none, answers), tmp_path / "unpacked")
    (folder / "red.png").write_bytes(picture("red"))
    (folder / "blue.png").write_bytes(picture("blue"))
    return folder


def test_of_classes_that_score_the_same_the_first_is_named_as_by_the_service(images: Path) -> None:
    assert "red.png: ant\n  ant 0.500000\n  zebra 0.500000\n" in run(images, "red.png").stdout
