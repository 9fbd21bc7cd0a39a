from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import data, synthetic

ROOT = Path(__file__).resolve().parents[2]

# One thread: the same sums in the same order in every process, and no quarrel over the cores.
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def needs(*modules: str) -> None:
    """Skips the calling test file without these modules, or fails where FEWSHOT_TEST_REQUIRE names torch."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        if "torch" in modules:
            import torch

            torch.set_num_threads(1)
        return
    reason = f"{', '.join(missing)} cannot be imported"
    if "torch" in os.environ.get("FEWSHOT_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{reason}, and FEWSHOT_TEST_REQUIRE names torch", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def noise(classes: int, images: int, *, size: int = 16, channels: int = 3, seed: int = 0) -> data.Images:
    """Images of nothing, for whoever only counts them or wants gradients that are not zero."""
    rng = np.random.default_rng(seed)
    n = classes * images
    pixels = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    names = tuple(f"class{label}" for label in range(classes))
    return data.Images(pixels, np.repeat(np.arange(classes), images), names, np.full(n, -1))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of drawn shapes: six to train on, two for validation, two for the test."""
    return synthetic.write(tmp_path_factory.mktemp("data") / "shapes", classes=10, images=12)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m training demo` leaves behind: shapes/, run/ and artifact/; and printed.md, what it printed."""
    needs("torch", "onnx", "onnxruntime", "onnxscript")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # one for all processes of the run: it takes a minute to make
    folder, made = base / "demo", base / "demo.made"
    with (base / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of who failed
            folder.mkdir()
            with (folder / "printed.md").open("w") as printed, (folder / "errors.log").open("w") as errors:
                done = subprocess.run(
                    [sys.executable, "-W", "error", "-m", "training", "demo", "--out", folder],
                    cwd=ROOT,
                    env={**os.environ, **THREADS},
                    stdout=printed,
                    stderr=errors,
                )
            assert done.returncode == 0, (folder / "errors.log").read_text()
            made.touch()
    return folder


class Command:
    """`python -m training ...` as a process of its own."""

    def __init__(self, arguments: list[str], log: Path):
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "training", *arguments],
                cwd=ROOT,
                env={**os.environ, **THREADS},
                stdout=file,
                stderr=file,
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL; fails if the command had ended before."""
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, self.log.read_text()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands; what a failing test leaves running is ended."""
    started: list[Command] = []

    def start(*arguments: str) -> Command:
        started.append(Command(list(arguments), tmp_path / "commands.log"))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def killed(commands: dict[Command, Callable[[], bool]]) -> None:
    """Kills each command at the first look that finds what it was to reach."""
    waiting = dict(commands)
    while waiting:
        for one, reached in list(waiting.items()):
            if one.ended() or reached():
                one.kill()
                del waiting[one]
        time.sleep(0.002)


def tree(checkpoint: Path) -> Any:
    """What a checkpoint holds beside its tensors; empty while there is none.

    The file is opened once: whoever trains may put another in its place at any time, and safetensors opens it twice.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value["items"]}
        return [plain(item) for item in value] if isinstance(value, list) else value

    try:
        with checkpoint.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError:
        return {}
    return plain(json.loads(header["__metadata__"]["tree"]))


@pytest.fixture(scope="module")
def unbroken(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining on the drawn shapes."""
    from tests.training.runs import TINY  # torch may be absent
    from training import pretrain
    from training.config import PretrainConfig

    out = tmp_path_factory.mktemp("unbroken")
    pretrain.main(PretrainConfig(data=shapes, out=out, **TINY, epochs=2))
    return out
