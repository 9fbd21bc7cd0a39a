from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from models.arrays import normalise, one_hot
from models.episode import Support
from models.head import Affine
from models.learners import build
from models.learners.lstm import EACH, LSTM, SEEN, SHARED, look, meet
from models.learners.whitened import whitening
from tests.models.learners.given import DIM, HIDDEN, SLOTS, arrays, clusters, learner, unit

SILENT = {"shared": np.zeros((HIDDEN, SHARED), np.float32), "each": np.zeros((HIDDEN, EACH), np.float32)}
UNEVEN = (1, 5, 2, 3)


def far(a: Affine, b: Affine) -> float:
    return max(float(np.abs(one - other).max() / np.abs(one).max()) for one, other in zip(a, b, strict=True))


def answer(name: str, column: int) -> dict[str, np.ndarray]:
    """The learned arrays with one answer left and all else silent."""
    kept = SILENT[name].copy()
    kept[:, column] = arrays("lstm")[name][:, column]
    return {**SILENT, name: kept}


def seen(shots: tuple[int, ...], **replaced: Any) -> np.ndarray:
    """What is seen of the classes of a task with these shots through no lens at all."""
    support, _, _ = clusters(shots)
    labels = replaced.pop("labels", one_hot(support.labels, support.way, support.features))
    means = labels.T @ support.features / labels.sum(axis=0)[:, None]
    given = {"met": meet(support.features, labels), "means": means, "labels": labels, "focus": np.float32(8)}
    lens = np.ones_like(means[0])
    return np.asarray(look(**{**given, "directions": arrays("lstm")["slots"], "lens": lens, **replaced}))


def test_an_example_is_met_as_if_it_were_a_question() -> None:
    """What is summed up of all examples is what each shows by itself, through a lens too."""
    support, _, _ = clusters((3, 1, 4))
    labels = one_hot(support.labels, support.way, support.features)
    lens = np.linspace(0.5, 2, support.features.shape[1], dtype=np.float32)
    features, counts = support.features * lens, labels.sum(axis=0)
    names = normalise(labels.T @ features / counts[:, None])
    margins = np.zeros(support.way)
    for row, own in zip(features, support.labels, strict=True):
        others = [other for other, label in zip(features, support.labels, strict=True) if label == own]
        if len(others) > 1:
            rest = normalise(np.sum(others, axis=0) - row)
            rival = max(float(normalise(row) @ names[k]) for k in range(support.way) if k != own)
            margins[own] += (float(normalise(row) @ rest) - rival) / counts[own]
    found = seen((3, 1, 4), means=(labels.T @ support.features / counts[:, None]) * lens, lens=lens)
    np.testing.assert_allclose(found[:, 3], 5 * margins, atol=1e-5)


@pytest.mark.parametrize("shots", [UNEVEN, (9, 8, 9)], ids=["fewer examples than features", "more"])
def test_before_training_it_is_the_discriminant(shots: tuple[int, ...]) -> None:
    """With its answers at zero, whatever the cell does."""
    support, _, _ = clusters(shots, unlabelled=5)
    plain = learner("discriminant").adapt(support)
    silent = learner("lstm", **SILENT).adapt(support)
    np.testing.assert_allclose(silent.weight, plain.weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(silent.bias, plain.bias, rtol=1e-5, atol=1e-5)


def test_one_of_an_artifact_from_before_there_was_scatter_is_what_it_was() -> None:
    support, _, _ = clusters(UNEVEN, unlabelled=5)
    plain = learner("whitened").adapt(support)
    silent = build("lstm", {name: value for name, value in {**arrays("lstm"), **SILENT}.items() if name != "log_own"})
    for found, expected in zip(silent.adapt(support), plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_worked_out_before_the_task_changes_no_bit() -> None:
    support, _, _ = clusters(UNEVEN, unlabelled=5)
    plain = LSTM(**arrays("lstm"))
    for ours, theirs in zip(plain.adapt(support), plain.ready().adapt(support), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "column"), [("shared", k) for k in range(SHARED)] + [("each", k) for k in range(EACH)]
)
def test_each_answer_by_itself_changes_the_map(name: str, column: int) -> None:
    support, _, _ = clusters(UNEVEN)
    assert far(learner("discriminant").adapt(support), learner("lstm", **answer(name, column)).adapt(support)) > 1e-3


def test_what_is_learned_knows_no_feature() -> None:
    """The same task in another basis, with its memory in that basis: the same logits. So a cell fits any extractor."""
    support, query, _ = clusters(UNEVEN, queries=3)
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((DIM, DIM)))[0].astype(np.float32)
    turned = type(support)(support.features @ turn, support.labels, support.way)
    remembered = arrays("lstm")
    other = learner("lstm", basis=turn.T @ remembered["basis"], slots=remembered["slots"] @ turn).adapt(turned)
    one = learner("lstm").adapt(support)
    np.testing.assert_allclose(query @ one.weight.T, query @ turn @ other.weight.T, atol=1e-4)
    np.testing.assert_allclose(one.bias, other.bias, atol=1e-4)


