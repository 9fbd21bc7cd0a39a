from __future__ import annotations

import dataclasses
import json
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

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


@pytest.mark.parametrize("format", ["fewshot-head-1", "fewshot-head-2"])
def test_a_head_as_it_was_written_before_its_weights_were_bytes_counts_as_gone(format: str) -> None:
    found = head()
    text = {"format": format, "labels": found.labels, "shots": found.shots, "gauge": None}
    text |= {"method": found.method, "artifact": found.artifact}
    with pytest.raises(HeadInvalid):
        Head.from_bytes(save(found.affine._asdict(), metadata={"head": json.dumps(text)}))
    with pytest.raises(HeadInvalid):  # nor does another name make it one of today's
        Head.from_bytes(found.to_bytes().replace(FORMAT.encode(), format.encode()))


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
    text = json.loads(head().to_bytes().splitlines()[0])
    assert (text["labels"][0], text["method"], text["shots"], text["shape"]) == ("red", "ridge", [1, 5, 2], [3, 8])


def test_a_head_of_five_classes_takes_less_than_three_kilobytes() -> None:
    affine = Affine(RNG.standard_normal((5, 512)).astype(np.float32), RNG.standard_normal(5).astype(np.float32))
    labels = tuple(f"what the {name} of us see" for name in ("first", "second", "third", "fourth", "fifth"))
    found = head(affine=affine, labels=labels, shots=(5,) * 5, gauge=(-1 / 3, 1 / 7))
    assert len(found.to_bytes()) + 36 <= 3068  # with its seal it fits the 3,072 bytes that Redis would give it anyway


# Rounding


def test_a_weight_is_rounded_to_the_nearest_of_255_steps_of_its_class() -> None:
    weight = (RNG.standard_normal((50, 64)) * 10 ** RNG.uniform(-20, 20, (50, 1))).astype(np.float32)
    found = head(affine=Affine(weight, np.zeros(50, np.float32)), labels=tuple(map(str, range(50))), shots=(1,) * 50)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(found.affine.weight - weight) <= 0.503 * step).all()
    assert all(len(np.unique(row)) <= 255 for row in found.affine.weight)
    assert found.affine.weight.dtype == np.float32


@pytest.mark.parametrize("exponent", [-150, -149, -140, -126, -30, 0, 30, 100, 127])
def test_a_head_is_rounded_once_and_its_bytes_hold_just_that(exponent: int) -> None:
    """Or it would answer otherwise before it is written than after it is read."""
    for _ in range(20):
        weight = np.ldexp(RNG.uniform(-1, 1, (3, 33)) * 10 ** RNG.uniform(-5, 0, (3, 1)), exponent + 1)
        found = head(affine=Affine(weight.astype(np.float32), np.zeros(3, np.float32)))
        assert np.isfinite(found.affine.weight).all()
        for other in (dataclasses.replace(found, gauge=(0.0, 1.0)), Head.from_bytes(found.to_bytes())):
            assert other.affine.weight.tobytes() == found.affine.weight.tobytes()


def test_a_class_without_weights_stays_without() -> None:
    weight = RNG.standard_normal((3, 8)).astype(np.float32)
    weight[1] = -0.0
    found = head(affine=Affine(weight, np.zeros(3, np.float32)))
    assert found.affine.weight[1].tobytes() == bytes(32)
    assert same(Head.from_bytes(found.to_bytes()), found)


def test_the_order_of_memory_makes_no_head_another() -> None:
    weight, features = RNG.standard_normal((7, 640)).astype(np.float32), RNG.standard_normal((1, 640)).astype("f4")
    parts = {"labels": tuple(map(str, range(7))), "shots": (1,) * 7}
    orders = (weight, np.asfortranarray(weight), np.repeat(weight, 2, axis=1)[:, ::2])
    found = [head(affine=Affine(order, np.zeros(7, np.float32)), **parts) for order in orders]
    found += [Head.from_bytes(one.to_bytes()) for one in found]
    assert len({one.logits(features).tobytes() for one in found}) == 1


# What is no head


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


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_head_with_a_number_that_is_none_is_no_head(wrong: float) -> None:
    weight, bias = RNG.standard_normal((3, 8)).astype(np.float32), np.zeros(3, np.float32)
    broken = weight.copy(), bias.copy()
    broken[0][1, 2], broken[1][1] = wrong, wrong
    for affine in (Affine(broken[0], bias), Affine(weight, broken[1])):
        with np.errstate(all="ignore"), pytest.raises(HeadInvalid):
            Head.from_bytes(head(affine=affine).to_bytes())


def written(text: dict[str, Any], numbers: bytes) -> bytes:
    """The bytes of a head of two classes and three features with another text or other numbers."""
    given = {"format": FORMAT, "labels": ["a", "b"], "shots": [1, 1], "method": "ridge", "artifact": "sha256:a"}
    return json.dumps({**given, "gauge": None, "shape": [2, 3], **text}).encode() + b"\n" + numbers


NUMBERS = np.ones(4, "<f4").tobytes() + bytes(range(6))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ({"shape": [2, 2]}, NUMBERS),
        ({"shape": [2, 4]}, NUMBERS),
        ({"shape": [3, 3]}, NUMBERS),
        ({"shape": [3, 2]}, NUMBERS),
        ({"shape": [2, -1]}, NUMBERS),
        ({"shape": [-1, 3]}, NUMBERS),
        ({"shape": [2, 0]}, NUMBERS[:16]),
        ({"shape": [6]}, NUMBERS),
        ({"shape": ["2", 3]}, NUMBERS),
        ({}, NUMBERS[:-1]),
        ({}, NUMBERS + b"\0"),
        ({}, b""),
        ({}, np.array([0, 0, -1, 1], "<f4").tobytes() + bytes(6)),
        ({}, np.array([0, 0, 1, np.nan], "<f4").tobytes() + bytes(6)),
        ({}, np.array([0, 0, 1, np.inf], "<f4").tobytes() + bytes(6)),
        ({}, np.array([0, 0, 1, 3e38], "<f4").tobytes() + bytes(range(6))),
    ],
)
def test_numbers_that_do_not_fit_their_shape_or_are_none_are_no_head(text: dict[str, Any], numbers: bytes) -> None:
    assert Head.from_bytes(written({}, NUMBERS)).affine.weight.shape == (2, 3)
    with pytest.raises(HeadInvalid):
        Head.from_bytes(written(text, numbers))


def test_a_single_class_is_no_head() -> None:
    one = Affine(np.zeros((1, 8), np.float32), np.zeros(1, np.float32))
    with pytest.raises(HeadInvalid):
        Head.from_bytes(head(affine=one, labels=("red",), shots=(1,)).to_bytes())


def test_bytes_of_another_format_are_no_head() -> None:
    data = head().to_bytes()
    with pytest.raises(HeadInvalid):
        Head.from_bytes(data.replace(FORMAT.encode(), b"fewshot-head-9"))
    with pytest.raises(HeadInvalid):
        Head.from_bytes(data.replace(b"format", b"farmot"))


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
