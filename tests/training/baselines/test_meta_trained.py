"""MAML, Reptile and MANN: what training does to them, and what an answer may depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch

from training import checkpoint
from training.baselines import Given, MetaTrained, maml, mann, reptile
from training.baselines.conv4 import Conv4, shown
from training.episodes import Indices, Pool, frozen

SIZE, WAY, CLASSES, IMAGES = 16, 3, 8, 8
GIVEN = Given(WAY, 1, SIZE, 1, seed=0)
SMALL = {
    "maml": (maml.Maml, maml.Settings(steps=25, tasks=4, train_queries=2, width=8, shrink="stride", lr=1e-2)),
    "reptile": (
        reptile.Reptile,
        reptile.Settings(steps=60, tasks=2, train_shots=5, batch=6, width=8, lr=1e-2, test_steps=8, test_batch=3),
    ),
    "mann": (
        mann.Mann,
        mann.Settings(steps=400, tasks=8, train_queries=2, lr=3e-3, side=4, hidden=32, slots=8, width=16),
    ),
}
ALL = pytest.mark.parametrize("name", list(SMALL))
CONVOLUTIONAL = pytest.mark.parametrize("name", ["maml", "reptile"])


def drawings(seed: int) -> tuple[np.ndarray, Pool]:
    """Classes are coarse patterns; the images of one differ by noise. Pixels [n, SIZE, SIZE, 1]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (CLASSES, 4, 4)) * 200
    patterns = coarse.repeat(SIZE // 4, axis=1).repeat(SIZE // 4, axis=2)
    labels = np.repeat(np.arange(CLASSES), IMAGES)
    noisy = patterns[labels] + rng.integers(0, 56, (len(labels), SIZE, SIZE))
    return noisy.astype(np.uint8)[..., None], Pool.of(labels)


def made(name: str, **settings: Any) -> MetaTrained:
    kind, small = SMALL[name]
    values = {field: getattr(small, field) for field in small.__dataclass_fields__}
    return kind(type(small)(**{**values, **settings}), GIVEN)


def trained(method: MetaTrained, steps: int, seed: int = 0) -> list[float]:
    pixels, pool = drawings(seed)
    return [method.advance(pixels, pool) for _ in range(steps)]


def accuracy(method: MetaTrained, episodes: list[Indices], pixels: np.ndarray, mode: str = "inductive") -> float:
    right = []
    for episode in episodes:
        answers = method.adapt(pixels[episode.support], episode.labels, WAY)[mode]
        right.append(np.mean(answers(pixels[episode.query]) == episode.answers))
    return float(np.mean(right))


def tasks(seed: int, count: int) -> tuple[np.ndarray, list[Indices]]:
    pixels, pool = drawings(seed)
    return pixels, frozen(pool, way=WAY, shot=1, queries=5, count=count, seed=0)


@ALL
def test_training_lowers_the_loss_on_the_same_tasks(name: str) -> None:
    """A step draws its tasks from the seed and its number, so the first tasks can be posed again at the end."""
    method = made(name)
    before = trained(method, method.steps)[:5]
    method.step = 0
    assert np.mean(trained(method, 5)) < 0.9 * np.mean(before)


@CONVOLUTIONAL
def test_classes_never_seen_are_learned_from_one_example(name: str) -> None:
    pixels, episodes = tasks(1, 10)
    method = made(name)
    trained(method, 10)
    assert accuracy(method, episodes, pixels) > 0.5  # chance is a third


@ALL
def test_a_training_that_goes_on_from_a_checkpoint_is_the_unbroken_one(name: str, tmp_path: Path) -> None:
    unbroken, broken = made(name), made(name)
    trained(unbroken, 2)
    trained(broken, 2)
    checkpoint.save(tmp_path / "state", broken.state())
    broken = made(name)
    broken.restore(checkpoint.load(tmp_path / "state"))
    assert broken.step == 2
    assert trained(unbroken, 2) == trained(broken, 2)
    for label, one in (("unbroken", unbroken), ("broken", broken)):
        checkpoint.save(tmp_path / label, one.state())
    assert (tmp_path / "unbroken").read_bytes() == (tmp_path / "broken").read_bytes()


@ALL
def test_adapting_leaves_what_was_trained_as_it_was(name: str, tmp_path: Path) -> None:
    """Any number of tasks adapt from the same start: what one was taught does not reach the next."""
    method = made(name)
    trained(method, 3)
    pixels, (first, second) = tasks(1, 2)
    checkpoint.save(tmp_path / "before", method.state())
    once = method.adapt(pixels[first.support], first.labels, WAY)
    asked = {mode: answer(pixels[first.query]) for mode, answer in once.items()}
    other = method.adapt(pixels[second.support], second.labels, WAY)
    for answer in other.values():
        answer(pixels[second.query])
    for mode, answer in once.items():
        assert np.array_equal(answer(pixels[first.query]), asked[mode])
    checkpoint.save(tmp_path / "after", method.state())
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


@ALL
def test_an_inductive_answer_is_the_same_alone_and_in_company(name: str) -> None:
    method = made(name)
    trained(method, 5)
    pixels, episodes = tasks(1, 5)
    for episode in episodes:
        answers = method.adapt(pixels[episode.support], episode.labels, WAY)["inductive"]
        together = answers(pixels[episode.query])
        alone = np.concatenate([answers(pixels[[row]]) for row in episode.query])
        assert np.array_equal(together, alone)


@CONVOLUTIONAL
def test_a_transductive_answer_depends_on_the_company(name: str) -> None:
    """Questions of one class only look like several classes to statistics that are taken from them."""
    method = made(name)
    trained(method, 5)
    pixels, episodes = tasks(1, 8)
    changed = 0
    for episode in episodes:
        answers = method.adapt(pixels[episode.support], episode.labels, WAY)["transductive"]
        mixed = answers(pixels[episode.query])
        first = episode.query[episode.answers == 0]
        changed += int((answers(pixels[first]) != mixed[episode.answers == 0]).sum())
    assert changed > 0


@ALL
def test_another_number_of_classes_is_refused(name: str) -> None:
    pixels, _ = drawings(0)
    with pytest.raises(ValueError, match="trained for 3"):
        made(name).adapt(pixels[:4], np.arange(4), 4)


def test_first_order_takes_the_adapted_parameters_as_constants() -> None:
    """By the formula: the first-order gradient is that of the query loss at the adapted parameters; second differs."""
    grown = {}
    for order in ("first", "second"):
        method = made("maml", tasks=1, order=order)
        trained(method, 1)
        grown[order] = [parameter.grad.clone() for parameter in method.network.parameters()]  # type: ignore[attr-defined]
    method = made("maml", tasks=1)
    pixels, pool = drawings(0)
    rng = np.random.default_rng([GIVEN.seed, 0])
    task = pool.episode(rng, way=WAY, shots=np.full(WAY, 1), queries=2)
    network = method.network.train()  # type: ignore[attr-defined]

    def loss(rows: np.ndarray, answers: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(shown(pixels[rows])), torch.from_numpy(answers))

    gradients = torch.autograd.grad(loss(task.support, task.labels), list(network.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter -= 0.4 * gradient
    expected = torch.autograd.grad(loss(task.query, task.answers), list(network.parameters()))
    for found, wanted in zip(grown["first"], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)
    apart = [float((one - two).abs().max()) for one, two in zip(grown["second"], expected, strict=True)]
    assert max(apart) > 1e-3


@pytest.mark.parametrize(("shrink", "size"), [("pool", 28), ("pool", 84), ("stride", 28), ("stride", 20)])
def test_the_head_fits_what_four_halvings_leave(shrink: Any, size: int) -> None:
    network = Conv4(channels=3, size=size, way=4, width=2, shrink=shrink)
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 4)


def test_ink_is_one_on_paper_of_zero() -> None:
    pixels = np.array([[[[0], [255]]]], np.uint8)
    assert shown(pixels).tolist() == [[[[1.0, 0.0]]]]


def test_the_memory_writes_where_it_was_used_least() -> None:
    """The slots written by the first images are other ones, and each holds a key of its own."""
    method = made("mann")
    assert isinstance(method, mann.Mann)
    torch.manual_seed(0)
    state, before = method.network.listen(torch.rand(1, 3, 16), torch.tensor([[0, 1, 2]]))
    written = state.memory[0].norm(dim=1) > 0.1
    assert int(written.sum()) >= 3
    assert before.tolist() == [[0.0, 0.0, 1.0]]