def test_no_array_of_the_cell_has_the_length_of_a_feature() -> None:
    remembered = {"basis", "spectrum", "slots"}
    shapes = [value.shape for name, value in arrays("lstm").items() if name not in remembered]
    assert DIM not in {length for shape in shapes for length in shape}


def test_whether_examples_would_be_told_apart_is_seen_where_there_are_several() -> None:
    shown = seen((1, 5, 5, 5))
    margin, told = shown[:, 3], shown[:, 4]
    assert margin[0] == told[0] == 0  # of an only example nothing is known
    assert (margin[1:] > 0).all()
    assert (told[1:] > 0.5).all()


def test_shuffled_labels_look_like_classes_that_cannot_be_told_apart() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 5))
    shown = seen((5, 5, 5, 5), labels=np.eye(4, dtype=np.float32)[labels])
    assert shown[:, 3].mean() < 0
    assert seen((5, 5, 5, 5))[:, 3].mean() > 0


def test_classes_that_are_remembered_look_known() -> None:
    support, _, _ = clusters((1, 1, 1, 1))
    means = support.features[np.argsort(support.labels)]
    shown = seen((1, 1, 1, 1), directions=np.concatenate([means[:2], arrays("lstm")["slots"]]))
    assert np.allclose(shown[:2, 6], 2, atol=1e-4)  # twice the cosine with the nearest slot
    assert (shown[2:, 6] < 1.9).all()


def test_the_number_of_numbers_seen_is_the_one_the_cell_expects() -> None:
    assert seen(UNEVEN).shape == (4, SEEN)
    assert np.isfinite(seen(UNEVEN)).all()


def test_an_open_way_to_the_memory_ends_at_what_was_recalled() -> None:
    """With a sharp look at a memory that holds a class's place, its row is the one that place would have."""
    support, _, _ = clusters((1, 1, 1, 1))
    slots = unit(support.features + 0.05 * np.random.default_rng(2).standard_normal(support.features.shape))
    wide_open = SILENT["each"].copy()
    wide_open[:, 0] = 1e4
    given = {**SILENT, "each": wide_open, "log_focus": np.log(np.float32(1e4)), "offset": np.ones(4 * HIDDEN)}
    given |= {"inputs": np.zeros((2 * SEEN, 4 * HIDDEN)), "recur": np.zeros((HIDDEN, 4 * HIDDEN)), "slots": slots}
    found = learner("lstm", **given).adapt(support)
    recalled = learner("whitened").adapt(type(support)(slots.astype(np.float32), support.labels, support.way))
    assert far(recalled, found) < 1e-3
    assert far(learner("whitened").adapt(support), found) > 1e-2


