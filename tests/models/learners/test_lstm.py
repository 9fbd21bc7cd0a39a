from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from models.head import Affine
from models.learners.lstm import LSTM
from tests.models.learners.given import HIDDEN, SLOTS, arrays, clusters, learner, unit

SILENT = {"gates": np.zeros((HIDDEN, 5), np.float32), "free": np.zeros((HIDDEN, 16), np.float32)}


def far(a: Affine, b: Affine) -> float:
    return max(float(np.abs(one - other).max() / np.abs(one).max()) for one, other in zip(a, b, strict=True))


def gate(column: int) -> dict[str, np.ndarray]:
    """The learned arrays with one gate left open and all else silent."""
    gates = SILENT["gates"].copy()
    gates[:, column] = arrays("lstm")["gates"][:, column]
    return {**SILENT, "gates": gates}


def test_before_training_it_is_the_whitened_prototypes() -> None:
    """With the gates and the free term at zero, whatever the cell does."""
    support, _, _ = clusters((1, 5, 2, 3), unlabelled=5)
    plain = learner("whitened").adapt(support)
    silent = learner("lstm", **SILENT).adapt(support)
    np.testing.assert_allclose(silent.weight, plain.weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(silent.bias, plain.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("column", range(5))
def test_each_gate_by_itself_changes_the_map(column: int) -> None:
    support, _, _ = clusters((1, 5, 2, 3))
    assert far(learner("whitened").adapt(support), learner("lstm", **gate(column)).adapt(support)) > 1e-3


def test_the_free_correction_changes_the_map() -> None:
    support, _, _ = clusters((1, 5, 2, 3))
    free = learner("lstm", gates=SILENT["gates"]).adapt(support)
    assert far(learner("whitened").adapt(support), free) > 1e-3


def test_a_class_reads_no_examples_but_its_own() -> None:
    """With one example, what it reads is its prototype, and there is nothing to correct by."""
    support, _, _ = clusters((1, 1, 1, 1))
    own = learner("lstm", **gate(0)).adapt(support)
    assert far(learner("whitened").adapt(support), own) < 1e-5


def test_a_class_does_not_meet_itself_among_the_others() -> None:
    """However sharply it looks for what is like it; else nothing would be left of the difference to the others."""
    support, _, _ = clusters((1, 5, 2, 3))
    sharp = learner("lstm", log_focus=np.log(np.array([1e4, 1])), **gate(2)).adapt(support)
    assert far(learner("whitened").adapt(support), sharp) > 1e-3


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
        seen, state, memory = torch.randn(3, len(learned["inputs"])), torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)
        found = LSTM(**learned)._step(seen, state, memory)
        for one, other in zip(found, cell(seen, (state, memory)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_it_remembers_matters() -> None:
    support, _, _ = clusters((1, 5, 2, 3))
    other = unit(np.random.default_rng(9).standard_normal((SLOTS, 16)))
    assert far(learner("lstm").adapt(support), learner("lstm", slots=other).adapt(support)) > 1e-3


def test_the_order_of_the_memory_does_not_matter() -> None:
    support, _, _ = clusters((1, 5, 2, 3))
    slots = arrays("lstm")["slots"]
    assert far(learner("lstm").adapt(support), learner("lstm", slots=slots[::-1].copy()).adapt(support)) < 1e-5


def test_a_sudden_state_overflows_nowhere() -> None:
    """exp would, in float32, from 89 on; and a warning is an error here."""
    support, _, _ = clusters((1, 5, 2, 3))
    offset = np.where(np.arange(4 * HIDDEN) % 2, 500, -500)
    assert np.isfinite(learner("lstm", offset=offset).adapt(support).weight).all()
