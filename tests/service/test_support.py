"""Support sets as values: names, limits, what is kept of them and what is made of that."""

from __future__ import annotations

import dataclasses
import sys
import time
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.arrays import softmax
from models.calibration import Temperature, divisor
from models.episode import Support
from models.errors import (
    ClassNotFound,
    ExampleNotFound,
    ExtractorFailed,
    FewshotError,
    InvalidSupport,
    TooLarge,
    UndecodableExample,
)
from models.head import Affine
from models.learners import build
from models.report import held_out
from service.stores import Record
from service.support import (
    Example,
    Limits,
    Rows,
    checked,
    example_id,
    grown,
    head_id,
    learn,
    like,
    normal,
    normal_label,
    record_id,
    record_of,
    rows_of,
    usable,
    without_class,
    without_example,
)
from tests.fakes import REJECTION

LIMITS = Limits(max_examples=12, max_way=3, max_label=8)
EXAMPLES = [Example(label, f"{label} {k}".encode()) for label in ("red", "blue") for k in range(3)]
EXTRA = [b"extra 0", b"extra 1"]
PROTOTYPE = build("prototype", {"log_scale": np.array(2.0)})
RIDGE = build("ridge", {"log_scale": np.array(2.0), "log_penalty": np.array(-1.0)})


def feature(payload: bytes) -> np.ndarray:
    """A direction that the payload alone decides, near that of its first letter."""
    near = np.random.default_rng(payload[0]).normal(size=4)
    found = near + 0.2 * np.random.default_rng(list(payload)).normal(size=4)
    return (found / np.linalg.norm(found)).astype(np.float32)


def features(examples: list[Example], unlabelled: list[bytes] = []) -> list[np.ndarray | FewshotError]:  # noqa: B006
    return [feature(payload) for payload in [*(example.payload for example in examples), *unlabelled]]


def rows(examples: list[Example] = EXAMPLES, unlabelled: list[bytes] = EXTRA, *, retain: bool = False) -> Rows:
    found, rejected = usable(examples, unlabelled, features(examples, unlabelled), on_bad_image="skip", retain=retain)
    assert not rejected
    return found


def record(given: Rows, *, method: str = "prototype", limits: Limits = LIMITS) -> Record:
    return record_of(given, artifact="sha256:a", method=method, dim=4, limits=limits)


def same(left: Rows, right: Rows) -> bool:
    def plain(given: Rows) -> Any:
        every = {**given.labelled, **given.unlabelled}
        return {key: (row.feature.dtype, row.feature.tobytes(), row.image) for key, row in every.items()}

    return bool(plain(left) == plain(right))


def content(given: Record) -> tuple[Any, ...]:
    arrays = [(array.dtype, array.tobytes()) for array in (given.classes, given.features, given.unlabelled)]
    return given.artifact, given.method, given.labels, given.ids, given.images, *arrays


# What may be asked for


def test_a_whole_support_set_needs_two_classes_and_a_part_of_one_does_not() -> None:
    with pytest.raises(InvalidSupport, match="Only the class 'red'"):
        checked(EXAMPLES[:3], [], LIMITS)
    assert checked(EXAMPLES[:3], [], LIMITS, whole=False) == EXAMPLES[:3]
    assert checked([], EXTRA, LIMITS, whole=False) == []
    for whole, unlabelled in ((True, []), (True, EXTRA), (False, [])):
        with pytest.raises(InvalidSupport, match="empty"):
            checked([], unlabelled, LIMITS, whole=whole)


@pytest.mark.parametrize("whole", [True, False])
def test_limits_hold_for_whole_support_sets_and_for_parts(whole: bool) -> None:
    with pytest.raises(TooLarge, match="13 images; the limit is 12"):
        checked(EXAMPLES, [b"x"] * 7, LIMITS, whole=whole)
    with pytest.raises(TooLarge, match="4 classes; the limit is 3"):
        checked([Example(str(k), b"x") for k in range(4)], [], LIMITS, whole=whole)