def test_the_strength_of_the_whitening_stays_within_its_bounds() -> None:
    """However wildly the cell answers: an odd task cannot throw the memory away."""
    support, _, _ = clusters((3, 3, 3))
    wild = SILENT["shared"].copy()
    wild[:, 0] = 1e6
    found = learner("lstm", **{**SILENT, "shared": wild, "log_own": np.float32(-30)}).adapt(support)
    remembered = arrays("lstm")
    flattest = whitening(remembered["basis"], remembered["spectrum"], remembered["log_shrink"] + 4)
    steepest = whitening(remembered["basis"], remembered["spectrum"], remembered["log_shrink"] - 4)
    means = np.stack([support.features[support.labels == k].mean(axis=0) for k in range(3)])
    scale = np.exp(remembered["log_scale"])
    ends = [scale * (means @ transform @ transform.T) for transform in (flattest, steepest)]
    assert min(np.abs(found.weight - end).max() / np.abs(end).max() for end in ends) < 1e-3


@pytest.mark.torch
def test_the_cell_is_the_one_of_the_textbook(torch: ModuleType) -> None:
    learned = {name: torch.from_numpy(value) for name, value in arrays("lstm").items()}
    cell = torch.nn.LSTMCell(len(learned["inputs"]), HIDDEN)
    # torch keeps its parts in another order: write, keep, new, show.
    write_keep_new_show = [HIDDEN * part + i for part in (1, 0, 3, 2) for i in range(HIDDEN)]
    with torch.no_grad():
        cell.weight_ih.copy_(learned["inputs"][:, write_keep_new_show].T)
        cell.weight_hh.copy_(learned["recur"][:, write_keep_new_show].T)
        cell.bias_ih.copy_(learned["offset"][write_keep_new_show])
        cell.bias_hh.zero_()
        given, state, memory = torch.randn(3, len(learned["inputs"])), torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)
        found = LSTM(**learned)._step(given, state, memory)
        for one, other in zip(found, cell(given, (state, memory)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_it_remembers_matters() -> None:
    support, _, _ = clusters(UNEVEN)
    other = unit(np.random.default_rng(9).standard_normal((SLOTS, 16)))
    assert far(learner("lstm").adapt(support), learner("lstm", slots=other).adapt(support)) > 1e-3


def test_the_order_of_the_memory_does_not_matter() -> None:
    support, _, _ = clusters(UNEVEN)
    slots = arrays("lstm")["slots"]
    assert far(learner("lstm").adapt(support), learner("lstm", slots=slots[::-1].copy()).adapt(support)) < 1e-5


def test_a_sudden_state_overflows_nowhere() -> None:
    """exp would, in float32, from 89 on; and a warning is an error here."""
    support, _, _ = clusters(UNEVEN)
    offset = np.where(np.arange(4 * HIDDEN) % 2, 500, -500)
    assert np.isfinite(learner("lstm", offset=offset).adapt(support).weight).all()


@pytest.mark.slow
@pytest.mark.parametrize("shots", [(2, 2), (3, 1, 6), (1, 5, 2, 3), (8,) * 12])
def test_but_for_what_its_cell_answers_it_leaves_an_example_out_exactly(shots: tuple[int, ...]) -> None:
    deaf = {name: np.zeros_like(arrays("lstm")[name]) for name in ("inputs", "recur")}  # it answers the same for any
    found, (support, _, _) = learner("lstm", **deaf), clusters(shots, noise=0.5)
    logits, counts = found.leave_out(support, np.arange(sum(shots))), np.bincount(support.labels)
    for index in np.flatnonzero(counts[support.labels] > 1):
        kept = np.delete(np.arange(len(support.labels)), index)
        weight, bias = found.adapt(Support(support.features[kept], support.labels[kept], support.way))
        np.testing.assert_allclose(logits[index], support.features[index] @ weight.T + bias, rtol=0, atol=1e-4)


def test_a_cell_from_before_that_answered_a_scale_still_does() -> None:
    support, _, _ = clusters((3, 3), noise=0.5)
    fourth = np.random.default_rng(0).standard_normal((HIDDEN, 1)).astype(np.float32)
    shared = arrays("lstm")["shared"]
    now, before = learner("lstm"), learner("lstm", shared=np.concatenate([shared, fourth], axis=1))
    ratio = before.adapt(support).weight / now.adapt(support).weight
    assert abs(ratio.mean() - 1) > 0.01
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
    one, other = (found.leave_out(support, np.arange(6)) for found in (before, now))
    np.testing.assert_allclose(one, ratio.mean() * other, rtol=1e-4)
