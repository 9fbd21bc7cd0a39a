from __future__ import annotations

import os
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """torch, one thread; without it the test is skipped, or fails where FEWSHOT_TEST_REQUIRE names it."""
    if "torch" in os.environ.get("FEWSHOT_TEST_REQUIRE", "").split(","):
        import torch as found
    else:
        found = pytest.importorskip("torch", reason="torch is not installed")
    found.set_num_threads(1)
    return found