@pytest.mark.parametrize(
    ("label", "normal"),
    [
        ("cat", "cat"),
        ("  cat\t", "cat"),
        ("cafe\u0301", "café"),
        ("a/b", "a/b"),
        ("50%", "50%"),
        ("犬", "犬"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("12345678", "12345678"),
    ],
)
def test_a_label_has_one_form(label: str, normal: str) -> None:
    assert normal_label(label, index=None, limits=LIMITS) == normal
    assert normal_label(normal, index=None, limits=LIMITS) == normal
    given = [Example(label, b"x"), Example("b", b"y")]
    assert checked(given, [], LIMITS)[0].label == normal


def test_marks_in_a_row_are_counted_before_they_are_brought_into_order() -> None:
    """It takes the square of their number: these would take many minutes, in which nothing else runs."""
    marks = "\u0315\u0300\u0323" * 200_000
    start = time.perf_counter()
    assert normal("a" + marks[:3000]) == "a" + marks[:3000]
    for letter in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.combining(unicodedata.normalize("NFD", letter)[0]):
            assert normal(letter * 31) == letter * 31
    for label in ("a" + marks[:31], "a" + marks, marks):
        with pytest.raises(InvalidSupport, match=r"marks in a row|the limit is 8"):
            normal_label(label, index=0, limits=LIMITS)
    assert time.perf_counter() - start < 1
    assert normal_label("a" + "\u0300\u0323" * 3, index=0, limits=LIMITS) == "\u1ea1\u0323\u0323\u0300\u0300\u0300"
    syllables = "\u1112\u1161\u11ab" * 8  # of three letters each, and one when they are put together
    assert len(normal_label(syllables, index=0, limits=LIMITS)) == 8


@pytest.mark.parametrize("label", ["", "  ", "\u200a", "a\0b", "a\x7fb", "a\x85b", "a\nb", "\ud800", "123456789"])
def test_what_cannot_be_a_label_is_refused_with_its_index(label: str) -> None:
    with pytest.raises(InvalidSupport) as caught:
        checked([*EXAMPLES, Example(label, b"x")], [], LIMITS, whole=False)
    assert caught.value.index == 6


# Names


def test_an_example_is_named_by_what_it_shows_and_what_it_is_said_to_be() -> None:
    names = {example_id(label, payload) for label in ("", "a", "b") for payload in (b"", b"a", b"b")}
    assert len(names) == 9
    assert example_id("a", b"b") == example_id("a", b"b")
    assert all(name.startswith("ex_") and len(name) == 35 for name in names)


def test_a_head_is_named_by_its_examples_in_any_order_before_and_after_they_are_read() -> None:
    name = head_id("sha256:a", "prototype", EXAMPLES, EXTRA)
    assert name == head_id("sha256:a", "prototype", EXAMPLES[::-1], EXTRA[::-1])
    assert name == head_id("sha256:a", "prototype", [*EXAMPLES, EXAMPLES[0]], [*EXTRA, EXTRA[0]])
    assert name == record_id(record(rows()))
    others = {
        head_id("sha256:b", "prototype", EXAMPLES, EXTRA),
        head_id("sha256:a", "ridge", EXAMPLES, EXTRA),
        head_id("sha256:a", "prototype", EXAMPLES[1:], EXTRA),
        head_id("sha256:a", "prototype", EXAMPLES, EXTRA[1:]),
        head_id("sha256:a", "prototype", EXAMPLES, []),
        head_id("sha256:a", "prototype", [Example("green", EXAMPLES[0].payload), *EXAMPLES[1:]], EXTRA),
    }
    assert len(others | {name}) == 7


def test_whether_its_images_are_kept_does_not_change_the_name_of_a_head() -> None:
    assert record_id(record(rows(retain=True))) == record_id(record(rows()))


# What is usable


def test_what_is_usable_is_kept_and_the_rest_is_named_with_its_place() -> None:
    items = features(EXAMPLES, EXTRA)
    items[1] = UndecodableExample("broken")
    items[7] = TooLarge("large")
    found, rejected = usable(EXAMPLES, EXTRA, items, on_bad_image="skip")
    assert [(item.index, item.code, item.detail) for item in rejected] == [
        (1, "undecodable_example", "broken"),
        (7, "too_large", "large"),
    ]
    assert same(found, rows([EXAMPLES[0], *EXAMPLES[2:]], EXTRA[:1]))


def test_one_image_under_two_labels_is_two_examples_and_twice_under_one_is_one() -> None:
    given = [Example("red", b"x"), Example("blue", b"x"), Example("red", b"x")]
    found, rejected = usable(given, [b"x", b"x"], features(given, [b"x", b"x"]), on_bad_image="skip")
    assert (len(found.labelled), len(found.unlabelled)) == (2, 1)
    assert [(item.index, item.code) for item in rejected] == [(2, "duplicate_example"), (4, "duplicate_example")]


def test_an_extractor_that_failed_is_never_skipped() -> None:
    items = features(EXAMPLES)
    items[4] = ExtractorFailed("failed")
    with pytest.raises(ExtractorFailed):
        usable(EXAMPLES, [], items, on_bad_image="skip")


def test_of_what_is_added_only_what_is_new_is_kept() -> None:
    more = [*EXAMPLES[3:], Example("green", b"g")]
    before = record(rows(EXAMPLES[:4], EXTRA[:1]))
    new, rejected = usable(more, EXTRA, features(more, EXTRA), on_bad_image="skip", have=before)
    assert same(new, rows(more[1:], EXTRA[1:]))
    assert [item.code for item in rejected] == ["duplicate_example"] * 2


@pytest.mark.slow
@given(st.permutations(range(12)), st.integers(1, 11), st.booleans())
def test_a_record_that_grew_is_that_of_all_its_examples(order: list[int], first: int, retain: bool) -> None:
    labelled = [Example(f"class {k % 4}", bytes([65 + k])) for k in range(9)]
    extra = [bytes([97 + k]) for k in range(3)]

    def of(chosen: list[int]) -> Rows:
        return rows([labelled[k] for k in chosen if k < 9], [extra[k - 9] for k in chosen if k >= 9], retain=retain)

    wide = Limits(max_way=4)
    whole = record(of(list(range(12))), limits=wide)
    start = record(of(order[:first]), limits=wide)
    assert content(grown(start, of(order[first:]), wide, retain=retain)) == content(whole)


def test_a_record_grows_within_the_limits() -> None:
    start = record(rows(EXAMPLES, []))
    with pytest.raises(TooLarge, match="would have 7 images; the limit is 6"):
        grown(start, rows([], [b"x"]), Limits(max_examples=6), retain=False)
    with pytest.raises(TooLarge, match="would have 3 classes; the limit is 2"):
        grown(start, rows([Example("green", b"x")], []), Limits(max_way=2), retain=False)


def test_a_class_that_the_task_has_may_get_only_bad_images_and_a_new_one_may_not() -> None:
    good = Example("red", b"r")
    for label, index in (("blue", None), ("green", 1)):
        given: list[Example] = [good, Example(label, b"bad"), Example(label, b"worse")]
        items = [feature(b"r"), UndecodableExample("broken"), UndecodableExample("worse")]
        if index is None:
            usable(given, [], items, on_bad_image="skip", have=record(rows()))
            continue
        with pytest.raises(InvalidSupport, match="'green' has no usable image: broken") as caught:
            usable(given, [], items, on_bad_image="skip", have=record(rows()))
        assert caught.value.index == index


# Taking back


def test_an_example_is_taken_back_and_all_else_stays() -> None:
    given = rows()
    assert same(without_example(given, example_id("red", b"red 0")), rows(EXAMPLES[1:]))
    assert same(without_example(given, example_id("", EXTRA[0])), rows(unlabelled=EXTRA[1:]))
    assert same(given, rows())
    for name in ("", "ex_", example_id("blue", b"red 0"), example_id("red", EXTRA[0])):
        with pytest.raises(ExampleNotFound):
            without_example(given, name)


def test_the_last_example_of_a_class_stays() -> None:
    with pytest.raises(InvalidSupport, match="last example of 'blue'"):
        without_example(rows(EXAMPLES[:4]), example_id("blue", b"blue 0"))


def test_a_class_is_taken_back_with_all_its_examples() -> None:
    green = [Example("green", b"g0"), Example("green", b"g1")]
    assert same(without_class(rows([*EXAMPLES, *green]), "green"), rows())
    with pytest.raises(ClassNotFound):
        without_class(rows(), "green")
    with pytest.raises(InvalidSupport, match="two classes"):
        without_class(rows(), "red")


def test_an_error_does_not_repeat_a_whole_long_name() -> None:
    for change in (without_class, without_example):
        with pytest.raises(FewshotError) as caught:
            change(rows(), "x" * 10_000)
        assert len(str(caught.value)) < 200


# Records


@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("unlabelled", [EXTRA, []])
def test_a_record_comes_apart_into_the_examples_it_was_made_of(retain: bool, unlabelled: list[bytes]) -> None:
    given = rows(unlabelled=unlabelled, retain=retain)
    made = record(given)
    assert same(rows_of(made), given)
    assert same(rows_of(Record.from_bytes(made.to_bytes())), given)
    assert bool(made.images) == retain
    assert made.unlabelled.shape == (len(unlabelled), 4)


def test_a_record_is_in_canonical_order() -> None:
    one, other = record(rows()), record(rows(EXAMPLES[::-1], EXTRA[::-1]))
    assert one.labels == ("blue", "red")
    assert one.classes.tolist() == [0, 0, 0, 1, 1, 1]
    for part in (one.ids[:3], one.ids[3:6], one.ids[6:]):
        assert list(part) == sorted(part)
    assert (one.labels, one.ids) == (other.labels, other.ids)
    for name in ("classes", "features", "unlabelled"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


def test_images_are_kept_of_all_examples_or_of_none() -> None:
    new = rows([Example("red", b"new")], [], retain=True)
    some = Rows({**rows().labelled, **new.labelled}, rows().unlabelled)
    assert record(some).images == ()


def test_a_record_keeps_to_the_limits_of_a_task() -> None:
    with pytest.raises(TooLarge, match="would have 8 images; the limit is 7"):
        record(rows(), limits=Limits(max_examples=7))
    with pytest.raises(TooLarge, match="would have 3 classes; the limit is 2"):
        record(rows([*EXAMPLES, Example("green", b"g")]), limits=Limits(max_way=2))


def test_a_changed_record_keeps_birth_and_end_and_nothing_else() -> None:
    before = dataclasses.replace(record(rows(EXAMPLES[1:])), created=5.0, expires=9.0)
    after = record(rows())
    changed = like(after, before)
    assert (changed.created, changed.expires, changed.ids) == (5.0, 9.0, after.ids)


# Heads


def test_learning_is_a_function_of_the_record_and_of_nothing_else() -> None:
    given = Record.from_bytes(record(rows()).to_bytes())
    first, second = (
        learn(found, PROTOTYPE, Temperature(0.3), REJECTION, device="cpu") for found in (record(rows()), given)
    )
    assert first.head.to_bytes() == second.head.to_bytes()
    assert first.report == second.report


def test_a_head_is_the_learners_map_with_its_temperature_folded_in() -> None:
    given, temperature = record(rows()), Temperature(0.3, 0.1, -0.2)
    learned = learn(given, RIDGE, temperature, None, device="cpu")
    support = Support(given.features.astype(np.float32), given.classes, 2, given.unlabelled.astype(np.float32))
    affine = RIDGE.adapt(support)
    weight = affine.weight / temperature.at(2, (3, 3))
    np.testing.assert_allclose(learned.head.affine.weight, weight, atol=np.abs(weight).max() / 250)  # a byte each
    assert (learned.head.labels, learned.head.shots) == (("blue", "red"), (3, 3))
    assert learned.head.gauge is None


WRONG = [*EXAMPLES, Example("red", b"blue 7")]


def test_where_its_own_examples_are_answered_wrongly_a_task_is_less_sure_in_report_and_answers_alike() -> None:
    given, temperature = record(rows(WRONG, [])), Temperature(1.0)
    learned = learn(given, PROTOTYPE, temperature, None, device="cpu")
    suspect = learned.report.suspects[0]
    support = Support(given.features.astype(np.float32), given.classes, 2)
    held = held_out(PROTOTYPE, support)
    by = divisor(np.e, held.logits, given.classes[held.index])
    assert by > 1.001 * np.e
    row = given.ids.index(suspect.example)
    assert suspect.example == example_id("red", b"blue 7")
    assert suspect.score == pytest.approx(softmax(held.logits[row] / by)[0], abs=1e-3)
    weight = PROTOTYPE.adapt(support).weight / by
    np.testing.assert_allclose(learned.head.affine.weight, weight, atol=np.abs(weight).max() / 250)


@pytest.mark.parametrize("examples", [EXAMPLES, [EXAMPLES[0], EXAMPLES[3]], WRONG], ids=["many", "one", "wrong"])
def test_with_a_rejection_a_head_has_the_gauge_of_its_task(examples: list[Example]) -> None:
    given = record(rows(examples, []))
    learned = learn(given, PROTOTYPE, Temperature(0.5), REJECTION, device="cpu")
    support = Support(given.features.astype(np.float32), given.classes, 2)
    logits = learned.head.logits(support.features)
    found = held_out(PROTOTYPE, support)
    held = found.logits / divisor(np.exp(0.5), found.logits, given.classes[found.index])
    rivals = logits[np.arange(len(logits)), 1 - given.classes][:, None]
    expected = REJECTION.gauge(learned.head.shots, held_out=held, rivals=rivals)
    assert learned.head.gauge == pytest.approx(expected, rel=1e-5)


def test_held_out_logits_that_are_not_finite_give_no_head() -> None:
    class Broken:
        def adapt(self, support: Support) -> Affine:
            return PROTOTYPE.adapt(support)

        def leave_out(self, support: Support, things: np.ndarray) -> np.ndarray:
            return np.full((len(support.labels), 2), np.inf, np.float32)

    with pytest.raises(ExtractorFailed, match="not finite"):
        learn(record(rows()), Broken(), Temperature(), REJECTION, device="cpu")


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_no_head(part: str, value: float) -> None:
    class Broken:
        def adapt(self, support: Support) -> Affine:
            arrays = {"weight": np.zeros((2, 4), np.float32), "bias": np.zeros(2, np.float32)}
            arrays[part] += np.float32(value)
            return Affine(**arrays)

    with pytest.raises(ExtractorFailed, match="not finite"):
        learn(record(rows()), Broken(), Temperature(), REJECTION, device="cpu")


@pytest.mark.torch
@pytest.mark.parametrize("method", ["prototype", "ridge"])
def test_torch_learns_what_numpy_learns(method: str) -> None:
    arrays = {"log_scale": np.array(2.0)} | ({"log_penalty": np.array(-1.0)} if method == "ridge" else {})
    given = record(rows(), method=method)
    found = [
        learn(given, build(method, arrays, device=device), Temperature(0.3), REJECTION, device=device)
        for device in ("cpu", "torch-cpu")
    ]
    np.testing.assert_allclose(found[0].head.affine.weight, found[1].head.affine.weight, atol=1e-4)
    assert found[0].head.gauge == pytest.approx(found[1].head.gauge, abs=1e-4)
    assert found[0].report.accuracy == found[1].report.accuracy
