from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.fakes import MeanColour, tiny_artifact
from tests.service.live import served

LIMITS = {
    "max_body_bytes": 400_000,
    "body_timeout_s": 1.0,
    "max_example_bytes": 200_000,
    "max_pixels": 1_000_000,
    "max_examples": 40,
    "max_retained_bytes": 300_000,
    "max_queries": 8,
    "max_way": 6,
    "max_label": 32,
    "lanes": 2,
}


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def http(store: MemoryStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a running service that knows mean colours, with small limits."""
    artifact = tiny_artifact(tmp_path_factory.mktemp("artifact"))
    settings = Settings(**LIMITS)  # type: ignore[arg-type]
    with served(create_app(settings, artifact=artifact, extractor=MeanColour(), store=store)) as client:
        yield client


@pytest.fixture
def nothing_stored(store: MemoryStore) -> Iterator[None]:
    """Whatever the test does, the store is as it was."""
    before = dict(store.values)
    yield
    assert store.values == before
