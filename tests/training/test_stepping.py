from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch

from tests.training.runs import a_run, config
from training import stepping


def test_the_random_numbers_of_a_step_are_its_own() -> None:
    def numbers(seed: int, step: int) -> tuple[float, ...]:
        return tuple(torch.rand(3, generator=stepping.generator(seed, step)).tolist())

    assert numbers(0, 5) == numbers(0, 5)
    assert len({numbers(seed, step) for seed in range(4) for step in range(-20, 20)}) == 4 * 40


def test_the_learning_rate_rises_evenly_and_then_falls_to_nothing() -> None:
    asked = config(lr=0.4, warmup=0.2)
    rates = [stepping.learning_rate(step, 100, asked) for step in range(100)]
    np.testing.assert_allclose(rates[:20], 0.4 * np.arange(1, 21) / 20)
    assert rates[20] == max(rates) == 0.4
    assert all(before > after for before, after in itertools.pairwise(rates[20:]))
    assert rates[60] == pytest.approx(0.2)
    assert 0 < rates[-1] < 0.001
    assert stepping.learning_rate(0, 1, config(lr=0.4, warmup=0)) == 0.4


def test_the_precision_follows_from_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda")
    for able, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, able=able: able)
        assert stepping.choose_precision("auto", card) == expected
        assert stepping.choose_precision("auto", cpu) == "float32"
        assert [stepping.choose_precision(name, card) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]


def test_weight_decay_spares_offsets_and_normalisation() -> None:
    run = a_run(weight_decay=0.1)
    decayed, plain = run.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(weight.ndim > 1 for weight in decayed["params"])
    assert all(weight.ndim == 1 for weight in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(run.network.parameters()))
