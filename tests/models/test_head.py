from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from models.head import FORMAT, Affine, Head, HeadInvalid

RNG = np.random.default_rng(0)


def head(**replaced: Any) -> Head:
    parts: dict[str, Any] = {
        "affine": Affine(RNG.standard_normal((3, 8)).astype(np.float32), RNG.standard_normal(3).astype(np.float32)),
        "labels": ("red", "blå", "<b>\n\0 🦊"),
        "shots": (1, 5, 2),
        "method": "ridge",
        "artifact": "sha256:" + 64 * "a",
    }
    return Head(**{**parts, **replaced})


def same(one: Head, other: Head) -> bool:
    texts = all(
        getattr(one, name) == getattr(other, name) for name in ("labels", "shots", "method", "artifact", "gauge")
    )
    return texts and all(map(np.array_equal, one.affine, other.affine))


def test_a_row_of_probabilities_is_a_softmax_over_the_classes() -> None:
    found = head(affine=Affine(np.eye(3, dtype=np.float32), np.array([0, 0, np.log(2)], np.float32)))
    chances = found.probabilities(np.array([[0, 0, 0], [np.log(4), 0, 0]], np.float32))
    np.testing.assert_allclose(chances, [[1 / 4, 1 / 4, 2 / 4], [4 / 7, 1 / 7, 2 / 7]], rtol=1e-6)
    assert chances.dtype == np.float32


def test_probabilities_sum_to_one_however_sure_the_head_is() -> None:
    found = head(affine=Affine(1e4 * RNG.standard_normal((3, 8)).astype(np.float32), np.zeros(3, np.float32)))
    chances = found.probabilities(RNG.standard_normal((100, 8)).astype(np.float32))
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-6)


def test_a_head_comes_back_from_its_bytes_as_it_was() -> None:
    found = head()
    assert same(Head.from_bytes(found.to_bytes()), found)


@pytest.mark.parametrize("gauge", [(-3.25, 0.1), (1 / 3, 1e-9), (7, 2)])
def test_a_gauge_comes_back_as_it_was(gauge: tuple[float, float]) -> None:
    assert Head.from_bytes(head(gauge=gauge).to_bytes()).gauge == gauge
    assert Head.from_bytes(head().to_bytes()).gauge is None


@pytest.mark.parametrize(
    "gauge", [(), (1.0,), 7, ("a", 1.0), (0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))]
)
def test_a_gauge_that_could_not_be_read_against_is_no_head(gauge: Any) -> None:
    with pytest.raises(HeadInvalid):
        Head.from_bytes(head(gauge=gauge).to_bytes())


def test_a_head_as_it_was_written_before_there_were_gauges_counts_as_gone() -> None:
    found = head()
    text = {"format": "fewshot-head-1", "labels": found.labels, "shots": found.shots}
    text |= {"method": found.method, "artifact": found.artifact}
    with pytest.raises(HeadInvalid):
        Head.from_bytes(save(found.affine._asdict(), metadata={"head": json.dumps(text)}))
    with pytest.raises(HeadInvalid):  # nor does another name make it one of today's
        Head.from_bytes(found.to_bytes().replace(FORMAT.encode(), b"fewshot-head-1"))


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    found, features = head(), RNG.standard_normal((5, 8)).astype(np.float32)
    logits = features @ found.affine.weight.T + found.affine.bias
    np.testing.assert_array_equal(found.logits(features), logits)
    np.testing.assert_allclose(
        found.probabilities(features), np.exp(logits) / np.exp(logits).sum(1)[:, None], rtol=1e-5
    )


def test_equal_heads_have_equal_bytes() -> None:
    found = head(gauge=(0.1, 0.2))
    assert len({Head.from_bytes(found.to_bytes()).to_bytes() for _ in range(20)}) == 1


