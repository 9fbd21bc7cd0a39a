"""What a support set says about itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from models.episode import Support
from models.head import Affine
from models.learners import LEARNERS
from models.report import MOST_SUSPECTS, HeldOut, Report, fitted, held_out, report, wilson, without_own
from tests.models.learners.given import METHODS, clusters, converted, learner

FOLDED = [method for method in METHODS if not hasattr(LEARNERS[method], "leave_out")]
LABELS = ("ant", "bee", "cat")


@dataclass(frozen=True)
class Telltale:
    """With features that are the rows of an identity, logit 0 of a row is 1 when the map was made from it."""

    def adapt(self, support: Support) -> Affine:
        seen = support.features.sum(axis=0)
        weight = np.zeros((support.way, len(seen)), np.float32)
        weight[0] = seen
        bias = np.zeros(support.way, np.float32)
        bias[1] = len(support.labels)
        return Affine(weight, bias)


def told(truth: list[int], guess: list[int], sure: list[float], labels: tuple[str, ...] = LABELS) -> Report:
    """The report on examples all of which were held out: what they are, what they were taken for, and how surely."""
    pairs = zip(guess, sure, strict=True)
    way = len(labels)
    logits = np.array([[np.log(p if k == g else (1 - p) / (way - 1)) for k in range(way)] for g, p in pairs])
    classes = np.array(truth)
    return report(
        HeldOut(np.arange(len(truth)), logits, "leave-one-out"),
        classes=classes,
        labels=labels,
        ids=[f"ex_{k}" for k in range(len(truth))],
    )


def on(method: str, support: Support, *, near: float = 0.0) -> Report:
    """The report of a learner on a support set."""
    names = [f"class {k}" for k in range(support.way)]
    ids = [f"ex_{k}" for k in range(len(support.labels))]
    return report(held_out(learner(method), support, near=near), classes=support.labels, labels=names, ids=ids)


# Holding out


@pytest.mark.parametrize("shots", [(2, 2), (5, 5, 5), (1, 2, 3, 7), (1, 12), (23, 4)])
def test_no_fold_is_tested_on_what_it_learned_from(shots: tuple[int, ...]) -> None:
    support, _, _ = clusters(shots)
    n = len(support.labels)
    found = held_out(Telltale(), Support(np.eye(n, dtype=np.float32), support.labels, support.way))
    assert not found.logits[:, 0].any()
    # It learned from all but its own fold, which has at most a fifth of each class, or one.
    left_out = n - found.logits[:, 1]
    assert (left_out >= 1).all()
    assert (left_out <= sum(-(-shot // min(5, max(shots))) for shot in shots if shot > 1)).all()
    assert found.estimate == f"{min(5, max(shots))}-fold"


@pytest.mark.parametrize("method", METHODS)
def test_the_only_example_of_a_class_is_never_held_out_and_every_other_is(method: str) -> None:
    support, _, _ = clusters((1, 4, 1, 2))
    found = held_out(learner(method), support)
    counts = np.bincount(support.labels)
    assert found.index.tolist() == [i for i, label in enumerate(support.labels) if counts[label] > 1]
    assert found.logits.shape == (6, 4)


@pytest.mark.parametrize("method", METHODS)
def test_of_single_examples_nothing_can_be_held_out(method: str) -> None:
    found = held_out(learner(method), clusters((1, 1, 1))[0])
    assert (len(found.index), found.logits.shape, found.estimate) == (0, (0, 3), "none")


@pytest.mark.parametrize("method", METHODS)
def test_of_single_examples_nothing_is_left_out_in_vain(method: str) -> None:
    support, _, _ = clusters((1, 1, 1))
    affine, leave_out = fitted(learner(method), support, near=0.1)
    for one, other in zip(affine, learner(method).adapt(support), strict=True):
        np.testing.assert_array_equal(one, other)
    assert leave_out().estimate == "none"


@pytest.mark.parametrize("method", FOLDED)
def test_a_fold_is_what_the_learner_makes_of_the_others(method: str) -> None:
    support, _, _ = clusters((3, 1, 3), noise=0.4)
    found = held_out(learner(method), support)
    rows = {label: np.flatnonzero(support.labels == label) for label in range(3)}
    for fold in range(3):
        out = [rows[0][fold], rows[2][fold]]
        kept = np.setdiff1d(np.arange(7), out)
        weight, bias = learner(method).adapt(Support(support.features[kept], support.labels[kept], 3))
        at = np.searchsorted(found.index, out)
        np.testing.assert_allclose(found.logits[at], support.features[out] @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_a_closed_form_is_used_where_there_is_one() -> None:
    support, _, _ = clusters((3, 1, 3))
    found = held_out(learner("prototype"), support)
    assert found.estimate == "leave-one-out"
    np.testing.assert_array_equal(found.logits, learner("prototype").leave_out(support, np.arange(7))[found.index])


@pytest.mark.parametrize("method", METHODS)
def test_unlabelled_examples_are_not_used(method: str) -> None:
    support, _, _ = clusters((3, 3), unlabelled=5)
    logits = [held_out(learner(method), given).logits for given in (support, replace(support, unlabelled=None))]
    np.testing.assert_array_equal(*logits)


@pytest.mark.torch
@pytest.mark.parametrize("method", METHODS)
def test_torch_holds_out_as_numpy_does(method: str, torch: ModuleType) -> None:
    support, _, _ = clusters((1, 3, 6), noise=0.4)
    tensors = Support(torch.from_numpy(support.features), torch.from_numpy(support.labels), support.way)
    found = held_out(converted(learner(method), torch.from_numpy), tensors)
    expected = held_out(learner(method), support)
    assert isinstance(found.logits, np.ndarray)
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-3, atol=1e-3)


NEAR = 0.01


def with_twins(shots: int = 4) -> tuple[Support, np.ndarray]:
    """Three classes, in each of which every thing is shown twice, and what each row shows."""
    support, _, _ = clusters((shots,) * 3, noise=0.4)
    rng = np.random.default_rng(0)
    rows = np.repeat(np.argsort(support.labels, kind="stable"), 2)
    near = support.features[rows] + 0.01 * rng.standard_normal((len(rows), support.features.shape[1]))
    return Support(near.astype(np.float32), support.labels[rows], support.way), np.repeat(np.arange(3 * shots), 2)


@pytest.mark.parametrize("method", METHODS)
def test_twins_are_held_out_together(method: str) -> None:
    """What is said of an example is what the learner makes of others, none of which shows the same."""
    support, rows = with_twins()
    leave_out = fitted(learner(method), support, near=NEAR)[1]
    found = leave_out()
    assert found.index.tolist() == list(range(24))
    assert found.twins == tuple((2 * k, 2 * k + 1) for k in range(12))
    for fold in range(4):
        out = np.flatnonzero(rows % 4 == fold)
        kept = np.setdiff1d(np.arange(24), out)
        weight, bias = learner(method).adapt(Support(support.features[kept], support.labels[kept], 3))
        np.testing.assert_allclose(found.logits[out], support.features[out] @ weight.T + bias, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.logits, held_out(learner(method), support, near=NEAR).logits, rtol=1e-4, atol=1e-4)
    assert not held_out(learner(method), support).twins


@pytest.mark.parametrize("method", [method for method in METHODS if method not in FOLDED])
def test_twins_among_many_examples_cost_no_further_fit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    support, rows = with_twins()
    monkeypatch.setattr("models.report.MANY", len(rows))
    fits: list[int] = []
    adapt = LEARNERS[method].adapt
    monkeypatch.setattr(LEARNERS[method], "adapt", lambda *given: fits.append(1) or adapt(*given))
    found = held_out(learner(method), support, near=NEAR)
    assert not fits
    assert (len(found.twins), found.estimate) == (12, "leave-one-out")
    np.testing.assert_allclose(found.logits, learner(method).leave_out(support, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_who_has_no_twin_is_left_out_alone_all_the_same(method: str) -> None:
    support, _ = with_twins()
    some = np.concatenate([np.arange(3), np.arange(4, 24, 2)])  # one thing of all is shown twice
    support = Support(support.features[some], support.labels[some], 3)
    apart, together = held_out(learner(method), support), held_out(learner(method), support, near=NEAR)
    assert together.twins == ((0, 1),)
    if method not in FOLDED:
        assert together.estimate == apart.estimate
        np.testing.assert_allclose(together.logits[2:], apart.logits[2:], rtol=1e-5, atol=1e-5)


def test_where_classes_say_nothing_twins_would_answer_for_each_other() -> None:
    """The control: with every example shown twice, leave-one-out alone says that all is well."""
    rng = np.random.default_rng(0)
    features = np.repeat(rng.standard_normal((40, 64)), 2, axis=0).astype(np.float32)
    features += 0.01 * rng.standard_normal(features.shape).astype(np.float32)
    support = Support(features, np.repeat([0, 1, 2, 3], 20), 4)
    right = []
    for near in (0.0, 0.1):
        found = held_out(learner("ridge"), support, near=near)
        right.append((found.logits.argmax(axis=1) == support.labels[found.index]).mean())
    assert right[0] > 0.9
    assert right[1] < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_shows_one_thing_is_not_held_out(method: str) -> None:
    support, rows = with_twins()
    one = np.isin(rows, [0, 4, 5, 6, 8, 9])  # one thing of the first class, shown twice
    found = held_out(learner(method), Support(support.features[one], support.labels[one], 3), near=NEAR)
    assert found.index.tolist() == list(range(2, 12))
    assert np.isfinite(found.logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_picture_sent_many_times_is_no_evidence(method: str) -> None:
    support, _, _ = clusters((1, 1))
    again = np.repeat(np.argsort(support.labels), 5)
    found = on(method, Support(support.features[again], support.labels[again], 2), near=NEAR)
    assert (found.accuracy, found.estimate) == (None, "none")
    assert found.twins == (tuple(f"ex_{k}" for k in range(5)), tuple(f"ex_{k}" for k in range(5, 10)))
    assert found.advice.startswith("10 of 10 examples look like another of their class")


@pytest.mark.parametrize("frames", [1, 10])
def test_frames_of_one_thing_are_no_more_evidence_than_one_of_it(frames: int) -> None:
    truth = np.repeat([0, 1], 3 * frames)
    twins = tuple(tuple(range(k * frames, k * frames + frames)) for k in range(6)) if frames > 1 else ()
    logits = np.eye(3)[truth]
    logits[:frames] = [0, 0, 1]  # all frames of one thing are answered wrongly
    held = HeldOut(np.arange(len(truth)), logits, "leave-one-out", twins)
    found = report(held, classes=truth, labels=LABELS, ids=[f"ex_{k}" for k in range(len(truth))])
    assert (found.accuracy, found.interval) == (round(5 / 6, 4), wilson(5, 6))


def test_a_class_that_shows_one_thing_is_one_with_few_examples() -> None:
    truth = np.repeat([0, 1], 6)
    held = HeldOut(np.arange(6, 12), np.eye(2)[truth[6:]], "leave-one-out", (tuple(range(6)),))
    found = report(held, classes=truth, labels=("ant", "bee"), ids=[f"ex_{k}" for k in range(12)])
    assert found.advice.startswith("6 of 12 examples look like another of their class, as frames of one burst do")
    some = report(replace(held, twins=(tuple(range(3)),)), classes=truth, labels=("ant", "bee"), ids=["x"] * 12)
    assert some.advice.startswith("Add 1 more of 'ant': 4 is few")


def test_a_few_twins_are_named_and_are_no_cause_for_advice() -> None:
    held = replace(HeldOut(np.arange(18), np.eye(3)[np.arange(18) // 6], "leave-one-out"), twins=((3, 4),))
    found = report(held, classes=np.arange(18) // 6, labels=LABELS, ids=[f"ex_{k}" for k in range(18)])
    assert found.twins == (("ex_3", "ex_4"),)
    assert found.advice.startswith("Ready to use.")


@pytest.mark.parametrize("estimate", ["leave-one-out", "none"])
def test_one_picture_under_two_labels_is_the_first_thing_to_say(estimate: str) -> None:
    truth = np.arange(18) // 6
    held = HeldOut(np.arange(18), np.eye(3)[truth], estimate, doubles=((2, 3, 9),))
    if estimate == "none":
        held = replace(held, index=np.zeros(0, int), logits=np.zeros((0, 3), np.float32))
    found = report(held, classes=truth, labels=LABELS, ids=[f"ex_{k}" for k in range(18)])
    assert found.doubles == (("ex_2", "ex_9", "ex_3"),)  # one of each class first
    words = f"Example ex_2 of {LABELS[0]!r} looks exactly like ex_9 of {LABELS[1]!r}: take back the one whose label is"
    assert found.advice == f"{words} wrong."


def test_rivals_are_all_entries_but_that_of_the_own_class() -> None:
    logits = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    assert without_own(logits, np.array([0, 2, 1])).tolist() == [[2, 3], [4, 5], [7, 9]]
    assert without_own(logits[:, :2], np.array([0, 1, 1])).tolist() == [[2], [4], [7]]


# The interval


@pytest.mark.parametrize(
    ("right", "n", "interval"),
    [  # as R's binom.confint(..., methods = "wilson") gives them
        (0, 10, (0.0, 0.2775)),
        (8, 10, (0.4902, 0.9433)),
        (10, 10, (0.7225, 1.0)),
        (1, 2, (0.0945, 0.9055)),
        (50, 100, (0.4038, 0.5962)),
        (81, 263, (0.2553, 0.3662)),
    ],
)
def test_the_interval_is_wilsons(right: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson(right, n) == pytest.approx(interval, abs=1e-4)


def test_the_interval_holds_the_share_and_shrinks_with_the_number() -> None:
    for n in (1, 3, 10, 500):
        for right in range(n + 1):
            low, high = wilson(right, n)
            assert 0 <= low <= right / n + 1e-4
            assert right / n - 1e-4 <= high <= 1
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (2, 10, 50, 250))]
    assert widths == sorted(widths, reverse=True)


# The report


def test_accuracy_and_confusions_are_counted() -> None:
    found = told([0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 0, 2, 2, 1], [0.5] * 8)
    assert found.accuracy == 0.5
    assert found.interval == wilson(4, 8)
    assert found.estimate == "leave-one-out"
    pairs = [(item.label, item.taken_for, item.count) for item in found.confusions]
    assert pairs[0] == ("ant", "bee", 2)
    assert sorted(pairs[1:]) == [("bee", "ant", 1), ("cat", "bee", 1)]


def test_what_was_taken_for_something_else_is_suspect_the_surest_first() -> None:
    found = told([0, 0, 1, 1, 2], [1, 0, 2, 1, 0], [0.6, 0.99, 0.9, 0.99, 0.7])
    suspects = [(item.example, item.label, item.looks_like, item.score) for item in found.suspects]
    assert suspects == [("ex_2", "bee", "cat", 0.9), ("ex_4", "cat", "ant", 0.7), ("ex_0", "ant", "bee", 0.6)]


def test_only_the_surest_suspects_are_named() -> None:
    found = told([0] * 20 + [1, 2], [1] * 20 + [1, 2], [0.5 + k / 50 for k in range(20)] + [0.9, 0.9])
    assert [item.example for item in found.suspects] == [f"ex_{k}" for k in range(19, 19 - MOST_SUSPECTS, -1)]
    assert found.confusions[0].count == 20


def test_examples_that_could_not_be_held_out_are_not_counted() -> None:
    logits = np.log([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    held = HeldOut(np.array([1, 3]), logits, "leave-one-out")
    found = report(held, classes=np.array([1, 0, 2, 0]), labels=LABELS, ids=["a", "b", "c", "d"])
    assert found.accuracy == 0.5
    assert [(item.example, item.label, item.looks_like) for item in found.suspects] == [("d", "ant", "bee")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_label_among_good_ones_is_the_first_suspect(method: str, seed: int) -> None:
    support, _, _ = clusters((6, 6, 6), noise=0.1, seed=seed)
    wrong = 7
    labels = support.labels.copy()
    truth, labels[wrong] = labels[wrong], (labels[wrong] + 1) % 3
    found = on(method, replace(support, labels=labels))
    first = found.suspects[0]
    assert (first.example, first.label, first.looks_like) == (
        f"ex_{wrong}",
        f"class {labels[wrong]}",
        f"class {truth}",
    )
    assert found.accuracy == pytest.approx(17 / 18, abs=1e-4)
    clean = on(method, support)
    assert (clean.accuracy, clean.suspects, clean.confusions) == (1.0, (), ())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shots", [(1, 1), (1,) * 5, (1, 5), (2, 2), (1, 2, 1)])
def test_few_examples_give_honest_blanks_and_no_number_that_is_none(method: str, shots: tuple[int, ...]) -> None:
    found = on(method, clusters(shots)[0])
    text: Any = json.loads(json.dumps(asdict(found), allow_nan=False))
    if max(shots) == 1:
        assert (text["accuracy"], text["interval"], text["estimate"]) == (None, None, "none")
    else:
        assert 0 <= text["accuracy"] <= 1
        assert 0 <= text["interval"][0] <= text["accuracy"] <= text["interval"][1] <= 1
        assert text["interval"][1] - text["interval"][0] > 0.3  # few examples say little
    assert text["advice"].startswith("Add ")


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
def test_logits_of_any_size_give_scores_that_are_probabilities(size: float) -> None:
    logits = size * np.array([[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]])
    held = HeldOut(np.arange(2), logits.astype(np.float32), "leave-one-out")
    found = report(held, classes=np.array([0, 1]), labels=LABELS, ids=["a", "b"])
    assert 1 / 3 <= found.suspects[0].score <= 1


# The advice


def test_a_class_with_few_examples_is_named_with_what_is_missing() -> None:
    found = told([0] * 6 + [1] * 3 + [2] * 6, [0] * 6 + [1] * 3 + [2] * 6, [0.9] * 15)
    assert "2 more of 'bee'" in found.advice


def test_one_example_a_class_asks_for_more_before_anything_else() -> None:
    held = HeldOut(np.zeros(0, int), np.zeros((0, 3), np.float32), "none")
    found = report(held, classes=np.array([0, 1, 2]), labels=LABELS, ids=["a", "b", "c"])
    assert found.advice.startswith("Add 4 more of 'ant'")


def test_an_example_that_surely_looks_wrong_is_pointed_at_first() -> None:
    found = told([0] * 3 + [1] * 3 + [2] * 3, [0, 0, 1, 1, 1, 1, 2, 2, 2], [0.9] * 9)
    assert found.advice == "Look at example ex_2 of 'ant': it looks like 'bee'."


def test_classes_that_are_mixed_up_without_conviction_need_examples_of_their_difference() -> None:
    found = told([0] * 5 + [1] * 5 + [2] * 5, [0] * 5 + [1] * 3 + [2] * 7, [0.5] * 15)
    assert found.advice.startswith("Add examples of 'bee' and 'cat'")


def test_where_the_whole_task_fails_no_single_example_is_blamed() -> None:
    found = told([0] * 5 + [1] * 5, [0, 0, 1, 1, 1, 1, 1, 0, 0, 0], [0.95] * 10, LABELS[:2])
    assert (found.accuracy, len(found.suspects)) == (0.4, 6)
    assert found.advice == (
        "'ant' and 'bee' cannot be told apart from these examples: add ones that show how they differ."
    )


def test_the_two_classes_that_are_taken_for_each_other_most_are_named() -> None:
    """Both ways counted, 'ant' and 'bee' are four, though the most that go one way are three, of 'ant' to 'cat'."""
    guess = [1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 1, 1]
    found = told([0] * 6 + [1] * 6 + [2] * 6, guess, [0.9] * 18)
    assert found.advice.startswith("'ant' and 'bee' cannot be told apart")


@pytest.mark.parametrize("wrong", [1, 2])
def test_of_few_examples_one_that_looks_wrong_is_still_pointed_at(wrong: int) -> None:
    """Their interval reaches down to chance, too, but most of them are right."""
    found = told([0] * 4 + [1] * 4, [1] * wrong + [0] * (4 - wrong) + [1] * 4, [0.95] * 8, LABELS[:2])
    assert found.advice == "Look at example ex_0 of 'ant': it looks like 'bee'."


def test_two_examples_of_a_class_are_few_before_they_are_a_failure() -> None:
    assert told([0] * 2 + [1] * 2, [1, 0, 0, 0], [0.95] * 4, LABELS[:2]).advice.startswith("Add 3 more of 'ant'")


def test_a_task_without_faults_is_ready_and_more_so_with_more_examples() -> None:
    some, many = (told(list(range(3)) * n, list(range(3)) * n, [0.9] * 3 * n).advice for n in (5, 10))
    assert some.startswith("Ready to use. More")
    assert many == "Ready to use."
