from __future__ import annotations

import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch
from torch import Tensor

from training.losses import nt_xent
from training.objectives import OBJECTIVES, Contrastive, Posed, Rotation, Supervised, rotated

DIM, CLASSES, N = 8, 5, 10


def pooled(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(N, DIM, generator=generator).requires_grad_() for _ in range(count)]


def labels() -> Tensor:
    return torch.arange(N) % CLASSES


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["contrastive", "supervised"])
def test_each_objective_reads_the_views_and_labels_that_it_says(name: str) -> None:
    objective = OBJECTIVES[name](DIM, CLASSES)
    views = pooled()
    loss = objective(views, labels())
    assert loss.ndim == 0
    assert torch.isfinite(loss)
    loss.backward()
    read = sum(view.grad is not None and bool(view.grad.any()) for view in views)
    assert read == objective.views
    other = objective(views, labels().roll(1))
    assert objective.uses_labels == (not torch.equal(other, loss))
    assert all(weight.grad.abs().max() > 0 for weight in objective.parameters())


def test_contrastive_is_the_loss_on_projections_of_both_views_together() -> None:
    objective = Contrastive(DIM, CLASSES, hidden=16, out=4, temperature=0.3)
    first, second = pooled()
    projected = objective.project(torch.cat([first, second]))
    assert projected.shape == (2 * N, 4)
    expected = nt_xent(projected[:N], projected[N:], temperature=0.3)
    torch.testing.assert_close(objective([first, second], labels()), expected)


def test_contrastive_leaves_further_views_alone() -> None:
    objective = Contrastive(DIM, CLASSES)
    views = pooled(3)
    torch.testing.assert_close(objective(views, labels()), objective(views[:2], labels()))


def test_supervised_is_cross_entropy_with_smoothed_labels() -> None:
    objective = Supervised(DIM, CLASSES, smoothing=0.1)
    (view,) = pooled(1)
    logs = torch.log_softmax(objective.classify(view), dim=1)
    target = torch.full((N, CLASSES), 0.1 / CLASSES)
    target[torch.arange(N), labels()] += 0.9
    torch.testing.assert_close(objective([view], labels()), -(target * logs).sum(dim=1).mean())


def test_supervised_has_an_answer_for_every_class() -> None:
    assert Supervised(DIM, 11)([pooled()[0]], torch.full((N,), 10)).isfinite()
    with pytest.raises(IndexError):
        Supervised(DIM, 10)([pooled()[0]], torch.full((N,), 10))


def test_rotation_asks_about_a_share_of_the_batch_and_its_answers_are_the_turns_made() -> None:
    objective = Rotation(DIM, CLASSES, share=0.5)
    assert isinstance(objective, Posed)
    assert not isinstance(Supervised(DIM, CLASSES), Posed)
    view = torch.rand(N, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    altered, turns = objective.pose(view, torch.Generator().manual_seed(2))
    assert altered.shape == (N // 2, 3, 6, 6)
    assert set(turns.tolist()) <= {0, 1, 2, 3}
    assert len(set(turns.tolist())) > 1
    for image, turn, found in zip(view, turns, altered, strict=False):
        assert torch.equal(torch.rot90(image, int(turn), (1, 2)), found)
    assert torch.equal(altered, objective.pose(view, torch.Generator().manual_seed(2))[0])
    features = torch.rand(N // 2, DIM).requires_grad_()
    loss = objective([features], turns)
    loss.backward()
    assert torch.isfinite(loss)
    assert features.grad is not None
    assert objective([features], (turns + 1) % 4) != loss


def test_rotated_turns_each_image_by_its_own_quarter_turns() -> None:
    images = torch.arange(2 * 9, dtype=torch.float32).reshape(2, 1, 3, 3)
    found = rotated(images, torch.tensor([0, 3]))
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1], torch.rot90(images[1], 3, (1, 2)))