@pytest.mark.parametrize("view", [lambda a: a.T.copy().T, lambda a: np.repeat(a, 2, axis=1)[:, ::2], lambda a: a[::-1]])
def test_a_head_of_views_comes_back_as_it_was(view: Callable[[np.ndarray], np.ndarray]) -> None:
    """Learners give transposed weights; their memory lies in another order than their numbers."""
    weight = view(RNG.standard_normal((3, 8)).astype(np.float32))
    assert not weight.flags.c_contiguous
    found = head(affine=Affine(weight, np.zeros(3, np.float32)))
    assert same(Head.from_bytes(found.to_bytes()), found)


def test_a_person_can_read_what_the_bytes_hold() -> None:
    data = head().to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["weight"]["shape"] == [3, 8]
    text = json.loads(header["__metadata__"]["head"])
    assert (text["labels"][0], text["method"], text["shots"]) == ("red", "ridge", [1, 5, 2])


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("labels", ("red", "blue")),
        ("labels", ("red", "blue", "green", "grey")),
        ("labels", ("red", "blue", 3)),
        ("shots", (1, 5)),
        ("shots", (1, 5, "2")),
        ("method", None),
        ("artifact", 7),
    ],
)
def test_labels_shots_and_rows_must_fit_together(part: str, wrong: object) -> None:
    data = head(**{part: wrong}).to_bytes()
    with pytest.raises(HeadInvalid):
        Head.from_bytes(data)


@pytest.mark.parametrize(
    "affine",
    [
        Affine(np.zeros((3, 8)), np.zeros(3)),
        Affine(np.zeros((3, 8), np.float32), np.zeros(3, np.float16)),
        Affine(np.zeros(24, np.float32), np.zeros(3, np.float32)),
        Affine(np.zeros((3, 8), np.float32), np.zeros((3, 1), np.float32)),
        Affine(np.zeros((2, 8), np.float32), np.zeros(3, np.float32)),
        Affine(np.full((3, 8), np.nan, np.float32), np.zeros(3, np.float32)),
        Affine(np.zeros((3, 8), np.float32), np.array([0, np.inf, 0], np.float32)),
    ],
)
def test_weights_of_another_type_or_shape_or_not_finite_are_no_head(affine: Affine) -> None:
    with pytest.raises(HeadInvalid):
        Head.from_bytes(head(affine=affine).to_bytes())


def test_a_single_class_is_no_head() -> None:
    one = Affine(np.zeros((1, 8), np.float32), np.zeros(1, np.float32))
    with pytest.raises(HeadInvalid):
        Head.from_bytes(head(affine=one, labels=("red",), shots=(1,)).to_bytes())


def test_bytes_of_another_format_are_no_head() -> None:
    data = head().to_bytes()
    with pytest.raises(HeadInvalid):
        Head.from_bytes(data.replace(FORMAT.encode(), b"fewshot-head-9"))
    with pytest.raises(HeadInvalid):
        Head.from_bytes(save(load(data)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        bytes(8),
        b"\xff" * 64,
        pickle.dumps({"weight": [1.0]}),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (2).to_bytes(8, "little") + b"{}",
    ],
    ids=["empty", "short", "zeros", "ones", "pickle", "deep", "no text"],
)
def test_other_bytes_are_no_head(data: bytes) -> None:
    with pytest.raises(HeadInvalid):
        Head.from_bytes(data)


def test_a_head_that_is_cut_anywhere_is_no_head() -> None:
    data = head().to_bytes()
    for end in range(len(data)):
        with pytest.raises(HeadInvalid):
            Head.from_bytes(data[:end])


def test_damaged_bytes_are_no_head_or_a_head_that_can_answer() -> None:
    """Damage that only makes other finite numbers is for the store's digest to notice."""
    rng = random.Random(1)
    data = head().to_bytes()
    refused = 0
    for _ in range(2_000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            found = Head.from_bytes(bytes(damaged))
        except HeadInvalid:
            refused += 1
            continue
        way, dim = found.affine.weight.shape
        assert way == len(found.labels) == len(found.shots) == len(found.affine.bias)
        with np.errstate(all="ignore"):  # finite, but perhaps as large as floats go
            assert found.probabilities(np.zeros((2, dim), np.float32)).shape == (2, way)
    assert 200 < refused < 2_000
