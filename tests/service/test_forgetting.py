"""What a task knows depends on its examples and on nothing else: not on when they came, nor on what came and went."""

from __future__ import annotations

import numpy as np
import pytest

from models.calibration import Temperature
from models.head import Head
from service.stores import Record
from service.support import Example, Limits, grown, learn, record_of, rows_of, usable, without_class
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


LIMITS = Limits(max_examples=1000, max_way=CLASSES)


def added(record: Record | None, some: list[tuple[Example, np.ndarray]], method: str) -> Record:
    rows, _ = usable(
        [example for example, _ in some], [], [feature for _, feature in some], on_bad_image="fail", have=record
    )
    if record is None:
        return record_of(rows, artifact="a", method=method, dim=DIM, limits=LIMITS)
    return grown(record, rows, LIMITS, retain=False)


def head(record: Record) -> Head:
    return learn(record, learner(record.method), Temperature(0.1, 0.2, 0.1), None, device="cpu").head


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_classes_one_at_a_time_in_any_order_and_fifty_taken_back_are_the_task_learned_at_once(
    method: str, examples: dict[str, list[tuple[Example, np.ndarray]]]
) -> None:
    gone = set(np.random.default_rng(7).permutation(list(examples))[:GONE].tolist())
    whole = head(added(None, [one for some in examples.values() for one in some], method)).to_bytes()
    rest = [one for name, some in examples.items() if name not in gone for one in some]
    left = head(added(None, rest, method)).to_bytes()
    assert whole != left
    for order in range(3):
        rng = np.random.default_rng(order)
        record = None
        for name in rng.permutation(list(examples)):
            record = added(record, [examples[name][k] for k in rng.permutation(SHOT)], method)
        assert record is not None
        assert head(record).to_bytes() == whole
        for name in rng.permutation(sorted(gone)):
            fewer = without_class(rows_of(record), str(name))
            record = record_of(fewer, artifact="a", method=method, dim=DIM, limits=LIMITS)
        assert head(record).to_bytes() == left
