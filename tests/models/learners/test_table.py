"""models/learners/__init__.py: from a method's name and its arrays to the learner."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from models.learners import LEARNERS, build
from tests.models.learners.given import METHODS, arrays


@pytest.mark.parametrize("method", METHODS)
def test_a_learner_is_built_from_its_arrays_in_single_precision(method: str) -> None:
    halves = {name: value.astype(np.float16) for name, value in arrays(method).items()}
    found = build(method, halves)
    assert isinstance(found, LEARNERS[method])
    for name, value in halves.items():
        kept = getattr(found, name)
        assert kept.dtype == np.float32
        assert np.array_equal(kept, value)


@pytest.mark.parametrize("method", METHODS)
def test_a_learner_cannot_be_changed(method: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        build(method, arrays(method)).log_scale = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_or_unknown_array_is_named(method: str) -> None:
    complete = arrays(method)
    first = sorted(complete)[0]
    with pytest.raises(TypeError, match=first):
        build(method, {name: value for name, value in complete.items() if name != first})
    with pytest.raises(TypeError, match="surplus"):
        build(method, {**complete, "surplus": np.zeros(1)})


def test_an_unknown_method_is_no_learner() -> None:
    with pytest.raises(KeyError):
        build("nearest", {})
