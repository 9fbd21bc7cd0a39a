"""What a task knows depends on its examples and on nothing else: not on when they came, nor on what came and went."""

from __future__ import annotations

import numpy as np
import pytest

from models.calibration import Temperature
from models.head import Head
from service.support import Example, Limits, Rows, learn, record_of, usable, without_class
from tests.models.learners.given import DIM, METHODS, learner, unit

CLASSES, SHOT, GONE = 100, 2, 50


@pytest.fixture(scope="module")
def examples() -> dict[str, list[tuple[Example, np.ndarray]]]:
    """For each of a hundred classes its examples and their features."""
    rng = np.random.default_rng(0)
    features = unit(rng.standard_normal((CLASSES, 1, DIM)) + 0.4 * rng.standard_normal((CLASSES, SHOT, DIM)))
    return {
        f"class {number}": [
            (Example(f"class {number}", f"{number}/{shot}".encode()), features[number, shot].astype(np.float32))
            for shot in range(SHOT)
        ]
        for number in range(CLASSES)
    }


def added(rows: Rows | None, some: list[tuple[Example, np.ndarray]]) -> Rows:
    return usable(
        [example for example, _ in some], [], [feature for _, feature in some], on_bad_image="fail", have=rows
    )[0]


def head(method: str, rows: Rows) -> Head:
    limits = Limits(max_examples=1000, max_way=CLASSES)
    record = record_of(rows, artifact="a", method=method, dim=DIM, limits=limits)
    return learn(record, learner(method), Temperature(0.1, 0.2, 0.1), None, device="cpu").head


@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_classes_one_at_a_time_in_any_order_and_fifty_taken_back_are_the_task_learned_at_once(
    method: str, examples: dict[str, list[tuple[Example, np.ndarray]]]
) -> None:
    gone = set(np.random.default_rng(7).permutation(list(examples))[:GONE].tolist())
    whole = head(method, added(None, [one for some in examples.values() for one in some])).to_bytes()
    left = head(method, added(None, [one for name, some in examples.items() if name not in gone for one in some]))
    assert whole != left.to_bytes()
    for order in range(3):
        rng = np.random.default_rng(order)
        rows = None
        for name in rng.permutation(list(examples)):
            rows = added(rows, [examples[name][k] for k in rng.permutation(SHOT)])
        assert rows is not None
        assert head(method, rows).to_bytes() == whole
        for name in rng.permutation(sorted(gone)):
            rows = without_class(rows, str(name))
        assert head(method, rows).to_bytes() == left.to_bytes()
